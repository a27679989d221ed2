"""SAAP's plan: estimate, fuse, price, search, and look again (arXiv 2412.15127, and what is ours).

Prices of structures that go one at a time say little about what they cost together. So prices can be corrected: each
block's price is scaled to a loss measured where all others are cut as planned, and the search is repeated; the plan
with the least measured loss is kept. And a plan that cuts attention has to be measured better than the best one that
does not. Pruning in stages, each with scores of its own, is :mod:`saap.prune.pruning`'s.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from devices.common.progress import Progress
from saap.prune.cut.refit import losses_compensated
from saap.prune.options import PruneOptions
from saap.prune.plan import PrunePlan, Weighed
from saap.prune.scores.cache import KnownLosses
from saap.prune.scores.fusion import fuse
from saap.prune.scores.scoring import scores_of
from saap.prune.search.budget import Budget
from saap.prune.search.explain import reasons_of
from saap.prune.search.masking import masked, mean_nll
from saap.prune.search.milp import Found, Prices, search
from saap.prune.search.prices import Losses, correct_prices, finite, fit_prices
from saap.system.errors import UserError

PRICING_SHARE = 8  # one eighth of the calibration sequences prices what the others scored


def adaptive_plan(
    model: PreTrainedModel,
    ids: torch.Tensor,
    budget: Budget,
    options: PruneOptions,
    *,
    weights: str | None = None,
    progress: Progress | None = None,
) -> PrunePlan:
    """Choose what to keep of ``budget.dense``; the model is left as it was.

    A structure of attention is a large step at a price that is fitted to all of its kind, so that the search finds
    those whose price is too low. With ``options.heads`` None a plan that cuts attention is held against the best one
    that leaves it whole, and stays if it is better by more than two standard errors (after the one-standard-error rule
    of Breiman et al., Classification and Regression Trees, 1984, section 3.4.3).

    Args:
        ids: of calibration, [sequences, tokens] int64; the last eighth prices what the others scored.
        weights: hash of the model's weights, under which scores are kept; None keeps none.

    Raises:
        UserError: too little text, a loss that is not finite, or a budget that cannot be met.
    """
    shape = budget.dense
    scored, priced = divided(ids)
    scores = scores_of(model, shape, scored, options.adaptive, weights=weights, progress=progress)
    losses = losses_on(model, scored, priced, options, weights=weights, progress=progress)
    prices = fit_prices(losses, fuse(scores, shape, options.adaptive.fusion), options)
    found = _searched(prices, budget, options)
    best, least = found.plan, float("inf")
    for _ in range(options.adaptive.corrections):
        prices, loss = correct_prices(model, prices, found, priced, progress=progress)
        best, least = (found.plan, loss) if loss < least else (best, least)
        found = _searched(prices, budget, options)
    plan = found.plan
    if options.adaptive.corrections:
        with masked(model, plan.cut_layers(shape), shape.head_dim):
            plan = plan if mean_nll(model, priced) < least else best
    cuts = any(len(keep.query_heads) < sizes.query_heads for keep, sizes in zip(plan.layers, shape.layers, strict=True))
    if options.heads is not None or not cuts:
        return plan
    try:
        simpler = _searched(attention_whole(prices), budget, options).plan
    except UserError:  # the FFN alone cannot meet the budget
        return plan
    cut, whole = (
        losses_compensated(options.compensation, model, each, scored, priced, progress) for each in (plan, simpler)
    )
    compared = weighed(cut, whole)
    plan = plan if compared.pays else simpler
    return replace(plan, reasons=replace(plan.reasons, weighed=(compared,))) if plan.reasons else plan


def divided(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The sequences that are scored on, and those that price what the others scored.

    Raises:
        UserError: there is one sequence only.
    """
    if len(ids) < 2:
        raise UserError("pruning needs at least 2 calibration sequences: one to score on, one to price on")
    held = max(1, len(ids) // PRICING_SHARE)
    return ids[:-held], ids[-held:]


def losses_on(
    model: PreTrainedModel,
    scored: torch.Tensor,
    priced: torch.Tensor,
    options: PruneOptions,
    *,
    weights: str | None = None,
    progress: Progress | None = None,
) -> Losses:
    """What measures losses on ``priced``: where structures are silenced, or what compensation on ``scored`` leaves."""
    kind = options.compensation
    if options.adaptive.prices == "silenced" or kind == "none":
        return Losses(model, priced, KnownLosses(weights, priced), progress=progress)

    def compensated(plan: PrunePlan) -> float:
        return float(losses_compensated(kind, model, plan, scored, priced).mean())

    settings = {"compensation": kind, "on": hashlib.sha256(scored.numpy().tobytes()).hexdigest()}
    return Losses(model, priced, KnownLosses(weights, priced, settings), compensated, progress)


def _searched(prices: Prices, budget: Budget, options: PruneOptions) -> Found:
    found = search(prices, budget, options)
    return replace(found, plan=replace(found.plan, reasons=reasons_of(found.blocks, found.chosen, budget.unit)))


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
