"""SAAP, start to end: discover, estimate, fuse, price, search, cut (arXiv 2412.15127, and what is ours)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from saap.architectures import architecture_of, shape_of
from saap.budget import Budget
from saap.checkpoint import check_output, load_model, read_config, read_record, slim_config, tensor_reader, weights_hash
from saap.checkpoint import write_slim as write
from saap.errors import SaapError
from saap.fusion import fuse
from saap.importance import Progress, estimate
from saap.pricing import fit_prices
from saap.requirement import Requirement
from saap.search import check_floor, modules_of, plan_from, solve
from saap.structures import ModelShape, PrunePlan
from saap.surgery import cut_tensors

PRICING_SHARE = 8  # one eighth of the calibration sequences prices what the others scored


@dataclass(frozen=True)
class PruneOptions:
    """How to prune. ``block`` is the quantisation group that every width must be a multiple of."""

    requirement: Requirement
    block: int = 32
    c: float | None = None
    keep_layers: frozenset[int] = frozenset()
    modules: bool = False
    seed: int = 0


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
        calibration: [sequences, tokens] int64; the last eighth prices what the others scored.
        lineage: what to record about the base model and the text, beside what is found here.

    Raises:
        SaapError: the requirement cannot be met, or the input does not fit.
    """
    check_output(out)
    budget = budget_of(model_dir, options)
    config, shape = read_config(model_dir), budget.dense
    plan = make_plan(model_dir, shape, calibration, options, budget, progress)
    names, read = tensor_reader(model_dir)
    tensors = cut_tensors(names, read, plan, shape, architecture_of(config))
    written = slim_config(config, plan.kept_shape(shape), kept=plan.kept_layers)
    achieved = budget.report(shape_of(written), written)
    record = _record(Path(model_dir), shape, plan, achieved, options, calibration, dict(lineage or {}))
    write(out, model_dir, written, tensors, record)
    return plan


def budget_of(model_dir: str | Path, options: PruneOptions) -> Budget:
    """The requirement on this model, before anything is scored; read and checked, nothing is written.

    Raises:
        SaapError: the model cannot be pruned, or no choice of options can meet the requirement.
    """
    options.requirement.check()
    config = read_config(model_dir)
    if config.get("slim_quant"):
        raise SaapError(f"{model_dir} holds tuned integers, which cannot be pruned: prune the model it was tuned from")
    shape = shape_of(config)
    _check_layers(options.keep_layers, shape)
    budget = options.requirement.budget(shape, config)
    check_floor(shape, options.block, options.keep_layers, options.modules, budget)
    return budget


def make_plan(
    model_dir: str | Path,
    shape: ModelShape,
    calibration: torch.Tensor,
    options: PruneOptions,
    budget: Budget,
    progress: Progress | None = None,
) -> PrunePlan:
    """Score, price and search; nothing is written."""
    held = max(1, len(calibration) // PRICING_SHARE)
    if len(calibration) < 2:
        raise SaapError("pruning needs at least 2 calibration sequences: one to score on, one to price on")
    model = load_model(model_dir)
    scores = estimate(model, shape, calibration[:-held], c=options.c, progress=progress)
    prices = fit_prices(
        model, shape, fuse(scores, shape), calibration[-held:], keep_layers=options.keep_layers,
        modules=options.modules, progress=progress,
    )  # fmt: skip
    modules = modules_of(shape, prices, options.block, options.keep_layers, budget)
    plan = plan_from(modules, solve(modules, budget), shape)
    requirement: dict[str, Any] = {**budget.record(), "planned": budget.report(plan.kept_shape(budget.cut))}
    return replace(plan, requirement=requirement)


def _check_layers(keep: frozenset[int], shape: ModelShape) -> None:
    wrong = sorted(i for i in keep if not 0 <= i < len(shape.layers))
    if wrong:
        raise SaapError(f"--keep-layers names layer {wrong[0]}; the model has layers 0 to {len(shape.layers) - 1}")


def _record(
    model_dir: Path,
    shape: ModelShape,
    plan: PrunePlan,
    achieved: dict[str, float | None],
    options: PruneOptions,
    calibration: torch.Tensor,
    lineage: dict[str, Any],
) -> dict[str, Any]:
    import hashlib

    import transformers

    from saap import __version__

    return {
        "method": "saap",
        "plan": {
            **plan.requirement,
            "achieved": achieved,
            "price_nats": plan.price,
            "dense_layers": [asdict(sizes) for sizes in shape.layers],
            "layers": [asdict(layer) for layer in plan.layers],
        },
        "options": {
            "block": options.block,
            "c": options.c,
            "keep_layers": sorted(options.keep_layers),
            "modules": options.modules,
            "seed": options.seed,
        },
        "lineage": {
            **lineage,
            "base_sha256": weights_hash(model_dir),
            "base_record": read_record(model_dir).get("lineage"),
            "calibration": {
                "sequences": len(calibration),
                "tokens": calibration.shape[1],
                "sha256": hashlib.sha256(calibration.numpy().tobytes()).hexdigest(),
                **lineage.get("calibration", {}),
            },
            "versions": {"saap": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        },
    }
