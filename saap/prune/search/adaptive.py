"""SAAP's plan: estimate, fuse, price, search (arXiv 2412.15127, and what is ours).

Scores say which structures of a block go first; :mod:`saap.prune.search.library` prices what it costs if they do, after
compensation, and :mod:`saap.prune.search.milp` finds the cheapest choice within the budget.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from saap.base.errors import UserError
from saap.base.progress import Progress
from saap.models.streaming import is_streamed
from saap.prune.options import PruneOptions
from saap.prune.plan import PrunePlan
from saap.prune.scores.fusion import fuse
from saap.prune.scores.scoring import scores_of
from saap.prune.search.budget import Budget
from saap.prune.search.explain import reasons_of
from saap.prune.search.kept_prices import KeptDivergences, keep_library, prices_path, read_library
from saap.prune.search.library import Pricing, fitted_on
from saap.prune.search.measured import Measuring
from saap.prune.search.milp import Library, search

PRICING_SHARE = 8  # one eighth of the calibration sequences prices what the others scored


def divided(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split the sequences: those that score, and the last eighth, which prices; UserError if there is only one."""
    if len(ids) < 2:
        raise UserError("pruning needs at least 2 calibration sequences: one to score on, one to price on")
    pricing = max(1, len(ids) // PRICING_SHARE)
    return ids[:-pricing], ids[-pricing:]


def adaptive_plan(
    model: PreTrainedModel,
    ids: torch.Tensor,
    budget: Budget,
    options: PruneOptions,
    *,
    weights: str | None = None,
    progress: Progress | None = None,
) -> PrunePlan:
    """Choose what to keep of ``budget.dense``, on calibration ids [rows, tokens] that follow each other.

    ``options.sequences`` of them score and price; what the plan takes is measured on others too.
    ``weights``: hash of the model's weights, under which scores and prices are kept; None keeps none.

    Raises:
        UserError: a loss or a price that is not finite, or a budget that cannot be met.
    """
    scored, priced = divided(ids[: options.sequences])
    scores = scores_of(model, budget.dense, scored, options.adaptive, weights=weights, progress=progress)
    ranked = fuse(scores, budget.dense, options.adaptive.fusion)
    refits = options.compensation == "refit"
    pricing = Pricing(model, ranked, (scored, priced), budget.allowed, refits=refits, rounded=bool(budget.forms))
    path = prices_path(weights, ids, options, is_streamed(model)) if weights else None
    library = _library(pricing, path, progress)
    result = search(library.counted(options.adaptive.recovered), budget, options.adaptive.most_gone)
    if options.adaptive.measured and not is_streamed(model):
        others = ids[fitted_on(streamed=False) :]
        measuring = Measuring(pricing, others if len(others) > len(priced) else priced, KeptDivergences(path), progress)
        while (more := measuring.more(library, result)) is not None:
            library = more
            result = search(library.counted(options.adaptive.recovered), budget, options.adaptive.most_gone)
    reasons = replace(
        reasons_of(result.blocks, result.chosen, budget.unit), integers=result.integers, words=result.words
    )
    return replace(result.plan, reasons=reasons)


def _library(pricing: Pricing, path: Path | None, progress: Progress | None) -> Library:
    """Read the library from an entry, or price it."""
    library = read_library(path, pricing.choices, pricing.rounded) if path else None
    if library is None:
        library = pricing.library(progress)
        if path:
            keep_library(path, library)
    return library
