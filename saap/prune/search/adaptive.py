"""SAAP's plan: estimate, fuse, price, search, and look again (arXiv 2412.15127, and what is ours).

Prices of structures that go one at a time say little about what they cost together. So prices can be corrected: each
block's price is scaled to a loss measured where all others are cut as planned, and the search is repeated; the plan
with the least measured loss is kept. And a plan that cuts attention has to be measured better than the best one that
does not. Pruning in stages, each with scores of its own, is :mod:`saap.prune.pruning`'s.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from saap.prune.options import PruneOptions
from saap.prune.plan import PrunePlan, Weighed
from saap.prune.scores.fusion import fuse
from saap.prune.scores.importance import Scores
from saap.prune.search.budget import Budget
from saap.prune.search.explain import reasons_of
from saap.prune.search.masking import masked, mean_nll
from saap.prune.search.milp import Found, Prices, search
from saap.prune.search.prices import Losses, correct_prices, finite, fit_prices
from saap.system.errors import UserError

PRICING_SHARE = 8  # one eighth of the calibration sequences prices what the others scored


def divided(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The sequences to score on, and the last eighth, which prices; UserError where there is only one."""
    if len(ids) < 2:
        raise UserError("pruning needs at least 2 calibration sequences: one to score on, one to price on")
    held = max(1, len(ids) // PRICING_SHARE)
    return ids[:-held], ids[-held:]


def adaptive_plan(scores: Scores, losses: Losses, budget: Budget, options: PruneOptions) -> PrunePlan:
    """Choose what to keep of ``budget.dense``.

    A structure of attention is a large step at a price that is fitted to all of its kind, so that the search finds
    those whose price is too low. With ``options.heads`` None a plan that cuts attention is held against the best one
    that leaves it whole, and stays if it is better by more than two standard errors (after the one-standard-error rule
    of Breiman et al., Classification and Regression Trees, 1984, section 3.4.3).

    Args:
        scores, losses: of the model, on the two parts of the calibration text.

    Raises:
        UserError: a loss that is not finite, or a budget that cannot be met.
    """
    shape = budget.dense
    prices = fit_prices(losses, fuse(scores, shape, options.adaptive.fusion), options)
    found = _searched(prices, budget, options)
    best, least = found.plan, float("inf")
    for _ in range(options.adaptive.corrections):
        prices, loss = correct_prices(losses, prices, found)
        best, least = (found.plan, loss) if loss < least else (best, least)
        found = _searched(prices, budget, options)
    plan = found.plan
    if options.adaptive.corrections:
        with masked(losses.model, plan.cut_layers(shape)):
            plan = plan if mean_nll(losses.model, losses.priced) < least else best
    cuts = any(len(keep.query_heads) < sizes.query_heads for keep, sizes in zip(plan.layers, shape.layers, strict=True))
    if options.heads is not None or not cuts:
        return plan
    try:
        simpler = _searched(prices.with_attention_whole(), budget, options).plan
    except UserError:  # the FFN alone cannot meet the budget
        return plan
    compared = weighed(*(losses.compensated(each, losses.progress) for each in (plan, simpler)))
    plan = plan if compared.pays else simpler
    return replace(plan, reasons=replace(plan.reasons, weighed=(compared,))) if plan.reasons else plan


def _searched(prices: Prices, budget: Budget, options: PruneOptions) -> Found:
    found = search(prices, budget, options)
    return replace(found, plan=replace(found.plan, reasons=reasons_of(found.blocks, found.chosen, budget.unit)))


def weighed(cut: torch.Tensor, whole: torch.Tensor) -> Weighed:
    """Losses [sequences] of a plan that cuts attention against one that does not; UserError if they are not finite."""
    gain = whole - cut
    error = float(gain.std()) / math.sqrt(len(gain)) if len(gain) > 1 else 0.0
    return Weighed(finite(float(gain.mean())), error)
