"""Pruning, start to end: choose what to keep, by SAAP or a baseline, make up for what goes, cut, write."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from devices.common.progress import Progress
from saap.models.architectures import architecture_of, shape_of
from saap.models.checkpoint import load_model, read_config, read_record, slim_config
from saap.models.checkpoint import write_slim as write
from saap.models.shape import ModelShape
from saap.models.streaming import load_streamed
from saap.models.weight_files import TensorFolder, tensor_reader, weights_bytes, weights_dtype, weights_hash
from saap.prune.baselines.methods import rank
from saap.prune.cut.refit import compensate
from saap.prune.cut.surgery import cut_tensors
from saap.prune.kept_stages import agreed, kept_steps
from saap.prune.needs import prune_disk, prune_needs
from saap.prune.options import TAYLOR, Compensation, PruneOptions
from saap.prune.plan import PrunePlan, composed, whole_layer
from saap.prune.record import record_of
from saap.prune.search.adaptive import adaptive_plan
from saap.prune.search.budget import Budget, budget_for
from saap.prune.search.explain import after, sizes_lost
from saap.prune.search.milp import meet
from saap.prune.shares import joined, shares
from saap.prune.stages import Stage, check_reachable, layers_plan, share_of, stages_of
from saap.system.allocator import kept_memory
from saap.system.errors import UserError
from saap.system.gpu import device_of, fits_device, out_of_memory
from saap.system.needs import Needs, check_disk, check_memory, fits
from saap.system.outputs import check_output, claimed
from saap.system.precision import fast_float32


@fast_float32()
@kept_memory()
def prune(
    model_dir: str | Path,
    out: str | Path,
    calibration: torch.Tensor,
    options: PruneOptions,
    *,
    lineage: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> PrunePlan:
    """Prune a model directory into a slim directory.

    Args:
        calibration: [sequences, tokens] int64.
        lineage: what to record about the base model and the text, beside what is found here.

    Raises:
        UserError: the requirement cannot be met, or the input does not fit.
    """
    check_output(out)
    budget = budget_of(model_dir, options)
    lineage = dict(lineage or {})
    source = Path(model_dir)
    disk = prune_disk(budget.dense, weights_bytes(source), share_of(budget), len(stages_of(budget, options)))
    check_disk(Needs({}, disk), Path(out), "pruning")
    with joined() as together, claimed(out) if together.main else nullcontext(), out_of_memory():
        stream = together.agreed(streamed(source, budget, options, *calibration.shape))
        options = replace(options, stream=stream)
        if together.count > 1:
            calibration = together.tensors(0, {"ids": calibration})["ids"]
        return _prune_in_steps(source, Path(out), calibration, options, budget, lineage, progress)


def _prune_in_steps(
    source: Path,
    out: Path,
    calibration: torch.Tensor,
    options: PruneOptions,
    budget: Budget,
    lineage: dict[str, Any],
    progress: Progress | None,
) -> PrunePlan:
    """:func:`prune` where nothing stands in its way; the main process writes, the others read what it wrote."""
    stages = stages_of(budget, options)
    steps = len(stages)
    plan = PrunePlan(tuple(whole_layer(sizes) for sizes in budget.dense.layers))
    weights = weights_hash(source)
    lineage |= {"base_sha256": weights, "base_record": read_record(source).get("lineage")}
    together = shares()
    with kept_steps(out, weights, options, budget.record(), calibration, owner=together.main) as kept:
        together.wait()
        done = 0
        if found := kept.last(steps):  # of a run that was killed
            done, plan = found
            source, weights = kept.path(done), weights_hash(kept.path(done))
        for step in range(done + 1, steps + 1):
            say = _in_step(progress, step, steps)
            target = out if step == steps else kept.path(step)
            aside = None
            if options.stream and together.main:
                aside = TensorFolder(_fresh(kept.folder / "refitted"), weights_dtype(source))
            stage = stages[step - 1]
            plan = _prune_once(source, weights, target, plan, stage, calibration, options, lineage, say, aside, steps)
            together.wait()
            if source.parent == kept.folder and together.main:
                shutil.rmtree(source)
            if step < steps:
                source, weights = target, weights_hash(target)
    return plan


def streamed(model_dir: str | Path, budget: Budget, options: PruneOptions, sequences: int, tokens: int) -> bool:
    """Whether the layers stay in their files: as asked, or where the whole model does not fit into memory.

    Raises:
        UserError: not even a layer at a time fits, or the method needs the whole model.
    """
    element = options.adaptive.element if options.method == "saap" else "none"
    whole, single = (
        prune_needs(budget.dense, sequences, tokens, weights_bytes(model_dir), streamed=by_layer, element=element)
        for by_layer in (False, True)
    )
    if options.stream is False or (options.stream is None and fits(whole) and fits_device(whole, options.device)):
        check_memory(whole, "pruning", "leave --no-stream out, so that layers are read one at a time")
        return False
    if options.method in TAYLOR:
        check_memory(whole, "pruning", f"{options.method} needs the whole model: use saap, or a larger machine")
    check_memory(single, "pruning", "give fewer --sequences or a smaller --length")
    return True


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def _prune_once(
    source: Path,
    weights: str,
    out: Path,
    before: PrunePlan,
    stage: Stage,
    calibration: torch.Tensor,
    options: PruneOptions,
    lineage: dict[str, Any],
    progress: Progress | None,
    refitted: TensorFolder | None,
    steps: int,
) -> PrunePlan:
    """Prune ``source``, which is the base cut by the plan ``before``, into ``out``: the plan of the base for both."""
    budget = stage.budget
    config = read_config(source)
    shape = shape_of(config)
    device = device_of(options.device)
    model = load_streamed(source, device=device) if options.stream else load_model(source)
    if not options.stream:
        torch.nn.Module.to(model, device)
    kept = options.keep_layers
    if kept:
        kept = frozenset(place for place, index in enumerate(before.kept_layers) if index in kept)
    cut = replace(shape, added_bias=budget.cut.added_bias)
    left = replace(budget, dense=shape, cut=cut)
    if stage.layers:
        keep = kept or frozenset()
        plan = layers_plan(model, shape, calibration, stage.layers, left, keep_layers=keep, progress=progress)
    else:
        here = replace(options, keep_layers=kept)
        plan = make_plan(model, shape, calibration, here, left, weights=weights, progress=progress)
    plan = agreed(plan)
    kind: Compensation = "none" if stage.layers else options.compensation  # nothing of a layer stays to make up for it
    replaced = compensate(kind, model, shape, plan, calibration, last=stage.last, into=refitted, progress=progress)
    del model
    whole = composed(before, plan)
    if not shares().main:
        return whole
    names, read = tensor_reader(source)
    tensors = cut_tensors(names, read, plan, shape, architecture_of(config), replaced)
    written = slim_config(config, plan.kept_shape(cut), kept=plan.kept_layers)
    requirement = {**budget.record(), "planned": budget.report(whole.kept_shape(budget.cut))}
    reasons = after(before.reasons, plan.reasons, before.kept_layers)
    whole = replace(whole, requirement=requirement, reasons=reasons)
    achieved = budget.report(shape_of(written), written)
    record = record_of(whole, achieved, options, budget, calibration, lineage, steps)
    write(out, source, written, tensors, record)
    return whole


def _in_step(progress: Progress | None, step: int, steps: int) -> Progress | None:
    """Progress whose labels name the step."""
    if progress is None or steps == 1:
        return progress
    return lambda label, done, total: progress(f"{label}, step {step} of {steps}", done, total)


def budget_of(model_dir: str | Path, options: PruneOptions) -> Budget:
    """The requirement on this model, before anything is scored; read and checked, nothing is written.

    Raises:
        UserError: the model cannot be pruned, or no choice of options can meet the requirement.
    """
    options.check()
    config = read_config(model_dir)
    if config.get("slim_quant"):
        raise UserError(f"{model_dir} holds tuned integers, which cannot be pruned: prune the model it was tuned from")
    shape = shape_of(config)
    if options.heads and not shape.separable_heads:
        raise UserError(f"{model_dir} has a norm over all heads, so they are not pruned one by one: leave --heads out")
    _check_layers(options.kept_layers, shape)
    cut = replace(shape, added_bias=True) if options.compensation == "bias" else shape
    budget = budget_for(options, shape, config, cut=cut)
    if options.method == "saap":
        check_reachable(budget, options)
        stages_of(budget, options)
    return budget


def make_plan(
    model: PreTrainedModel,
    shape: ModelShape,
    calibration: torch.Tensor,
    options: PruneOptions,
    budget: Budget,
    *,
    weights: str | None = None,
    progress: Progress | None = None,
) -> PrunePlan:
    """Choose what to keep of ``model``, which is left as it was; nothing is written.

    Args:
        weights: hash of the model's weights, under which scores are kept; None keeps none.

    Raises:
        UserError: the requirement cannot be met, or the model is not finite on the text.
    """
    if options.method == "saap":
        return adaptive_plan(model, calibration, budget, options, weights=weights, progress=progress)
    ranking = rank(
        options.method, model, shape, calibration, keep_layers=options.keep_layers, heads=options.prunes_heads(shape),
        block=options.group_size, seed=options.seed, progress=progress,
    )  # fmt: skip
    plan = meet(ranking.plan_at, budget, budget.cut)
    return replace(plan, reasons=sizes_lost(plan, budget))


def _check_layers(keep: frozenset[int], shape: ModelShape) -> None:
    wrong = sorted(i for i in keep if not 0 <= i < len(shape.layers))
    if wrong:
        raise UserError(f"--keep-layers names layer {wrong[0]}; the model has layers 0 to {len(shape.layers) - 1}")
