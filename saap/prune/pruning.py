"""Pruning, start to end: choose what to keep, let the remaining weights compensate, cut, write."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from msgspec import convert
from transformers import PreTrainedModel

from saap.base.allocator import kept_memory
from saap.base.errors import UserError
from saap.base.needs import Needs, check_disk, check_memory, fits
from saap.base.progress import LOADING, WRITING, Progress
from saap.base.writing import RECORD, check_output, claimed
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
from saap.prune.options import TAYLOR, PruneOptions
from saap.prune.plan import PrunePlan, composed, whole_layer
from saap.prune.record import Pruning, plan_of, record_of
from saap.prune.search.adaptive import adaptive_plan
from saap.prune.search.budget import Budget, budget_for
from saap.prune.search.explain import after
from saap.prune.search.measured import LONG_TEXT
from saap.prune.search.milp import check_floor
from saap.prune.stages import Stage, kept_stages, share_of, stages_of
from saap.prune.trials import choose_by_tuning, trial_rows
from saap.prune.vocabulary import Chosen, write_trimmed
from saap.system.device_names import device_of
from saap.system.gpu import fits_device, out_of_memory
from saap.system.precision import fast_float32
from saap.text.documents import SELF, Sequences, TooLittleTextError
from saap.text.rows import Rows, training_rows

NO_TEXT = torch.zeros(0, 0, dtype=torch.int64)  # of methods that read none


@dataclass(frozen=True)
class PruneResult:
    """A slim directory and how it came about."""

    path: Path
    plan: PrunePlan  # what it keeps of the model that was pruned, and why
    budget: Budget  # what was asked of that model
    achieved: dict[str, float | None]  # of what was asked for: ratio, parameters and so on; None is unknown
    text: str | None  # where the calibration text is from; None where its ids were given
    streamed: bool  # whether layers were read one at a time


@dataclass(frozen=True)
class _Model:
    """A model before a stage: where it lies, the hash of its weights, and the plan of the base that led to it."""

    path: Path
    weights: str
    plan: PrunePlan


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
        calibration: ids [sequences, tokens] int64, all of which score, or a text: a file, a data set id, or ``self``,
            which the model writes itself. None takes the text in ``SAAP_DATA``, else the samples that ship.
        words: those that the head keeps, or several such heads to choose from; None is as the model has.
        progress: called as (label, done, total).

    Raises:
        UserError: the requirement cannot be met, or the input does not fit.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("pruning runs in one process: start it without accelerate launch, which is for saap tune")
    output = Path(output)
    if isinstance(calibration, torch.Tensor) and options.effort == "quick":  # all of it scores
        options = replace(options, sequences=max(1, len(calibration)), refit_text=1)
    check_output(output, model, calibration, record=RECORD)
    source = resolve(model, progress=progress)
    if words is not None and options.effort != "quick":
        raise UserError("--effort chooses layers only: leave --vocabulary out, and trim what was pruned by it alone")
    budget = budget_of(source, options, words)
    if budget.one_width:
        options = replace(options, heads=False)
    stages = stages_of(budget, options)
    rows = calibration
    if rows is None and not options.reads_text:
        rows = NO_TEXT
    if not isinstance(rows, torch.Tensor | Rows):
        rows = calibration_rows(source, None if rows is None else str(rows), options, progress)
    ids, text = (rows, None) if isinstance(rows, torch.Tensor) else (rows.ids, rows)
    if options.effort != "quick":
        return _by_trials(model, source, options, output, text or Rows(ids, "given ids", None), progress)
    disk = prune_disk(budget.dense, weights_bytes(source), share_of(budget), len(stages))
    check_disk(Needs({}, disk), output, "pruning")
    with (
        fast_float32(), kept_memory(), claimed(output),
        out_of_memory("give --stream, fewer --sequences, a smaller --length, or --device cpu"),
    ):  # fmt: skip
        options = replace(
            options, device=str(device_of(options.device)),
            stream=streamed(source, budget, options, min(len(ids), options.rows), ids.shape[1]),
        )  # fmt: skip
        if options.stream:
            ids = ids[: options.sequences]
        now = _Model(source, weights_hash(source), PrunePlan(tuple(map(whole_layer, budget.dense.layers))))
        known = read_record(source).get("lineage")
        lineage = Lineage(base=str(model))
        if text:
            lineage["calibration"] = convert(text.lineage(), Calibration)
        lineage |= Lineage(base_sha256=now.weights, base_record=None if known is None else dict(known))
        told, heads = read_record(source).get("vocabulary"), () if isinstance(words, Chosen) else tuple(words or ())
        pruning = Pruning(options, budget, ids, lineage, len(stages), vocabulary=told, heads=heads)
        if isinstance(words, Chosen):
            pruning = pruning.saying(words)
        with kept_stages(output, now.weights, options, budget.record(), ids) as kept:
            done = 0
            if found := kept.last(len(stages)):  # of a run that was killed
                done, plan = found
                now = _Model(kept.path(done), weights_hash(kept.path(done)), plan)
            for number, stage in enumerate(stages[done:], done + 1):
                target = output if stage.last else kept.path(number)
                aside = kept.fresh("refitted") if options.stream else None
                report = _in_stage(progress, number, len(stages))
                pruning, plan = _prune_stage(pruning, stage, now, target, aside, report)
                if now.path.parent == kept.folder:
                    shutil.rmtree(now.path)
                now = _Model(target, "" if stage.last else weights_hash(target), plan)
    achieved = pruning.budget.report(shape_of(config := read_config(output)), config, now.plan)
    return PruneResult(output, now.plan, pruning.budget, achieved, text.source if text else None, bool(options.stream))


def calibration_rows(
    directory: Path, text: str | None, options: PruneOptions, progress: Progress | None = None
) -> Rows:
    """What is read of a text: for scores, more of it for the refit and for long windows where there is, and for trials.

    Raises UserError: no such text, or too little of it.
    """
    spare = trial_rows(options)

    def read(count: int) -> Rows:
        wanted = Sequences(count + spare, options.length, options.seed)
        return training_rows(directory, text, "calibration", wanted, progress)

    if text == SELF:
        return read(options.sequences)
    further = LONG_TEXT // options.length if options.method == "saap" and options.adaptive.measured else 0
    for count in (options.rows + further, options.rows):
        with suppress(TooLittleTextError):
            return read(count)
    return read(options.sequences if options.effort == "quick" else options.rows)


def _by_trials(
    model: str | Path, source: Path, options: PruneOptions, output: Path, rows: Rows, progress: Progress | None
) -> PruneResult:
    """As :func:`prune`, with a plan that tuning chose; the text has rows for that after those that score."""
    budget = budget_of(source, options)
    with claimed(output):
        if streamed(source, budget, options, options.rows, options.length):
            raise UserError(
                f"--effort {options.effort} tunes every plan, and the model does not fit into memory as a whole: "
                "leave it out"
            )

        def make(asked: PruneOptions, out: Path, scored: Rows, report: Progress | None) -> object:
            return prune(model, asked, output=out, calibration=scored, progress=report)

        choose_by_tuning(make, source, options, output, rows, progress)
    plan = plan_of(read_record(output)["plan"])
    return PruneResult(output, plan, budget, read_record(output)["plan"]["achieved"], rows.source, False)


def _prune_stage(
    pruning: Pruning, stage: Stage, now: _Model, target: Path, aside: Path | None, progress: Progress | None
) -> tuple[Pruning, PrunePlan]:
    """Choose, compensate (in files below ``aside`` or in memory), cut ``now`` into ``target``; the plan of the base.

    The pruning comes back with the words that the search chose.
    """
    config = read_config(now.path)
    shape = shape_of(config)
    report = progress or (lambda label, done, total: None)
    report(LOADING, 0, 0)
    model = _loaded(now.path, pruning.options)
    planned = stage.budget.cut
    cut = replace(shape, added_bias=planned.added_bias, vocab=planned.vocab, said=planned.said)
    stage = replace(stage, budget=replace(stage.budget, dense=shape, cut=cut))
    options = pruning.options
    if kept := options.keep_layers:  # by their places in the model now
        kept = frozenset(place for place, index in enumerate(now.plan.kept_layers) if index in kept)
        options = replace(options, keep_layers=kept)
    if options.method == "saap":
        plan = adaptive_plan(model, pruning.ids, stage.budget, options, weights=now.weights, progress=progress)
    else:
        plan = ranked_plan(model, pruning.ids[: options.sequences], stage.budget, options, progress)

    refitted = {} if aside is None else TensorFolder(aside, weights_dtype(now.path))
    if options.compensation == "bias" or plan.cut_layers(shape):  # other integers alone may meet the budget
        fitted = pruning.ids[: options.rows]
        refitted.update(compensate(options.compensation, model, plan, fitted, last=stage.last, progress=progress))
    del model

    if plan.words is not None and stage.last:
        chosen_words = pruning.heads[plan.words]
        own = pruning.budget.saying(pruning.budget.words[plan.words])
        pruning, cut = replace(pruning.saying(chosen_words), budget=own), pruning.budget.words[plan.words].of(cut)
    whole = replace(composed(now.plan, plan), reasons=after(now.plan.reasons, plan.reasons, now.plan.kept_layers))
    report(WRITING, 0, 0)
    names, read = tensor_reader(now.path)
    tensors = cut_tensors(names, read, plan, shape, architecture_of(config), refitted)
    chosen = pruning.words if stage.last else None
    written = (chosen.config if chosen else slim_config)(config, plan.kept_shape(cut), kept=plan.kept_layers)
    achieved = pruning.budget.report(shape_of(written), written, whole)
    write_trimmed(target, now.path, written, tensors, record_of(pruning, whole, achieved, config), chosen)
    return pruning, whole


def _loaded(path: Path, options: PruneOptions) -> PreTrainedModel:
    device = device_of(options.device)
    if options.stream:
        return load_streamed(path, device=device)
    return moved(load_model(path), device)


def _in_stage(progress: Progress | None, number: int, stages: int) -> Progress | None:
    """Progress whose labels name the stage."""
    if progress is None or stages == 1:
        return progress
    return lambda label, done, total: progress(f"{label}, stage {number} of {stages}", done, total)


def budget_of(model_dir: str | Path, options: PruneOptions, words: Chosen | Sequence[Chosen] | None = None) -> Budget:
    """The requirement on this model, before anything is scored; read and checked, nothing is written.

    ``words``: that stay, which counts in parameters, bytes and milliseconds, or several such heads to choose from.

    Raises:
        UserError: the model cannot be pruned, or no choice of options can meet the requirement.
    """
    options.check()
    config = read_config(model_dir)
    if config.get("slim_quant"):
        raise UserError(f"{model_dir} holds tuned integers, which cannot be pruned: prune the model it was tuned from")
    check_sizes(model_dir)
    shape = shape_of(config)
    if shape.per_layer and options.method == "shortgpt":
        raise UserError(f"{model_dir} has embeddings for each layer, so no layer goes: leave --method shortgpt out")
    if shape.sources and options.heads and options.method != "saap":
        raise UserError(
            f"{model_dir} has layers that read keys and values of earlier ones, so only saap prunes their heads: "
            "leave --heads out"
        )
    if options.heads and not shape.separable_heads:
        raise UserError(f"{model_dir} has a norm over all heads, so they are not pruned one by one: leave --heads out")
    wrong = sorted(i for i in options.kept_layers if not 0 <= i < len(shape.layers))
    if wrong:
        raise UserError(f"--keep-layers names layer {wrong[0]}; the model has layers 0 to {len(shape.layers) - 1}")
    cut = replace(shape, added_bias=True) if options.compensation == "bias" else shape
    budget = replace(budget_for(options, shape, config, cut=cut), one_width=_one_width(options, config))
    if isinstance(words, Chosen):
        budget = budget.saying(words.option)
    elif words:
        budget = replace(budget, words=tuple(each.option for each in words))
    if options.method == "saap":
        check_floor(shape, budget, options)
    return budget


def _one_width(options: PruneOptions, config: Mapping[str, object]) -> bool:
    """Whether the engine that is planned for wants one FFN width for all layers, and all else as it is.

    Raises UserError: it does not hold the family, or options ask for something else.
    """
    if options.engine == "any":
        return False
    holds = architecture_of(dict(config)).gguf
    if holds == "no":
        raise UserError(f"no GGUF file is written of {config['model_type']} models: leave --for {options.engine} out")
    if holds == "any widths":
        return False
    asked = {"--heads": options.heads, "--keep-layers": options.kept_layers, "--method": options.method != "saap",
             "--compensate bias": options.compensation == "bias"}  # fmt: skip
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
