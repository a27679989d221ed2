"""SAAP's plan: estimate, fuse, price, search, and look again (arXiv 2412.15127, and what is ours).

Two ways to look again, because prices of structures that go one at a time say little about what they cost together:

* in steps: part of the way to the requirement, then scores and prices anew with the chosen structures silenced;
* corrections: each module's price is scaled to a loss measured where all others are cut as planned, and the search is
  repeated; the plan with the least measured loss is kept.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from saap.budget import Budget
from saap.errors import SaapError
from saap.fusion import FusionOptions, fuse
from saap.importance import Progress, Scores, estimate
from saap.masking import masked, mean_nll
from saap.pricing import correct_prices, fit_prices
from saap.score_cache import cached_scores
from saap.search import modules_of, plan_from, solve
from saap.structures import LayerPlan, ModelShape, PrunePlan, whole_layer

PRICING_SHARE = 8  # one eighth of the calibration sequences prices what the others scored


@dataclass(frozen=True)
class AdaptiveOptions:
    """How SAAP chooses.

    Attributes:
        fusion: how scores become one number per structure.
        c: weight of the Taylor term of second order; None is the number of tokens per sequence.
        exact: the exact element score instead of the streamed one; two more numbers per weight.
        heads: whether query heads and KV groups may go.
        modules: whether whole attention and feed-forward blocks may go.
        steps: how many times scores are computed on the way.
        corrections: how many times prices are corrected by measured loss.
    """

    fusion: FusionOptions = field(default_factory=FusionOptions)
    c: float | None = None
    exact: bool = False
    heads: bool = True
    modules: bool = False
    steps: int = 1
    corrections: int = 0

    def check(self) -> None:
        """Raise SaapError for counts that are not allowed."""
        if self.steps < 1 or self.corrections < 0:
            raise SaapError(
                f"{self.steps} steps and {self.corrections} corrections are not allowed: give 1 and 0 or more"
            )
        if self.c is not None and not self.c >= 0:
            raise SaapError(f"c = {self.c} is not allowed: give 0 or more, 1 as printed or the tokens per sequence")


def adaptive_plan(
    model: PreTrainedModel,
    shape: ModelShape,
    calibration: torch.Tensor,
    budget: Budget,
    options: AdaptiveOptions,
    *,
    block: int,
    keep_layers: frozenset[int] = frozenset(),
    weights: str | None = None,
    progress: Progress | None = None,
) -> PrunePlan:
    """Choose what to keep; the model is left as it was.

    Args:
        calibration: [sequences, tokens] int64; the last eighth prices what the others scored.
        weights: hash of the model's weights, under which scores are kept; None keeps none.

    Raises:
        SaapError: too little text, a loss that is not finite, or a budget that cannot be met.
    """
    if len(calibration) < 2:
        raise SaapError("pruning needs at least 2 calibration sequences: one to score on, one to price on")
    held = max(1, len(calibration) // PRICING_SHARE)
    scored, priced = calibration[:-held], calibration[-held:]
    plan = PrunePlan(tuple(whole_layer(sizes) for sizes in shape.layers))
    for step in range(1, options.steps + 1):
        cut = cut_layers(plan, shape)
        with masked(model, cut, shape.head_dim):
            scores = _scores(model, shape, scored, options, cut, weights, progress)
            fused = fuse(scores, shape, options.fusion)
            prices = fit_prices(
                model, shape, fused, priced, cut=cut, keep_layers=keep_layers, heads=options.heads,
                modules=options.modules, progress=progress,
            )  # fmt: skip
        part = budget.partway(step / options.steps)
        modules = modules_of(shape, prices, block, keep_layers, part)
        chosen = solve(modules, part)
        plan = plan_from(modules, chosen, shape)
        best, least = plan, float("inf")
        for _ in range(options.corrections):
            prices, loss = correct_prices(model, shape, prices, modules, chosen, plan, priced, progress=progress)
            best, least = (plan, loss) if loss < least else (best, least)
            modules = modules_of(shape, prices, block, keep_layers, part)
            chosen = solve(modules, part)
            plan = plan_from(modules, chosen, shape)
        if options.corrections:
            with masked(model, cut_layers(plan, shape), shape.head_dim):
                plan = plan if mean_nll(model, priced) < least else best
    return plan


def cut_layers(plan: PrunePlan, shape: ModelShape) -> dict[int, LayerPlan]:
    """What the layers keep that lose something."""
    return {i: keep for i, keep in enumerate(plan.layers) if keep != whole_layer(shape.layers[i])}


def _scores(
    model: PreTrainedModel,
    shape: ModelShape,
    ids: torch.Tensor,
    options: AdaptiveOptions,
    cut: dict[int, LayerPlan],
    weights: str | None,
    progress: Progress | None,
) -> Scores:
    def compute() -> Scores:
        return estimate(model, shape, ids, c=options.c, exact=options.exact, progress=progress)

    if weights is None:
        return compute()
    gone = json.dumps({i: asdict(keep) for i, keep in cut.items()}, sort_keys=True)
    settings: dict[str, Any] = {"c": options.c, "exact": options.exact}
    settings["cut"] = hashlib.sha256(gone.encode()).hexdigest() if cut else None
    return cached_scores(weights, ids, settings, compute)[0]
