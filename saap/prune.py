"""Pruning, start to end: choose what to keep, by SAAP or a baseline, make up for what goes, cut, write."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from saap.adaptive import AdaptiveOptions, adaptive_plan
from saap.architectures import architecture_of, shape_of
from saap.baselines import BASELINES, rank
from saap.budget import Budget
from saap.checkpoint import check_output, load_model, read_config, read_record, slim_config, tensor_reader, weights_hash
from saap.checkpoint import write_slim as write
from saap.compensate import COMPENSATIONS, Compensation, compensate
from saap.errors import SaapError
from saap.importance import Progress
from saap.requirement import Requirement
from saap.search import check_floor, meet
from saap.structures import ModelShape, PrunePlan
from saap.surgery import cut_tensors

METHODS = ("saap", *BASELINES)


@dataclass(frozen=True)
class PruneOptions:
    """How to prune.

    Attributes:
        requirement: what the slim model must meet.
        method: ``saap`` or one of :data:`saap.baselines.BASELINES`.
        compensate: how what stays makes up for what goes; None is the method's own: a refit for saap, a bias for flap.
        heads: whether attention loses heads or KV groups; None lets saap weigh it, and baselines where every query head
            has its own KV head: whole groups are dear.
        block: the quantisation group that every width must be a multiple of.
        adaptive: how saap chooses.
        keep_layers: layers that stay whole.
        seed: of the method ``random``.
    """

    requirement: Requirement
    method: str = "saap"
    compensate: Compensation | None = None
    heads: bool | None = None
    block: int = 32
    adaptive: AdaptiveOptions = field(default_factory=AdaptiveOptions)
    keep_layers: frozenset[int] = frozenset()
    seed: int = 0

    @property
    def compensation(self) -> Compensation:
        """The kind that is used."""
        own: dict[str, Compensation] = {"saap": "refit", "flap": "bias"}
        return self.compensate or own.get(self.method, "none")

    def prunes_heads(self, shape: ModelShape) -> bool:
        """Whether attention loses heads or KV groups in a model of this shape."""
        if self.heads is not None:
            return self.heads
        return self.method == "saap" or all(layer.heads_per_group <= 1 for layer in shape.layers)

    def check(self) -> None:
        """Raise SaapError for names that are not known and numbers that are not allowed."""
        self.requirement.check()
        self.adaptive.check()
        if self.method not in METHODS:
            raise SaapError(f"method {self.method!r} is not known; known: {', '.join(METHODS)}")
        if self.compensation not in COMPENSATIONS:
            raise SaapError(f"compensation {self.compensate!r} is not known; known: {', '.join(COMPENSATIONS)}")


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
        SaapError: the requirement cannot be met, or the input does not fit.
    """
    check_output(out)
    budget = budget_of(model_dir, options)
    config, shape = read_config(model_dir), budget.dense
    model, weights = load_model(model_dir), weights_hash(model_dir)
    plan = make_plan(model, shape, calibration, options, budget, weights=weights, progress=progress)
    replaced = compensate(options.compensation, model, shape, plan, calibration, progress=progress)
    del model
    names, read = tensor_reader(model_dir)
    tensors = cut_tensors(names, read, plan, shape, architecture_of(config), replaced)
    written = slim_config(config, plan.kept_shape(budget.cut), kept=plan.kept_layers)
    achieved = budget.report(shape_of(written), written)
    record = _record(Path(model_dir), weights, shape, plan, achieved, options, calibration, dict(lineage or {}))
    write(out, model_dir, written, tensors, record)
    return plan


def budget_of(model_dir: str | Path, options: PruneOptions) -> Budget:
    """The requirement on this model, before anything is scored; read and checked, nothing is written.

    Raises:
        SaapError: the model cannot be pruned, or no choice of options can meet the requirement.
    """
    options.check()
    config = read_config(model_dir)
    if config.get("slim_quant"):
        raise SaapError(f"{model_dir} holds tuned integers, which cannot be pruned: prune the model it was tuned from")
    shape = shape_of(config)
    _check_layers(options.keep_layers, shape)
    cut = replace(shape, added_bias=True) if options.compensation == "bias" else shape
    budget = options.requirement.budget(shape, config, cut=cut)
    if options.method == "saap":
        check_floor(
            shape, options.block, options.keep_layers, options.adaptive.modules, budget, options.prunes_heads(shape)
        )
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
        SaapError: the requirement cannot be met, or the model is not finite on the text.
    """
    heads = options.prunes_heads(shape)
    if options.method == "saap":
        plan = adaptive_plan(
            model, shape, calibration, budget, replace(options.adaptive, heads=heads), block=options.block,
            keep_layers=options.keep_layers, weights=weights, progress=progress,
        )  # fmt: skip
    else:
        ranking = rank(
            options.method, model, shape, calibration, keep_layers=options.keep_layers, heads=heads,
            block=options.block, seed=options.seed, progress=progress,
        )  # fmt: skip
        plan = meet(ranking.plan_at, budget, budget.cut)
    requirement: dict[str, Any] = {**budget.record(), "planned": budget.report(plan.kept_shape(budget.cut))}
    return replace(plan, requirement=requirement)


def _check_layers(keep: frozenset[int], shape: ModelShape) -> None:
    wrong = sorted(i for i in keep if not 0 <= i < len(shape.layers))
    if wrong:
        raise SaapError(f"--keep-layers names layer {wrong[0]}; the model has layers 0 to {len(shape.layers) - 1}")


def _record(
    model_dir: Path,
    weights: str,
    shape: ModelShape,
    plan: PrunePlan,
    achieved: dict[str, float | None],
    options: PruneOptions,
    calibration: torch.Tensor,
    lineage: dict[str, Any],
) -> dict[str, Any]:
    import transformers

    from saap import __version__

    return {
        "method": options.method,
        "plan": {
            **plan.requirement,
            "achieved": achieved,
            "price_nats": plan.price,
            "dense_layers": [asdict(sizes) for sizes in shape.layers],
            "layers": [asdict(layer) for layer in plan.layers],
        },
        "options": {
            "block": options.block,
            "compensate": options.compensation,
            "heads": options.prunes_heads(shape),
            "keep_layers": sorted(options.keep_layers),
            "seed": options.seed,
            **({"adaptive": asdict(options.adaptive)} if options.method == "saap" else {}),
        },
        "lineage": {
            **lineage,
            "base_sha256": weights,
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
