"""Group-wise tuning of a quantised slim model: what is trained is what is deployed.

The integers are chosen first, with their errors compensated on the first rows of the text
(:mod:`saap.quantize.gptq`). Then one number per group of input columns is trained, together with the norms' weights, in
the form that the deployed kernel takes (:mod:`saap.tune.adapters`). The forward pass of the last step and the
exported graph hold the same integers, scales and zero points, bit for bit.

The loss is the mean of NLL and KL to the dense teacher, whose answers are computed once and kept
(:mod:`saap.tune.teacher`). Under ``accelerate launch`` the rows of a step are split over processes
(:mod:`saap.tune.loop.steps`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from devices.common.progress import Progress
from saap.models.architectures import shape_of
from saap.models.checkpoint import load_model, read_config, read_record, slim_config, write_slim
from saap.models.shape import ModelShape
from saap.models.streaming import load_streamed
from saap.models.weight_files import weights_hash
from saap.quantize.groups import check_blocks
from saap.system.allocator import kept_memory
from saap.system.errors import UserError
from saap.system.files import check_output
from saap.system.needs import check_memory, fits
from saap.system.precision import autocast_dtype, fast_float32
from saap.system.processes import is_main_process
from saap.text.tuning_rows import IGNORED, TuningRows, held_out
from saap.tune.loop.state import discard_states
from saap.tune.loop.steps import Batch, DivergedError, History, LossOf, train
from saap.tune.losses import distillation_loss, head_loss
from saap.tune.needs import tune_needs
from saap.tune.options import TuneOptions
from saap.tune.quantised import Quantised
from saap.tune.teacher import TeacherTargets, check_same_vocabulary, teacher_targets

__all__ = ["TuneOptions", "tune"]


@fast_float32()
@kept_memory()
def tune(
    slim_dir: str | Path,
    out: str | Path,
    rows: TuningRows | torch.Tensor,
    options: TuneOptions | None = None,
    *,
    teacher_dir: str | Path | None = None,
    lineage: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> History:
    """Quantise a slim (or dense) directory, tune it group by group on text, write a directory with integer weights.

    Args:
        rows: the tuning text, used once, in this order; the last of it is held out where there are enough rows. Plain
            ids [sequences, tokens] are learnt whole.
        teacher_dir: the dense model's directory; its next-token distribution is learnt too.

    Returns:
        the losses. A killed run continues where it was when it is started again.

    Raises:
        DivergedError: a loss that is not finite; the best state before it was written to ``out``.
        UserError: already tuned, widths that are not whole groups, too little text, a teacher of another vocabulary.
    """
    options = options or TuneOptions()
    options.check()
    if isinstance(rows, torch.Tensor):
        rows = TuningRows(rows, rows.clone(), "given ids", None, "text")
    out = Path(out)
    check_output(out)
    config = _check_input(slim_dir, rows, options)
    if teacher_dir is not None:
        check_same_vocabulary(teacher_dir, slim_dir)
    began, weights = time.monotonic(), weights_hash(slim_dir)
    writes = is_main_process()  # asked before a model is loaded: FSDP would leave the others' weights empty
    model = load_streamed(slim_dir) if by_layer(shape_of(config), rows, options) else load_model(slim_dir)
    some = options.held_out * len(rows) >= 1
    learnt, judged = held_out(rows, options.held_out) if some else (rows, None)
    targets = targets_of(teacher_dir, rows, options, progress)
    quantised = Quantised(model, rows.ids, options, progress)
    groups = quantised.prepare()
    state_dir = out.parent / f".{out.name}.tuning"
    error = None
    try:
        history = train(
            quantised.model, groups, tensors_of(learnt, 0), loss_of(targets, options), options.training,
            held_out=None if judged is None else tensors_of(judged, len(learnt)), held_out_loss=loss_of(None, options),
            state_dir=state_dir, fingerprint=_fingerprint(weights, teacher_dir, options), progress=progress,
        )  # fmt: skip
    except DivergedError as diverged:
        if not diverged.history.best_step:
            raise
        error, history = diverged, diverged.history
    if writes:
        quant = quantised.fold()
        record = {k: v for k, v in read_record(slim_dir).items() if k != "format"}
        record["tuning"] = {
            "options": options.recorded(),
            "trained_parameters": sum(p.numel() for group in groups for p in group["params"]),
            "tokens": rows.ids.numel(),
            "text": rows.lineage(),
            "teacher": str(teacher_dir) if teacher_dir else None,
            "seconds": round(time.monotonic() - began, 1),
            "history": asdict(history),
            "from_sha256": weights,
            **(lineage or {}),
        }
        tensors = ((name, tensor) for name, tensor in quantised.model.state_dict().items())
        write_slim(out, slim_dir, slim_config(config, shape_of(config), quant), tensors, record)
        discard_states(state_dir)
    if error is not None:
        raise DivergedError(f"{error}; it was written to {out}", error.step, history)
    return history


def by_layer(shape: ModelShape, rows: TuningRows, options: TuneOptions) -> bool:
    """Whether the floats stay in their files, and each layer's are read when its integers are chosen.

    Raises:
        UserError: memory is too small, or what is asked for needs all floats at once.
    """
    tokens = rows.ids.shape[1] * (options.training.micro_rows or options.training.rows_per_step)
    whole, single = (
        tune_needs(shape, options.bits, options.group_size, tokens, streamed=streamed) for streamed in (False, True)
    )
    if fits(whole):
        return False
    if options.max_bytes is not None:
        check_memory(whole, "tuning", "--max-bytes needs all floats at once: leave it out")
    check_memory(single, "tuning", "give a smaller --length")
    return True


def _check_input(slim_dir: str | Path, rows: TuningRows, options: TuneOptions) -> dict[str, Any]:
    config = read_config(slim_dir)
    if config.get("slim_quant"):
        raise UserError(f"{slim_dir} holds tuned integers already: tune the slim directory it came from")
    shape, block = shape_of(config), options.group_size
    check_blocks(shape.hidden, block, "the hidden size")
    for index, sizes in enumerate(shape.layers):
        check_blocks(sizes.query_heads * shape.head_dim, block, f"o_proj of layer {index}")
        check_blocks(sizes.ffn, block, f"down_proj of layer {index}")
    if len(rows) < options.training.rows_per_step:
        raise UserError(
            f"{len(rows)} sequences of tuning text are fewer than one step's {options.training.rows_per_step}: "
            "give more text, or shorter sequences"
        )
    return config


def targets_of(
    teacher_dir: str | Path | None, rows: TuningRows, options: TuneOptions, progress: Progress | None
) -> TeacherTargets | None:
    """The teacher's answers to all rows; processes wait for the one that computes them."""
    if teacher_dir is None or options.teacher_weight == 0:
        return None
    from accelerate import PartialState

    fast = autocast_dtype(options.training.precision, torch.device("cpu")) is not None
    with PartialState().main_process_first():
        return teacher_targets(
            teacher_dir, rows.ids, k=options.kept_tokens, temperature=options.temperature, autocast=fast,
            progress=progress,
        )  # fmt: skip


def tensors_of(rows: TuningRows, first: int) -> Batch:
    """Rows as the training loop slices them, with their numbers in the teacher's answers."""
    return {"ids": rows.ids, "labels": rows.labels, "row": torch.arange(first, first + len(rows))}


def loss_of(targets: TeacherTargets | None, options: TuneOptions) -> LossOf:
    """The loss of a batch: the sum over its learnt tokens of NLL, mixed with KL(teacher || model), and their number."""

    def loss(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        learnt = batch["labels"][:, 1:] != IGNORED
        places = F.pad(learnt, (0, 1))  # what a row's last place predicts is not known
        labels, known = batch["labels"][:, 1:][learnt], None
        if targets is not None:  # rows of a batch follow one another
            numbers = batch["row"]
            answers = targets.batch(int(numbers[0]), int(numbers[-1]) + 1)
            known = [part.to(learnt.device)[learnt] for part in answers]

        def of_piece(logits: torch.Tensor, first: int, end: int) -> torch.Tensor:
            nll = F.cross_entropy(logits.float(), labels[first:end], reduction="sum")
            if known is None:
                return nll
            tokens, logprobs = (part[None, first:end] for part in known)
            counted = torch.ones_like(tokens[..., 0], dtype=torch.bool)
            divergence = distillation_loss(
                logits.unsqueeze(0), tokens, logprobs, counted, options.temperature, reduction="sum"
            )
            return (1 - options.teacher_weight) * nll + options.teacher_weight * divergence

        return head_loss(model, batch["ids"], places, of_piece), learnt.sum()

    return loss


def _fingerprint(weights: str, teacher_dir: str | Path | None, options: TuneOptions) -> dict[str, Any]:
    return {
        "model": weights,
        "teacher": weights_hash(teacher_dir) if teacher_dir else None,
        "tuning": {key: value for key, value in options.recorded().items() if key != "training"},
    }
