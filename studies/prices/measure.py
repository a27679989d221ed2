"""Prices of random options of all types, and the losses that they are to predict."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from saap.models.architectures import shape_of
from saap.models.shape import LayerSizes, ModelShape
from saap.prune.options import PruneOptions
from saap.prune.plan import LayerPlan, PrunePlan, whole_layer
from saap.prune.scores.fusion import fuse
from saap.prune.scores.scoring import scores_of
from saap.prune.search.adaptive import divided
from saap.prune.search.budget import Budget
from saap.prune.search.masking import WorkingPoint
from saap.prune.search.milp import Block, Found, Option, Prices, blocks_of, search
from saap.prune.search.prices import Losses, correct_prices, fit_prices

OPTIONS, DRAW = 40, 7
PLACES = ("alone", "planned")  # where an option is measured


def kind_of(module: Block, option: Option, sizes: LayerSizes) -> str | None:
    """The type of an option; None where it leaves the module whole."""
    keep = option.keep.sizes
    if module.kind == "ffn":
        return None if keep.ffn == sizes.ffn else "FFN width" if keep.ffn else "no FFN"
    if not keep.query_heads:
        return "no attention"
    if keep.kv_heads < sizes.kv_heads:
        return "KV groups"
    return "query heads" if keep.query_heads < sizes.query_heads else None


def draw(modules: Sequence[Block], shape: ModelShape, count: int, seed: int) -> list[tuple[str, Block, Option]]:
    """Random options, as many of each type, and of each type as many from each part of the depth."""
    by_kind: dict[str, list[tuple[str, Block, Option]]] = {}
    for module in modules:
        for option in module.options:
            if kind := kind_of(module, option, shape.layers[module.layer]):
                by_kind.setdefault(kind, []).append((kind, module, option))
    random = np.random.default_rng(seed)
    drawn = []
    for place, kind in enumerate(sorted(by_kind)):
        found = by_kind[kind]  # in the order of the layers
        wanted = count // len(by_kind) + (place < count % len(by_kind))
        strata = np.array_split(np.arange(len(found)), min(wanted, len(found)))
        drawn += [found[int(random.choice(stratum))] for stratum in strata]
    return drawn


def with_module(layer: LayerPlan, kind: str, keep: LayerPlan) -> LayerPlan:
    """A layer with one of its modules as ``keep`` has it."""
    if kind == "ffn":
        return replace(layer, ffn=keep.ffn)
    return replace(layer, query_heads=keep.query_heads, kv_heads=keep.kv_heads)


def increases(
    model: PreTrainedModel,
    shape: ModelShape,
    plan: PrunePlan,
    drawn: Sequence[tuple[str, Block, Option]],
    ids: torch.Tensor,
) -> list[float]:
    """What each option adds to the loss where all other modules are as planned, nats per token.

    Counted from the module as a whole, also where the plan cuts it.
    """
    whole: dict[tuple[int, str], float] = {}
    found = []
    with WorkingPoint(model, shape, plan.cut_layers(shape), ids).entered() as here:
        for _, module, option in drawn:
            layer, kind = module.layer, module.kind
            now = plan.layers[layer]
            unpruned = with_module(now, kind, whole_layer(shape.layers[layer]))
            if (layer, kind) not in whole:
                whole[layer, kind] = here.loss if unpruned == now else here.loss_with(layer, unpruned)
            found.append(here.loss_with(layer, with_module(now, kind, option.keep)) - whole[layer, kind])
    return found


def one_stage_plan(losses: Losses, prices: Prices, budget: Budget, options: PruneOptions) -> tuple[Prices, PrunePlan]:
    """The plan that meets the budget, and the prices after the corrections that were asked for.

    Whole blocks go only where ``--modules`` was given, as in `saap prune`; their prices are corrected all the same.
    """
    nothing: dict[str, list[float | None]] = {kind: [None] * len(each) for kind, each in prices.gone.items()}

    def searched(prices: Prices) -> Found:
        allowed = prices if options.modules else replace(prices, gone=nothing)
        return search(allowed, budget, options)

    found = searched(prices)
    for _ in range(options.adaptive.corrections):
        prices, _ = correct_prices(losses, prices, found)
        found = searched(prices)
    return prices, found.plan


def spearman(prices: Sequence[float], losses: Sequence[float]) -> float | None:
    """Spearman's rank correlation; None where one side is constant."""
    (value,) = _spearman(np.asarray(prices)[None], np.asarray(losses)[None])
    return None if np.isnan(value) else float(value)


def rank_correlation(prices: Sequence[float], losses: Sequence[float], resamples: int = 2000) -> dict[str, Any]:
    """Spearman's rank correlation with a 95 % percentile bootstrap interval over the options."""
    picks = np.random.default_rng(0).integers(len(prices), size=(resamples, len(prices)))
    drawn = _spearman(np.asarray(prices)[picks], np.asarray(losses)[picks])
    drawn = drawn[~np.isnan(drawn)]
    low, high = np.percentile(drawn, [2.5, 97.5]).tolist() if len(drawn) else (None, None)
    return {"rho": spearman(prices, losses), "low": low, "high": high}


def _spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson's correlation of the ranks of each row, [rows, values]; NaN where a side is constant."""
    from scipy.stats import rankdata

    a, b = (rankdata(side, axis=1) for side in (x, y))  # ties share their mean rank
    a, b = (ranks - ranks.mean(1, keepdims=True) for ranks in (a, b))
    norm = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    return np.divide((a * b).sum(1), norm, out=np.full(len(x), np.nan), where=norm > 0)


def judged(
    model: PreTrainedModel, calibration: torch.Tensor, held: torch.Tensor, options: PruneOptions, budget: Budget,
    weights: str | None, count: int = OPTIONS, seed: int = DRAW,
) -> dict[str, Any]:  # fmt: skip
    """Price, draw, measure: all points and their correlations.

    Args:
        calibration: [sequences, tokens]; scores and prices, as `saap prune` splits it.
        held: [sequences, tokens] of other text, on which the losses are measured.
        weights: the hash under which scores are kept; None keeps none.
    """
    shape = shape_of(model.config)
    all_blocks = replace(options, modules=True)
    scored, priced = divided(calibration)
    scores = scores_of(model, shape, scored, options.adaptive, weights=weights)
    losses = Losses(model, scored, priced, all_blocks, weights=weights)
    prices = fit_prices(losses, fuse(scores, shape, options.adaptive.fusion), all_blocks)
    prices, plan = one_stage_plan(losses, prices, budget, options)
    drawn = draw(blocks_of(shape, prices, budget, options), shape, count, seed)
    dense = PrunePlan(tuple(whole_layer(sizes) for sizes in shape.layers))
    measured = [increases(model, shape, at, drawn, held) for at in (dense, plan)]
    points = [
        {"layer": module.layer, "type": kind, "keep": sizes_of(option.keep), "price": option.price, "alone": alone,
         "planned": planned, "plan_keeps": sizes_of(plan.layers[module.layer])}
        for (kind, module, option), alone, planned in zip(drawn, *measured, strict=True)
    ]  # fmt: skip
    return {"draw": seed, "rows": list(held.shape), "correlation": correlations(points), "points": points}


def correlations(points: list[dict[str, Any]]) -> dict[str, Any]:
    """Over all points, and over those of each type, where a measured loss over its price has a median too."""
    found: dict[str, Any] = {}
    for where in PLACES:
        found[where] = rank_correlation(*([p[name] for p in points] for name in ("price", where)))
        for kind in sorted({p["type"] for p in points}):
            some = [p for p in points if p["type"] == kind]
            ratios = [p[where] / p["price"] for p in some if p["price"] > 0]
            found[where].setdefault("types", {})[kind] = {
                "options": len(some),
                "rho": spearman([p["price"] for p in some], [p[where] for p in some]),
                "measured_over_price": statistics.median(ratios) if ratios else None,
            }
    return found


def sizes_of(keep: LayerPlan) -> list[int]:
    """Query heads, KV heads, FFN width."""
    return [len(keep.query_heads), len(keep.kv_heads), len(keep.ffn)]
