"""Tuning of a slim model: of its scales once it is quantised, where what is trained is what is deployed; or before that
of its float weights, where millions of tokens or a task are to be learnt.

The integers are chosen first, with their errors compensated on the first rows of the text
(:mod:`saap.quantize.gptq`). Then one number per group of input columns is trained, together with the norms' weights, in
the form that the deployed kernel takes (:mod:`saap.tune.adapters`). The forward pass of the last step and the exported
graph hold the same integers, scales and zero points, bit for bit.

Weights learn as floats (``options.train``); what comes of it is a slim directory as pruning writes it.

The loss is the mean of NLL and KL to the dense teacher, whose answers are computed once and kept
(:mod:`saap.tune.teacher`). Under ``accelerate launch`` the rows of a step are split over processes
(:mod:`saap.tune.loop.steps`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from saap.base.allocator import kept_memory
from saap.base.errors import UserError
from saap.base.progress import LOADING, WRITING, Progress, note
from saap.base.writing import RECORD, check_output, claimed
from saap.models.architectures import architecture_of, shape_of
from saap.models.checkpoint import load_model, read_config, slim_config, write_slim
from saap.models.record import Tuning, read_record
from saap.models.resolve import resolve
from saap.models.slim_quant import MatrixForm, SlimQuant, planned_forms
from saap.models.streaming import load_streamed, moved, settle
from saap.models.weight_files import weights_hash
from saap.quantize.choose_forms import choose_forms
from saap.quantize.gptq import compensated_matrices
from saap.quantize.groups import IntegerForm, check_widths, nearest_matrices, quantize_model
from saap.system.gpu import out_of_memory
from saap.system.precision import autocast_dtype, computes_bf16, fast_float32
from saap.system.processes import computing_on, is_main_process, training_device
from saap.text.documents import Sequences, TooLittleTextError
from saap.text.encoding import long_spelling
from saap.text.rows import IGNORED, TuningRows, held_out, tuning_rows
from saap.tune import adapters
from saap.tune.loop.processes import Batch, LossOf
from saap.tune.loop.state import discard_states, state_directory
from saap.tune.loop.steps import DivergedError, Group, History, Run, train
from saap.tune.losses import KeptMatrix, head_loss, head_words, learning_loss
from saap.tune.needs import Placement, placement_of
from saap.tune.options import TuneOptions
from saap.tune.pace import KeptTokens, timed
from saap.tune.short_attention import use_short_attention
from saap.tune.teacher import Question, StudentWords, TeacherTargets, check_same_vocabulary, teacher_targets


@dataclass(frozen=True)
class TuneResult:
    """A tuned directory."""

    path: Path  # the directory, with integer weights, or with float ones where these were trained
    history: History  # the losses
    text: TuningRows  # the training text


@fast_float32()
@kept_memory()
def tune(
    model: str | Path,
    options: TuneOptions | None = None,
    *,
    output: str | Path,
    teacher: str | Path | None = None,
    data: str | Path | TuningRows | torch.Tensor | None = None,
    progress: Progress | None = None,
) -> TuneResult:
    """Tune a slim (or dense) model on text: its scales, once it is quantised here, or its float weights.

    A killed run continues where it was when it is started again.

    Args:
        model: a directory or a name.
        teacher: the dense model, whose next-token distribution is learned too.
        data: a text, .jsonl or .gz file, or a data set id; None is SAAP_DATA, else the samples that ship. Rows that are
            cut already are used once, in this order; plain ids [sequences, tokens] are learned whole.

    Raises:
        DivergedError: a loss that is not finite; the best state before it was written to ``output``.
        UserError: already tuned, widths that are not whole groups, too little text, a teacher of another vocabulary.
    """
    options, out = options or TuneOptions(), Path(output)
    options.check()
    check_output(out, model, teacher, data, record=RECORD)
    directory = resolve(model, progress=progress)
    options = options.for_model(directory)
    check_model(directory, options)
    teacher_dir = None if teacher is None else resolve(teacher, progress=progress)
    with (
        computing_on(options.training.device), claimed(out) if is_main_process() else nullcontext(),
        out_of_memory("give a smaller --micro-batch or --length, or --device cpu"),
    ):  # fmt: skip
        device = training_device()
        if options.training.precision == "bf16" and not computes_bf16(device):
            raise UserError(f"the {device.type} here does not multiply bfloat16 in hardware: leave --precision out")
        options = replace(options, training=replace(options.training, device=str(device)))
        kept = None if options.minutes is None else KeptTokens(out, options.minutes)
        if kept is not None:
            options = timed(options, directory, teacher_dir, kept, progress)
        if isinstance(data, torch.Tensor):
            data = TuningRows(data, data.clone(), "given ids", None, "text")
        if not isinstance(data, TuningRows):
            data, options = tuning_text(directory, options, teacher_dir, data, progress)
        if kept is not None:
            kept.write(options.tokens)
        result = _Tuning(directory, out, options, teacher_dir, data, progress).run()
        if kept is not None:
            kept.discard()
    return result


def tuning_text(
    model: Path, options: TuneOptions, teacher: Path | None, data: str | Path | None, progress: Progress | None = None
) -> tuple[TuningRows, TuneOptions]:
    """Cut the rows that :func:`tune` learns from; with a budget of minutes fewer tokens may be there than it allows.

    Raises UserError: no such text, too little, or a teacher of other tokens.
    """
    if teacher is not None:
        check_same_vocabulary(teacher, model)
    # Rows that scored the structures are passed over: the same text twice teaches less.
    skip = rows_read(model, options.length) if options.skip is None else options.skip
    source = None if data is None else str(data)

    def cut(tokens: int) -> TuningRows:
        sequences = Sequences(max(1, tokens // options.length), options.length, options.training.seed, skip)
        return tuning_rows(model, source, sequences, options.kind)

    try:
        rows = cut(options.tokens)
    except TooLittleTextError as error:
        fewer = options.tokens - error.missing * options.length
        if options.minutes is None or fewer < options.training.rows_per_step * options.length:
            raise
        rows, options = cut(fewer), replace(options, tokens=fewer)
        note(progress, f"the text has {fewer:,} tokens that may be learned: give more --data to use all the time")
    part = "" if rows.kind == "text" else f", {rows.learnt} of {rows.ids.numel()} tokens are answers and learned"
    for line in (f"tuning text: {rows.source}{part}", rows.note, long_spelling(model, rows.ids.flatten().tolist())):
        if line:
            note(progress, line)
    return rows, options


def rows_read(model: Path, length: int) -> int:
    """Return how many rows of ``length`` tokens pruning and training read of their text, as the model's record says."""
    record = read_record(model)
    calibrated = record.get("lineage", {}).get("calibration", {})
    read = calibrated.get("sequences", 0) * calibrated.get("tokens", 0)
    return math.ceil((read + record.get("weights", {}).get("tokens", 0)) / length)


@dataclass(frozen=True)
class _Tuning:
    """One run: what is tuned on which rows, and where the result goes."""

    model: Path
    out: Path
    options: TuneOptions
    teacher: Path | None
    rows: TuningRows
    progress: Progress | None

    def run(self) -> TuneResult:
        options, shape = self.options, shape_of(read_config(self.model))
        if len(self.rows) < options.training.rows_per_step:
            raise UserError(
                f"{len(self.rows)} sequences of tuning text are fewer than one step's {options.training.rows_per_step}:"
                " give more text, or shorter sequences"
            )
        if self.teacher is not None:
            check_same_vocabulary(self.teacher, self.model)
        self._report(LOADING)
        began, weights = time.monotonic(), weights_hash(self.model)
        writes = is_main_process()  # known before a model is loaded: FSDP would leave the others' weights empty
        placement = placement_of(shape, self.rows.ids.shape[1], options)
        device = placement.device
        model = (
            load_streamed(self.model, device=device) if placement.streamed else moved(load_model(self.model), device)
        )
        targets = targets_of(self.teacher, self.rows, options, StudentWords.of(self.model), self.progress)
        if options.train == "scales":
            quant = _quantised(model, self.rows.ids, options, self._planned_forms(), self.progress)
            groups = _attached(model, options)
        else:
            quant, groups = None, _of_weights(model, options)
        trained = sum(p.numel() for group in groups for p in group["params"])
        use_short_attention(model)
        error = None
        try:
            history = self._train(model, groups, targets, placement, weights)
        except DivergedError as diverged:
            if not diverged.history.best_step:
                raise
            error, history = diverged, diverged.history
        self._report(WRITING)
        if writes:
            self._write(
                model,
                quant,
                {
                    "options": options.recorded(),
                    "trained_parameters": trained,
                    "tokens": self.rows.ids.numel(),
                    "text": self.rows.lineage(),
                    "teacher": str(self.teacher) if self.teacher else None,
                    "seconds": round(time.monotonic() - began, 1),
                    "history": asdict(history),
                    "from_sha256": weights,
                },
            )
        if error is not None:
            raise DivergedError(f"{error}; it was written to {self.out}", error.step, history)
        return TuneResult(self.out, history, self.rows)

    def _report(self, label: str) -> None:
        if self.progress:
            self.progress(label, 0, 0)

    def _planned_forms(self) -> Mapping[str, MatrixForm]:
        """Integers that single matrices were planned in."""
        if not self.options.planned:
            return {}
        return planned_forms(read_record(self.model), architecture_of(read_config(self.model)))

    def _train(
        self,
        model: PreTrainedModel,
        groups: list[Group],
        targets: TeacherTargets | None,
        placement: Placement,
        weights: str,
    ) -> History:
        """Train in place. ``weights``: the hash of the model's."""
        options, rows = self.options, self.rows
        learned, judged = held_out(rows, options.held_out) if options.holds_out(len(rows)) else (rows, None)
        head = None if placement.recomputed else KeptMatrix()
        if not placement.recomputed:
            adapters.keep_matrices(model)
        judging = replace(options, teacher_weight=1.0)  # by NLL a state is best that writes as the text does
        run = Run(
            replace(options.training, checkpointing=placement.recomputed),
            held_out=None if judged is None else tensors_of(judged, len(learned)),
            held_out_loss=loss_of(targets, judging, head),
            loss_name=loss_name(targets, options),
            held_out_name=f"held-out {loss_name(targets, judging)}",
            best_on_disk=options.train != "scales",
            state_dir=state_directory(self.out),
            fingerprint={
                "model": weights,
                "teacher": weights_hash(self.teacher) if self.teacher else None,
                "tuning": {key: value for key, value in options.recorded().items() if key != "training"},
            },
        )
        return train(model, groups, tensors_of(learned, 0), loss_of(targets, options, head), run, self.progress)

    def _write(self, model: PreTrainedModel, quant: SlimQuant | None, tuning: Tuning) -> None:
        """Write the directory; the states of the run are no longer needed."""
        adapters.fold(model)
        tied = model.config.tie_word_embeddings and quant is None
        head = f"{architecture_of(model.config).head}.weight" if tied else ""
        tensors = ((name, tensor.cpu()) for name, tensor in model.state_dict().items() if name != head)
        record, config = read_record(self.model), read_config(self.model)
        if quant is None:
            record["weights"], config = tuning, config | {"dtype": "float32"}  # what was judged
            config.pop("torch_dtype", None)
        else:
            record["tuning"], config = tuning, slim_config(config, shape_of(config), quant)
        write_slim(self.out, self.model, config, tensors, record)
        discard_states(state_directory(self.out))


def check_model(slim_dir: Path, options: TuneOptions) -> dict[str, object]:
    """Check that a model can be tuned, and return its config.

    Raises UserError: tuned already, or widths that are not whole groups.
    """
    config = read_config(slim_dir)
    if config.get("slim_quant"):
        raise UserError(f"{slim_dir} holds tuned integers already: tune the slim directory it came from")
    shape = shape_of(config)
    if not options.planned:
        check_widths(shape, options.group)
    return config


def targets_of(
    teacher_dir: str | Path | None,
    rows: TuningRows,
    options: TuneOptions,
    words: StudentWords | None,
    progress: Progress | None,
) -> TeacherTargets | None:
    """Ask the teacher about all rows; processes wait for the one that computes its answers."""
    if teacher_dir is None or options.teacher_weight == 0:
        return None
    from accelerate import PartialState

    fast = autocast_dtype(options.training.precision, training_device()) is not None
    question = Question(options.kept_tokens, fast, words)
    with PartialState().main_process_first():
        return teacher_targets(teacher_dir, rows.ids, question, progress)


def tensors_of(rows: TuningRows, first: int) -> Batch:
    """Rows as the training loop slices them, with their numbers in the teacher's answers."""
    return {"ids": rows.ids, "labels": rows.labels, "row": torch.arange(first, first + len(rows))}


def loss_of(targets: TeacherTargets | None, options: TuneOptions, head: KeptMatrix | None = None) -> LossOf:
    """Return a function of a batch: NLL, mixed with KL to the teacher, summed over learnt tokens, and their number."""

    def loss(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        assert isinstance(model, PreTrainedModel)
        learnt = batch["labels"][:, 1:] != IGNORED
        places = F.pad(learnt, (0, 1))  # what a row's last place predicts is not known
        labels, known = batch["labels"][:, 1:][learnt], None
        if targets is not None:  # rows of a batch follow one another
            numbers = batch["row"]
            answers = targets.batch(int(numbers[0]), int(numbers[-1]) + 1)
            known = [part.to(learnt.device)[learnt] for part in answers]
        if (words := head_words(model)) is not None:  # of whose rows alone there are logits
            words = words.to(labels.device)
            labels = torch.searchsorted(words, labels)
            known = known and [torch.searchsorted(words, known[0]), known[1]]

        def of_piece(logits: torch.Tensor, first: int, end: int) -> torch.Tensor:
            if known is None:
                return F.cross_entropy(logits.float(), labels[first:end], reduction="sum")
            of_teacher = known[0][first:end], known[1][first:end]
            return learning_loss(logits, labels[first:end], of_teacher, options.teacher_weight)

        return head_loss(model, batch["ids"], places, of_piece, head), learnt.sum()

    return loss


def loss_name(targets: TeacherTargets | None, options: TuneOptions) -> str:
    """Name what :func:`loss_of` computes, in nats per learnt token."""
    weight = 0.0 if targets is None else options.teacher_weight
    return {0.0: "NLL", 1.0: "KL"}.get(weight, "NLL+KL")


def _quantised(
    model: PreTrainedModel,
    ids: torch.Tensor,
    options: TuneOptions,
    own: Mapping[str, MatrixForm],
    progress: Progress | None,
) -> SlimQuant:
    """Quantise a model in place and return its config's ``slim_quant``.

    ``own``: the integers that single matrices were planned in.
    """
    form = IntegerForm(options.bits, options.group, options.head_bits or options.bits, own)
    form = replace(form, head_bits=form.vocabulary(architecture_of(model.config).head).bits)
    sample = ids[: options.calibration_rows]
    if options.max_bytes is not None:
        choice = choose_forms(model, sample, options.max_bytes, progress)
        head = architecture_of(model.config).head
        form = replace(form, head_bits=choice.forms[head].bits, own=choice.forms)
    if options.integers == "gptq":
        matrices = compensated_matrices(model, sample, form, progress)
    else:
        matrices = nearest_matrices(model, form)
    quant = quantize_model(model, options.bits, options.group, form.head_bits, matrices)
    del matrices
    settle(model)
    for parameter in model.parameters():  # a view of the loaded file keeps all pages of it that were written
        parameter.data = parameter.data.clone()
    return quant


def _attached(model: PreTrainedModel, options: TuneOptions) -> list[Group]:
    """Attach adapters and return the parameters to train: the factors of scales, and the norms' weights."""
    adapters.attach(model)
    norms = [parameter for name, parameter in model.named_parameters() if "norm" in name]
    for norm in norms:
        norm.requires_grad_(True)
    factors = adapters.trained_parameters(model)
    rate, of_norms = options.rates
    return [{"params": factors, "lr": rate}, {"params": norms, "lr": of_norms}]


def _of_weights(model: PreTrainedModel, options: TuneOptions) -> list[Group]:
    """Return the float weights to train, of the decoder layers or of all, and apart the norms'."""
    row = architecture_of(model.config)
    groups: list[Group] = [{"params": [], "lr": rate} for rate in options.rates]
    for name, parameter in model.named_parameters():
        learns = options.train == "all" or name.startswith((f"{row.layers}.", f"{row.final_norm}."))
        parameter.requires_grad_(learns)
        parameter.data = parameter.data.clone()  # so that no page of the loaded file is kept
        if learns:
            groups["norm" in name]["params"].append(parameter)
    return [group for group in groups if group["params"]]
