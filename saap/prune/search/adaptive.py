"""SAAP's plan: estimate, fuse, price, search, and look again (arXiv 2412.15127, and what is ours).

Prices of structures that go one at a time say little about what they cost together. So prices can be corrected: each
module's price is scaled to a loss measured where all others are cut as planned, and the search is repeated; the plan
with the least measured loss is kept. And a plan that cuts attention has to be measured better than the best one that
does not. Pruning in steps, each with scores of its own, is :mod:`saap.prune.pruning`'s.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from devices.common.progress import Progress
from saap.models.shape import ModelShape
from saap.prune.cut.refit import losses_compensated
from saap.prune.options import PruneOptions
from saap.prune.plan import LayerPlan, PrunePlan, Weighed, whole_layer
from saap.prune.scores.cache import KnownLosses
from saap.prune.scores.fusion import fuse
from saap.prune.scores.scoring import scores_of
from saap.prune.search.budget import Budget
from saap.prune.search.explain import reasons_of
from saap.prune.search.masking import masked, mean_nll
from saap.prune.search.milp import Module, Option, Prices, modules_of, plan_from, solve
from saap.prune.search.prices import correct_prices, finite, fit_prices
from saap.system.errors import UserError

PRICING_SHARE = 8  # one eighth of the calibration sequences prices what the others scored


def adaptive_plan(
    model: PreTrainedModel,
    calibration: torch.Tensor,
    budget: Budget,
    options: PruneOptions,
    *,
    weights: str | None = None,
    progress: Progress | None = None,
) -> PrunePlan:
    """Choose what to keep; the model is left as it was.

    A structure of attention is a large step at a price that is fitted to all of its kind, so that the search finds
    those whose price is too low. With ``options.heads`` None a plan that cuts attention is held against the best one
    that leaves it whole, and stays if it is better by more than two standard errors (after the one-standard-error rule
    of Breiman et al., Classification and Regression Trees, 1984, section 3.4.3).

    Args:
        calibration: [sequences, tokens] int64; the last eighth prices what the others scored.
        weights: hash of the model's weights, under which scores are kept; None keeps none.

    Raises:
        UserError: too little text, a loss that is not finite, or a budget that cannot be met.
    """
    shape, compensation = budget.dense, options.compensation
    prices, priced = prices_of(model, shape, calibration, options, weights=weights, progress=progress)
    modules, chosen, plan = _search(prices, options, budget)
    best, least = plan, float("inf")
    for _ in range(options.adaptive.corrections):
        prices, loss = correct_prices(model, shape, prices, modules, chosen, plan, priced, progress=progress)
        best, least = (plan, loss) if loss < least else (best, least)
        modules, chosen, plan = _search(prices, options, budget)
    if options.adaptive.corrections:
        with masked(model, cut_layers(plan, shape), shape.head_dim):
            plan = plan if mean_nll(model, priced) < least else best
    cuts = any(len(keep.query_heads) < sizes.query_heads for keep, sizes in zip(plan.layers, shape.layers, strict=True))
    if options.heads is not None or not cuts:
        return plan
    try:
        simpler = _search(attention_whole(prices), options, budget)[2]
    except UserError:  # the FFN alone cannot meet the budget
        return plan
    scored = calibration[: -len(priced)]
    cut, whole = (
        losses_compensated(compensation, model, shape, each, scored, priced, progress) for each in (plan, simpler)
    )
    found = weighed(cut, whole)
    plan = plan if found.pays else simpler
    return replace(plan, reasons=replace(plan.reasons, weighed=(found,))) if plan.reasons else plan


def attention_whole(prices: Prices) -> Prices:
    """Prices that offer nothing of attention."""
    return replace(prices, heads=False, no_attention=[None] * len(prices.no_attention))


def weighed(cut: torch.Tensor, whole: torch.Tensor) -> Weighed:
    """Losses [sequences] of a plan that cuts attention against those, on the same text, of one that leaves it whole.

    Raises:
        UserError: a loss is not finite.
    """
    gain = whole - cut
    error = float(gain.std()) / math.sqrt(len(gain)) if len(gain) > 1 else 0.0
    return Weighed(finite(float(gain.mean())), error)


def prices_of(
    model: PreTrainedModel,
    shape: ModelShape,
    calibration: torch.Tensor,
    options: PruneOptions,
    *,
    weights: str | None = None,
    progress: Progress | None = None,
) -> tuple[Prices, torch.Tensor]:
    """Estimate, fuse and price, before any search: the prices, and the rows that priced, [sequences, tokens].

    Raises:
        UserError: too little text, or a loss that is not finite.
    """
    if len(calibration) < 2:
        raise UserError("pruning needs at least 2 calibration sequences: one to score on, one to price on")
    held = max(1, len(calibration) // PRICING_SHARE)
    scored, priced = calibration[:-held], calibration[-held:]
    adaptive, compensation = options.adaptive, options.compensation
    c = float(calibration.shape[1]) if adaptive.c is None else adaptive.c
    scores = scores_of(model, shape, scored, c=c, element=adaptive.element, weights=weights, progress=progress)
    settings, compensated = None, None
    if adaptive.prices == "compensated" and compensation != "none":
        settings = {"compensation": compensation, "on": hashlib.sha256(scored.numpy().tobytes()).hexdigest()}

        def compensated(plan: PrunePlan) -> float:
            return float(losses_compensated(compensation, model, shape, plan, scored, priced).mean())

    prices = fit_prices(
        model, shape, fuse(scores, shape, adaptive.fusion), priced, keep_layers=options.kept_layers,
        heads=options.prunes_heads(shape), modules=options.modules, compensated=compensated,
        known=KnownLosses(weights, priced, settings), progress=progress,
    )  # fmt: skip
    return prices, priced


def _search(prices: Prices, options: PruneOptions, budget: Budget) -> tuple[list[Module], list[Option], PrunePlan]:
    modules = modules_of(budget.dense, prices, options.group_size, options.kept_layers, budget)
    chosen = solve(modules, budget)
    plan = plan_from(modules, chosen, budget.dense)
    return modules, chosen, replace(plan, reasons=reasons_of(modules, chosen, budget.unit))


def cut_layers(plan: PrunePlan, shape: ModelShape) -> dict[int, LayerPlan]:
    """What the layers keep that lose something."""
    return {i: keep for i, keep in enumerate(plan.layers) if keep != whole_layer(shape.layers[i])}
