"""Pruning, start to end: choose what to keep, let the remaining weights compensate, cut, write."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from msgspec import convert
from transformers import PreTrainedModel

from saap.base.allocator import kept_memory
from saap.base.errors import UserError
from saap.base.needs import Needs, check_disk, check_memory, fits
from saap.base.progress import LOADING, WRITING, Progress, advance, note
from saap.base.writing import RECORD, check_output, claimed, put_in_place
from saap.models.architectures import architecture_of, shape_of
from saap.models.checkpoint import load_model, read_config, slim_config
from saap.models.record import Calibration, Lineage, read_record
from saap.models.resolve import resolve
from saap.models.streaming import load_streamed, moved
from saap.models.weight_files import (
    TensorFolder,
    check_sizes,
    tensor_reader,
    weights_bytes,
    weights_dtype,
    weights_hash,
)
from saap.prune.baselines.methods import ranked_plan
from saap.prune.cut.refit import compensate
from saap.prune.cut.surgery import cut_tensors
from saap.prune.needs import prune_disk, prune_needs
from saap.prune.options import TAYLOR, AdaptiveOptions, PruneOptions
from saap.prune.plan import PrunePlan
from saap.prune.record import Pruning, plan_of, record_of
from saap.prune.search.adaptive import adaptive_plan
from saap.prune.search.budget import Budget, WordsOption, budget_for
from saap.prune.search.measured import LONG_TEXT
from saap.prune.search.milp import check_floor
from saap.prune.trials import HALVINGS, TrialOptions, choose_by_tuning, kept_trials, trial_rows, tuning_for
from saap.prune.vocabulary import Chosen, words_by_text, write_trimmed
from saap.system.device_names import device_of
from saap.system.gpu import fits_device, out_of_memory
from saap.system.precision import fast_float32
from saap.text.documents import Sequences, TooLittleTextError, one_kind
from saap.text.rows import Rows, training_rows

NO_TEXT = Rows(torch.zeros(0, 0, dtype=torch.int64), "no text", None)  # for methods that read none


@dataclass(frozen=True)
class PruneResult:
    """A slim directory and how it came about."""

    path: Path
    plan: PrunePlan  # what it keeps of the model that was pruned, and why
    budget: Budget  # what that model was required to meet
    achieved: dict[str, float | None]  # ratio, parameters and so on of the slim model; None is unknown
    text: str | None  # where the calibration text is from; None where its ids were given


def prune(
    model: str | Path,
    options: PruneOptions,
    *,
    output: str | Path,
    calibration: torch.Tensor | Rows | str | Path | None = None,
    words: Chosen | Sequence[Chosen] | None = None,
    progress: Progress | None = None,
) -> PruneResult:
    """Prune a model into a slim directory.

    Args:
        model: a model directory, a GGUF file, a hub id or the name of a packaged model.
        output: the directory to write; new, empty, or an earlier output of saap.
        calibration: ids [sequences, tokens] int64, all of which score, or a text: a file or a data set id. None
            takes the text in ``SAAP_DATA``, else the samples that ship.
        words: a vocabulary for the head, or several to choose from; by default ``options.vocabulary`` is chosen by the
            calibration text.
        progress: called as (label, done, total), and with sentences where it has a method ``note``.

    Raises:
        UserError: the requirement cannot be met, or the input does not fit.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("pruning runs in one process: start it without accelerate launch, which is for saap tune")
    output = Path(output)
    options.check()
    check_output(output, model, calibration, record=RECORD)
    source = resolve(model, progress=progress)
    if isinstance(calibration, torch.Tensor) and options.effort == "quick":  # all of it scores
        options = replace(options, sequences=max(1, len(calibration)), refit_text=1)
    requirement = requirement_on(source, options)
    if options.vocabulary and words is None:
        smallest = WordsOption(1, 0.0, 0.0, options.vocabulary_input)
        _check_floor(requirement.saying(smallest), options)  # before a text is read
        words = words_by_text(source, options, calibration, progress)
    budget = _choosing(requirement, words)
    _check_floor(budget, options)
    rows = calibration
    if not isinstance(rows, torch.Tensor | Rows):
        rows = _named_rows(source, None if rows is None else str(rows), options, progress)
    pruning = _pruning(str(model), source, options, budget, rows)
    if options.effort != "quick":
        return _by_trials(pruning, options, source, output, rows, progress)
    if pruning.options.stream:
        note(progress, "the model is read layer by layer, one is in memory at a time")
    pruning, plan = _prune(pruning.choosing(words), source, output, progress)
    achieved = pruning.budget.report(shape_of(config := read_config(output)), config, plan)
    return PruneResult(output, plan, pruning.budget, achieved, pruning.text)


def _named_rows(source: Path, text: str | None, options: PruneOptions, progress: Progress | None) -> Rows:
    """Read :func:`calibration_rows`; a note names the text."""
    rows = calibration_rows(source, text, options, progress)
    note(progress, f"calibration text: {rows.source}")
    if kind := one_kind(text):
        other = "instructions" if kind == "running text" else "running texts"
        note(progress, f"all of it is {kind}, so {other} are not scored: give a .jsonl with both")
    return rows


def calibration_rows(
    directory: Path, text: str | None, options: PruneOptions, progress: Progress | None = None
) -> Rows:
    """Rows of a text for scores, for trials, and where there are more, for the refit and for long windows.

    Raises UserError: no such text, or too little of it.
    """
    spare = trial_rows(options)

    def read(count: int) -> Rows:
        sequences = Sequences(count + spare, options.length, options.seed)
        return training_rows(directory, text, "calibration", sequences)

    further = LONG_TEXT // options.length if options.method == "saap" and options.adaptive.measured else 0
    for count in (options.rows + further, options.rows):
        with suppress(TooLittleTextError):
            return read(count)
    return read(options.sequences if options.effort == "quick" else options.rows)


def _pruning(model: str, source: Path, options: PruneOptions, budget: Budget, rows: torch.Tensor | Rows) -> Pruning:
    """Collect what one pruning needs; decide whether it reads layer by layer, and where it computes."""
    text = rows if isinstance(rows, Rows) else None
    ids = rows.ids if isinstance(rows, Rows) else rows
    stream = streamed(source, budget, options, min(len(ids), options.rows), ids.shape[1])
    lineage = Lineage(base=model)
    if text:
        lineage["calibration"] = convert(text.lineage(), Calibration)
    record = read_record(source)
    known = record.get("lineage")
    lineage |= Lineage(base_sha256=weights_hash(source), base_record=None if known is None else dict(known))
    return Pruning(
        replace(
            options, device=str(device_of(options.device)), stream=stream,
            heads=False if budget.allowed.one_width else options.heads,
        ), budget,
        ids[: options.sequences] if stream else ids, lineage, vocabulary=record.get("vocabulary"),
    )  # fmt: skip


def _by_trials(
    pruning: Pruning,
    options: PruneOptions,
    source: Path,
    output: Path,
    rows: torch.Tensor | Rows,
    progress: Progress | None,
) -> PruneResult:
    """Prune as :func:`prune` does, by a plan that tuning chooses; the text has rows for that after those that score."""
    if pruning.options.stream:
        raise UserError(
            f"--effort {options.effort} tunes every plan, and the model does not fit into memory as a whole: "
            "leave it out"
        )
    needed = options.sequences + trial_rows(options)
    text = rows if isinstance(rows, Rows) else Rows(rows, "given ids", None)
    if len(text.ids) < needed:
        raise UserError(
            f"--effort {options.effort} needs {needed} calibration sequences, these are {len(text.ids)}: "
            "give more text, or leave --effort out"
        )

    def make(adaptive: AdaptiveOptions, out: Path, scored: Rows, report: Progress | None) -> object:
        quick = replace(options, effort="quick", adaptive=adaptive)
        return prune(pruning.lineage["base"], quick, output=out, calibration=scored, progress=report)

    costs = None if options.costs is None else hashlib.sha256(options.costs.read_bytes()).hexdigest()
    parts = pruning.lineage["base_sha256"], options, costs, text.ids
    trials = TrialOptions(
        HALVINGS[options.effort], options.adaptive, options.length, tuning_for(options), device_of(options.device)
    )
    with claimed(output), kept_trials(output, *parts) as kept:
        best = choose_by_tuning(make, source, trials, kept, text, progress)
        put_in_place(best, output)
    plan = read_record(output)["plan"]
    return PruneResult(output, plan_of(plan), pruning.budget, plan["achieved"], text.source)


def _prune(pruning: Pruning, source: Path, output: Path, progress: Progress | None) -> tuple[Pruning, PrunePlan]:
    """Choose, compensate, cut and write; the pruning comes back with the vocabulary that the search chose."""
    options, budget = pruning.options, pruning.budget
    check_disk(Needs({}, prune_disk(budget.dense, weights_bytes(source), budget.share)), output, "pruning")
    advice = "give --stream, fewer --sequences, a smaller --length, or --device cpu"
    with fast_float32(), kept_memory(), claimed(output), out_of_memory(advice), _scratch(output) as scratch:
        advance(progress, LOADING, 0, 0)
        device = device_of(options.device)
        model = load_streamed(source, device=device) if options.stream else moved(load_model(source), device)
        plan = _plan(model, pruning, progress)
        refitted = TensorFolder(scratch, weights_dtype(source)) if options.stream else {}
        if options.compensation == "bias" or plan.cut_layers(budget.dense):  # other integers alone may meet the budget
            ids = pruning.ids[: options.rows]
            refitted.update(compensate(options.compensation, model, plan, ids, progress=progress))
        del model
        if plan.words is not None:
            pruning = pruning.with_candidate(plan.words)
        advance(progress, WRITING, 0, 0)
        _write(pruning, plan, source, output, refitted)
    return pruning, plan


def _plan(model: PreTrainedModel, pruning: Pruning, progress: Progress | None) -> PrunePlan:
    options, ids = pruning.options, pruning.ids
    if options.method == "saap":
        weights = pruning.lineage["base_sha256"]
        return adaptive_plan(model, ids, pruning.budget, options, weights=weights, progress=progress)
    return ranked_plan(model, ids[: options.sequences], pruning.budget, options, progress)


def _write(pruning: Pruning, plan: PrunePlan, source: Path, output: Path, refitted: Mapping[str, torch.Tensor]) -> None:
    config, budget, words = read_config(source), pruning.budget, pruning.words
    names, read = tensor_reader(source)
    tensors = cut_tensors(names, read, plan, budget.dense, architecture_of(config), refitted)
    written = (words.config if words else slim_config)(config, plan.kept_shape(budget.cut), kept=plan.kept_layers)
    achieved = budget.report(shape_of(written), written, plan)
    write_trimmed(output, source, written, tensors, record_of(pruning, plan, achieved, config), words)


@contextmanager
def _scratch(output: Path) -> Iterator[Path]:
    """Make a hidden folder beside the output for the time of the context; one left by a kill is emptied."""
    folder = output.parent / f".{output.name}.pruning"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def budget_of(model_dir: str | Path, options: PruneOptions, words: Chosen | Sequence[Chosen] | None = None) -> Budget:
    """Return the requirement on this model, checked before anything is scored; nothing is written.

    ``words``: a vocabulary for the head, which counts in parameters, bytes and milliseconds, or several to choose from.

    Raises:
        UserError: the model cannot be pruned, or no choice of options can meet the requirement.
    """
    options.check()
    budget = _choosing(requirement_on(model_dir, options), words)
    _check_floor(budget, options)
    return budget


def _choosing(requirement: Budget, words: Chosen | Sequence[Chosen] | None) -> Budget:
    """Return the requirement with this vocabulary, or with several to choose from."""
    if isinstance(words, Chosen):
        return requirement.saying(words.option)
    return replace(requirement, words=tuple(each.option for each in words or ()))


def _check_floor(budget: Budget, options: PruneOptions) -> None:
    if options.method == "saap":
        check_floor(budget)


def requirement_on(model_dir: str | Path, options: PruneOptions) -> Budget:
    """Return the requirement on a model. Raises UserError: it cannot be pruned so, or meets it already."""
    config = read_config(model_dir)
    if config.get("slim_quant"):
        raise UserError(f"{model_dir} holds tuned integers, which cannot be pruned: prune the model it was tuned from")
    check_sizes(model_dir)
    shape = shape_of(config)
    if shape.per_layer and options.method == "shortgpt":
        raise UserError(
            f"{model_dir} has embeddings for each layer, so no layer can be removed: leave --method shortgpt out"
        )
    if shape.sources and options.heads and options.method != "saap":
        raise UserError(
            f"{model_dir} has layers that read keys and values of earlier ones, so only saap prunes their heads: "
            "leave --heads out"
        )
    if options.heads and not shape.separable_heads:
        raise UserError(f"{model_dir} has a norm over all heads, so single heads cannot be removed: leave --heads out")
    wrong = sorted(i for i in options.kept_layers if not 0 <= i < len(shape.layers))
    if wrong:
        raise UserError(f"--keep-layers names layer {wrong[0]}; the model has layers 0 to {len(shape.layers) - 1}")
    cut = replace(shape, added_bias=True) if options.compensation == "bias" else shape
    budget = budget_for(options, shape, config, cut=cut)
    if _one_width(options, config):
        return replace(budget, allowed=replace(budget.allowed, heads=False, one_width=True))
    return budget


def _one_width(options: PruneOptions, config: Mapping[str, object]) -> bool:
    """Whether the engine that is planned for wants one FFN width for all layers, and all else as it is.

    Raises UserError: it does not hold the family, or options ask for something else.
    """
    if options.engine == "any":
        return False
    holds = architecture_of(dict(config)).gguf
    if holds == "no":
        raise UserError(f"saap writes no GGUF files of {config['model_type']} models: leave --for {options.engine} out")
    if holds == "any widths":
        return False
    asked = {"--heads": options.heads, "--keep-layers": options.kept_layers, "--method": options.method != "saap"}
    if other := [name for name, value in asked.items() if value]:
        raise UserError(
            f"llama.cpp has one FFN width for all layers of {config['model_type']} models: leave {other[0]} or "
            f"--for {options.engine} out"
        )
    return True


def streamed(model_dir: str | Path, budget: Budget, options: PruneOptions, sequences: int, tokens: int) -> bool:
    """Whether the layers stay in their files: as asked, or where the whole model does not fit into memory.

    Raises:
        UserError: not even a layer at a time fits, or the method needs the whole model.
    """
    element = options.adaptive.element if options.method == "saap" else "none"
    whole, single = (
        prune_needs(budget.dense, rows, tokens, weights_bytes(model_dir), streamed=by_layer, element=element)
        for by_layer, rows in ((False, sequences), (True, min(sequences, options.sequences)))
    )
    if options.stream is False or (
        options.stream is None and fits(whole) and fits_device(whole, device_of(options.device))
    ):
        check_memory(whole, "pruning", "leave --no-stream out, so that layers are read one at a time")
        return False
    if options.method in TAYLOR:
        check_memory(whole, "pruning", f"{options.method} needs the whole model: use saap, or a larger machine")
    check_memory(single, "pruning", "give fewer --sequences or a smaller --length")
    return True
