"""From scores to nats: what removing a structure costs, fitted to the calibration loss.

Fused scores rank structures of one type but do not compare types. Two numbers per type turn them into a loss,

    price(option) = kappa * sum of P over what goes * (1 + alpha * share of the block that goes)

fitted to the loss measured with the cheapest structures of *every* layer gone together, at two levels. Joint removals
matter: prices measured one at a time underestimate them by an order of magnitude, and without alpha the search empties
a few layers that a first-order score calls cheap. What is to be compensated is priced by the loss after that: a refit
restores most of what a query head did, and little of what FFN channels did.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from devices.common.progress import Progress
from saap.models.architectures import shape_of
from saap.models.shape import ATTENTION, FFN, KINDS, BlockKind, LayerSizes
from saap.prune.cut.refit import losses_compensated
from saap.prune.options import PruneOptions
from saap.prune.plan import LayerPlan, PrunePlan, whole_layer
from saap.prune.scores.cache import KnownLosses
from saap.prune.scores.importance import TYPES
from saap.prune.search.masking import WorkingPoint, masked, mean_nll
from saap.prune.search.milp import Block, Found, Option, Prices
from saap.system.errors import UserError

# Shares of every layer's channels that are silenced to fit a type's curve; heads and groups go one or two at a time.
LEVELS = (0.125, 0.25)
LEVELS_COMPENSATED = (0.25, 0.5)  # less is restored so well that it says nothing about more
BLOCKS_TOGETHER = 5
# How far one measurement may move a price, and the least that anything costs, nats per token.
FACTOR_LIMIT = 10.0
LEAST_PRICE = 1e-4


@dataclass(frozen=True)
class Curve:
    """price = kappa * score * (1 + alpha * share)."""

    kappa: float
    alpha: float


class Losses:
    """Measures what a model loses without some structures; the model is left as it was.

    Args:
        scored: calibration ids [sequences, tokens] that compensation is fitted on.
        priced: other ids, that losses are measured on.
        options: prices may be of what compensation leaves; else what goes is silenced, as whole blocks always are.
        weights: hash of the model's weights, under which losses are kept; None keeps none.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        scored: torch.Tensor,
        priced: torch.Tensor,
        options: PruneOptions,
        *,
        weights: str | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.model, self.shape, self.priced, self.progress = model, shape_of(model.config), priced, progress
        self.compensates = options.adaptive.prices == "compensated" and options.compensation != "none"
        self._compensation, self._scored = options.compensation, scored
        scored_hash = hashlib.sha256(scored.numpy().tobytes()).hexdigest()
        settings = {"compensation": options.compensation, "on": scored_hash} if self.compensates else None
        self._known = KnownLosses(weights, priced, settings)
        self._done, self._of = 0, 1

    def compensated(self, plan: PrunePlan, progress: Progress | None = None) -> torch.Tensor:
        """Losses [sequences] of the model that is cut to a plan and compensated, nats per token."""
        return losses_compensated(self._compensation, self.model, plan, self._scored, self.priced, progress)

    def begin(self, count: int) -> None:
        """So many will be asked for, which progress tells."""
        self._done, self._of = 0, count

    def end(self) -> None:
        self._known.save()
        if self.progress:
            self.progress("pricing (options)", self._of, self._of)

    def silenced(self, plans: dict[int, LayerPlan]) -> float:
        """The loss where what these layers' plans do not keep is silenced."""

        def measure() -> float:
            with masked(self.model, plans):
                return mean_nll(self.model, self.priced)

        return self._counted(plans, measure)

    def without(self, plans: dict[int, LayerPlan]) -> float:
        """The loss where what these layers' plans do not keep is silenced, or gone and compensated."""
        if not self.compensates:
            return self.silenced(plans)
        layers = tuple(plans.get(i, whole_layer(sizes)) for i, sizes in enumerate(self.shape.layers))
        return self._counted(plans, lambda: float(self.compensated(PrunePlan(layers)).mean()), "compensated")

    def _counted(self, plans: dict[int, LayerPlan], measure: Callable[[], float], how: str = "") -> float:
        if self.progress:
            self.progress("pricing (options)", self._done, self._of)
        self._done += 1
        return finite(self._known.of(plans, measure, how))


def fit_prices(losses: Losses, fused: dict[str, list[torch.Tensor]], options: PruneOptions) -> Prices:
    """Price every structure in nats per token, and with ``options.modules`` every whole block.

    ``fused`` is of :func:`saap.prune.scores.fusion.fuse`. A loss that is not finite raises UserError.
    """
    shape, heads = losses.shape, options.prunes_heads(losses.shape)
    blocks = [kind for kind in KINDS.values() if any(sizes.has(kind) for sizes in shape.layers)]
    types = [type_ for kind in (FFN, *blocks) if heads or kind is not ATTENTION for type_ in kind.types]
    types = list(dict.fromkeys(types))
    free = [i for i in range(len(shape.layers)) if i not in options.kept_layers]
    losses.begin(2 * len(types) + 1 + (2 * len(shape.layers) + len(blocks) if options.modules else 0))
    base = losses.silenced({})
    curves = dict.fromkeys(TYPES, Curve(0.0, 0.0))
    curves |= {type_: _fit_curve(type_, losses, fused[type_], base, free) for type_ in types}
    priced = {type_: [(curves[type_].kappa * p).double().numpy() for p in fused[type_]] for type_ in TYPES}
    gone: dict[str, list[float | None]] = {name: [None] * len(shape.layers) for name in KINDS}
    if options.modules:  # each silenced by itself: two forward passes per layer
        gone |= {kind.name: _block_prices(losses, base, kind, free) for kind in blocks}
        attention = gone[ATTENTION.name]
        gone[ATTENTION.name] = [None if shape.is_read(i) else price for i, price in enumerate(attention)]
    losses.end()
    return Prices(priced, gone, {type_: curve.alpha for type_, curve in curves.items()}, heads)


def finite(loss: float) -> float:
    """The loss itself; UserError where it is NaN or infinite."""
    if not math.isfinite(loss):
        raise UserError(f"the loss is {loss} on the calibration sequences for pricing: check the model and the text")
    return loss


def _fit_curve(type_: str, losses: Losses, scores: list[torch.Tensor], base: float, free: list[int]) -> Curve:
    levels = LEVELS_COMPENSATED if losses.compensates else LEVELS
    rows, increases = [], []
    for level in (0, 1):
        plans, scored, weighted = {}, 0.0, 0.0
        for layer in free:
            sizes = losses.shape.layers[layer]
            lost = _cheapest(type_, sizes, scores[layer], level, levels)
            if lost:
                plans[layer] = _without(type_, sizes, set(lost))
                total, share = float(scores[layer][lost].sum()), len(lost) / len(scores[layer])
                scored, weighted = scored + total, weighted + total * share
        rows.append((scored, weighted))
        increases.append(max(losses.without(plans) - base, LEAST_PRICE))
    if not all(total for total, _ in rows):
        return Curve(0.0, 0.0)
    if not np.isfinite(rows).all():
        raise UserError("scores overflow on the calibration sequences: check the model and the text")
    # Two equations: kappa * scored + (kappa * alpha) * weighted = increase; neither term may be negative.
    from scipy.optimize import nnls

    (linear, interaction), _ = nnls(np.array(rows), np.array(increases))
    if not linear:  # all of it is interaction: keep the ratio finite
        linear = 1e-3 * increases[0] / rows[0][0]
    return Curve(float(linear), float(interaction / linear))


def _cheapest(
    type_: str, sizes: LayerSizes, scores: torch.Tensor, level: int, levels: tuple[float, float]
) -> list[int]:
    """The structures that go at a level: channels by share, one or two heads of each group, one or two groups."""
    order = torch.argsort(scores, stable=True).tolist()
    if type_ not in ATTENTION.types:
        return order[: min(max(round(levels[level] * len(order)), level + 1), max(len(order) - 1, 0))]
    if type_ == "group":
        return order[: min(level + 1, max(sizes.kv_heads - 1, 0))]
    each = min(level + 1, max(sizes.heads_per_group - 1, 0))
    return [
        head
        for group in range(sizes.kv_heads)
        for head in [i for i in order if i // sizes.heads_per_group == group][:each]
    ]


def _without(type_: str, sizes: LayerSizes, lost: set[int]) -> LayerPlan:
    whole = whole_layer(sizes)
    for kind in KINDS.values():
        if kind is not ATTENTION and type_ in kind.types:
            (field,) = kind.sizes
            left: dict[str, Any] = {field: tuple(i for i in getattr(whole, field) if i not in lost)}
            return replace(whole, **left)
    if type_ == "group":
        lost = {head for head in whole.query_heads if head // sizes.heads_per_group in lost}
    return replace(whole, query_heads=tuple(h for h in whole.query_heads if h not in lost))


def _block_prices(losses: Losses, base: float, kind: BlockKind, free: list[int]) -> list[float | None]:
    """Measured loss without that block of each of these layers, times what the cheapest cost more together than alone.

    None where a layer has no such block, or is not one of these.
    """
    whole = {i: whole_layer(losses.shape.layers[i]) for i in free}
    gone = {i: keep.with_block(kind, LayerPlan()) for i, keep in whole.items() if keep.has(kind)}
    single = {i: max(losses.silenced({i: keep}) - base, LEAST_PRICE) for i, keep in gone.items()}
    cheapest = sorted(single, key=single.__getitem__)[:BLOCKS_TOGETHER]
    factor = 1.0
    if len(cheapest) > 1:
        together = losses.silenced({i: gone[i] for i in cheapest}) - base
        factor = max(1.0, together / sum(single[i] for i in cheapest))
    return [single[i] * factor if i in single else None for i in range(len(losses.shape.layers))]


def correct_prices(losses: Losses, prices: Prices, found: Found) -> tuple[Prices, float]:
    """Scale each block's prices so that they agree with a loss measured where all others are cut as found.

    A block that the plan cuts is made whole again; one that it leaves whole is cut to three quarters. Either way one
    number per block is measured: what its removal costs on top of all the others. The plan's own loss is given too.
    """
    factors: dict[tuple[int, str], float] = {}
    shape, progress = losses.shape, losses.progress
    with WorkingPoint(losses.model, shape, found.plan.cut_layers(shape), losses.priced).entered() as here:
        for done, (block, option) in enumerate(zip(found.blocks, found.chosen, strict=True)):
            if progress:
                progress("correcting prices (blocks)", done, len(found.blocks))
            whole = block.whole
            other = whole if option is not whole else _probe(block)
            if other is option:
                continue
            keep = found.plan.layers[block.layer].with_block(KINDS[block.kind], other.keep)
            loss = here.loss_with(block.layer, keep)
            measured = max((here.loss - loss) if other is whole else (loss - here.loss), LEAST_PRICE)
            predicted = max(option.price if other is whole else other.price, LEAST_PRICE)
            factors[block.layer, block.kind] = min(max(measured / predicted, 1 / FACTOR_LIMIT), FACTOR_LIMIT)
        loss = here.loss
    if progress:
        progress("correcting prices (blocks)", len(found.blocks), len(found.blocks))
    return scaled_prices(prices, factors), loss


def scaled_prices(prices: Prices, factors: dict[tuple[int, str], float]) -> Prices:
    """Prices of each block, (layer, name of its kind), times a factor."""
    structures, gone = dict(prices.structures), dict(prices.gone)
    for kind in KINDS.values():
        by_layer = [factors.get((i, kind.name), 1.0) for i in range(len(prices.gone[kind.name]))]
        for type_ in kind.types:
            structures[type_] = [p * by for p, by in zip(prices.structures[type_], by_layer, strict=True)]
        whole = zip(prices.gone[kind.name], by_layer, strict=True)
        gone[kind.name] = [None if price is None else price * by for price, by in whole]
    return replace(prices, structures=structures, gone=gone)


def _probe(block: Block) -> Option:
    """The option that keeps closest to three quarters of the block."""
    parts = [option for option in block.options if 0 < option.kept < block.whole.kept]
    return block.nearest(0.75, parts or block.options) or block.whole
