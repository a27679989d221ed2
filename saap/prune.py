"""SAAP, start to end: discover, estimate, fuse, price, search, cut (arXiv 2412.15127, and what is ours)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from saap.architectures import architecture_of, require_llama, shape_of
from saap.checkpoint import check_output, load_model, read_config, read_record, slim_config, tensor_reader, weights_hash
from saap.checkpoint import write_slim as write
from saap.errors import SaapError
from saap.fusion import fuse
from saap.importance import Progress, estimate
from saap.pricing import fit_prices
from saap.search import modules_of, plan_from, solve
from saap.structures import ModelShape, PrunePlan
from saap.surgery import cut_tensors

PRICING_SHARE = 8  # one eighth of the calibration sequences prices what the others scored


@dataclass(frozen=True)
class Requirement:
    """What the slim model must meet: exactly one of the two.

    Attributes:
        ratio: share of the decoder layers' weights to remove, between 0 and 1.
        max_params: most parameters of the whole model, embedding included.
    """

    ratio: float | None = None
    max_params: int | None = None

    def check(self) -> None:
        """Raise SaapError for a requirement that is none, two, or out of range."""
        if (self.ratio is None) == (self.max_params is None):
            raise SaapError("give one requirement: --ratio or --max-params")
        if self.ratio is not None and not (math.isfinite(self.ratio) and 0 < self.ratio < 1):
            raise SaapError(f"ratio {self.ratio} is not allowed: give a share between 0 and 1, such as 0.2")
        if self.max_params is not None and self.max_params <= 0:
            raise SaapError(f"max-params {self.max_params} is not allowed: give a positive number of parameters")

    def budget(self, dense: ModelShape) -> float:
        """The most weights that the decoder layers may keep."""
        if self.ratio is not None:
            return (1 - self.ratio) * dense.layer_weights
        assert self.max_params is not None
        if self.max_params >= dense.parameters:
            raise SaapError(f"the model has {dense.parameters:,} parameters already, which meets {self.max_params:,}")
        return self.max_params - (dense.parameters - dense.layer_weights)


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
    options.requirement.check()
    check_output(out)
    config = read_config(model_dir)
    require_llama(config, "pruning")
    if config.get("slim_quant"):
        raise SaapError(f"{model_dir} holds tuned integers, which cannot be pruned: prune the model it was tuned from")
    shape = shape_of(config)
    _check_layers(options.keep_layers, shape)
    budget = options.requirement.budget(shape)
    plan = make_plan(model_dir, shape, calibration, options, budget, progress)
    names, read = tensor_reader(model_dir)
    tensors = cut_tensors(names, read, plan, shape, architecture_of(config))
    record = _record(Path(model_dir), shape, plan, options, calibration, dict(lineage or {}))
    write(out, model_dir, slim_config(config, plan.kept_shape(shape)), tensors, record)
    return plan


def make_plan(
    model_dir: str | Path,
    shape: ModelShape,
    calibration: torch.Tensor,
    options: PruneOptions,
    budget: float,
    progress: Progress | None = None,
) -> PrunePlan:
    """Score, price and search; nothing is written."""
    held = max(1, len(calibration) // PRICING_SHARE)
    if len(calibration) < 2:
        raise SaapError("pruning needs at least 2 calibration sequences: one to score on, one to price on")
    model = load_model(model_dir)
    scores = estimate(model, shape, calibration[:-held], c=options.c, progress=progress)
    prices = fit_prices(
        model, shape, fuse(scores), calibration[-held:], keep_layers=options.keep_layers, modules=options.modules,
        progress=progress,
    )  # fmt: skip
    modules = modules_of(shape, prices, options.block, options.keep_layers)
    plan = plan_from(modules, solve(modules, budget, "weights"), shape)
    planned = plan.kept_shape(shape)
    asked = {k: v for k, v in asdict(options.requirement).items() if v is not None}
    requirement = {
        "asked": asked,
        "planned": {"ratio": removed_share(shape, planned), "max_params": planned.parameters},
    }
    return replace(plan, requirement=requirement)


def removed_share(dense: ModelShape, slim: ModelShape) -> float:
    """Share of the decoder layers' weights that is gone."""
    return 1 - slim.layer_weights / dense.layer_weights


def _check_layers(keep: frozenset[int], shape: ModelShape) -> None:
    wrong = sorted(i for i in keep if not 0 <= i < len(shape.layers))
    if wrong:
        raise SaapError(f"--keep-layers names layer {wrong[0]}; the model has layers 0 to {len(shape.layers) - 1}")


def _record(
    model_dir: Path,
    shape: ModelShape,
    plan: PrunePlan,
    options: PruneOptions,
    calibration: torch.Tensor,
    lineage: dict[str, Any],
) -> dict[str, Any]:
    import hashlib

    import transformers

    from saap import __version__

    kept = plan.kept_shape(shape)
    return {
        "method": "saap",
        "plan": {
            **plan.requirement,
            "achieved": {
                "ratio": removed_share(shape, kept),
                "ratio_of_all": 1 - kept.parameters / shape.parameters,
                "parameters": kept.parameters,
                "dense_parameters": shape.parameters,
            },
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
