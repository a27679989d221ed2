"""Plans by a method's scores: an ordered list of removals, and the shortest part of it that is enough.

A removal takes one notch off one block: one grid step of an FFN's width, whole KV groups with all their query heads, or
a whole layer. Every plan is a beginning of the list, so a plan costs microseconds once the list is made.

Worked example, 30 layers of FFN 1536 on a grid of 64: 24 widths, 23 removals of 64 channels in each layer, 3 * 64 * 576
weights a removal. One ratio of 20 % is 4.8 removals in each layer: 24 layers give up 5, spread evenly, and 6 layers 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from saap.base.errors import UserError
from saap.models.shape import ATTENTION, FFN, LayerSizes, ModelShape
from saap.prune.plan import LayerPlan, PrunePlan, whole_layer, widths_of
from saap.prune.search.budget import Budget

SHARES = 20  # of weights, tried one after another by meet()
SHARE_STEP = 1 / 4096  # how closely meet() finds the smallest of them
SLACK = 1e-12  # a share that was computed from a plan's weights leads back to this plan


@dataclass(frozen=True)
class Removal:
    """One notch: what goes, and how many weights that is."""

    layer: int
    kind: str  # ffn | group | layer
    gone: tuple[int, ...]  # FFN channels or KV groups; empty for a whole layer
    weights: int  # that go with them
    start: float  # share of the module's structures that is gone before
    stop: float  # and after this removal
    key: float = 0.0  # place in the ranking, least first; within a module never less than that of the removal before

    def at(self, key: float) -> Removal:
        return replace(self, key=key)


@dataclass(frozen=True)
class Ranking:
    """A method's removals in their order; ``plan_at`` takes as many as needed."""

    method: str
    shape: ModelShape
    removals: tuple[Removal, ...]

    @property
    def largest_share(self) -> float:
        """The share of the decoder layers' weights that is gone when every removal is taken."""
        return sum(removal.weights for removal in self.removals) / self.shape.layer_weights

    def plan_at(self, share: float) -> PrunePlan:
        """Return the plan that removes at least ``share`` of the decoder layers' weights, and as little more as it can.

        The list is followed as long as its removals fit in; what is left is filled by the one that is just enough, or
        by smaller ones further on, whichever overshoots less. A larger share never removes less.

        Raises:
            UserError: the share is out of range, or more than every removal together removes.
        """
        target = math.ceil(self._weights_in(share) * (1 - SLACK))
        if target > sum(removal.weights for removal in self.removals):
            raise UserError(
                f"{self.method} can remove {self.largest_share:.2%} of the decoder layers' weights at most here, "
                f"not {share:.2%}: require less, keep fewer layers whole, or give --heads too"
            )
        chosen, need = self._beginning(target)
        if need > 0:
            chosen = [*chosen, *_fill(self.removals[len(chosen) :], need)]
        return self._plan(chosen)

    def _weights_in(self, share: float) -> float:
        if not (math.isfinite(share) and 0 <= share < 1):
            raise UserError(f"share {share} is not allowed: give one from 0 to below 1, such as 0.2")
        return share * self.shape.layer_weights

    def _beginning(self, target: int) -> tuple[list[Removal], int]:
        count = 0
        for removal in self.removals:
            if removal.weights > target:
                break
            target -= removal.weights
            count += 1
        return list(self.removals[:count]), target

    def _plan(self, chosen: list[Removal]) -> PrunePlan:
        gone: dict[tuple[int, str], set[int]] = {}
        for removal in chosen:
            gone.setdefault((removal.layer, removal.kind), set()).update(removal.gone)
        return PrunePlan(
            tuple(
                LayerPlan() if (i, "layer") in gone else _without(sizes, gone.get((i, "group")), gone.get((i, "ffn")))
                for i, sizes in enumerate(self.shape.layers)
            )
        )


def _without(sizes: LayerSizes, groups: set[int] | None, channels: set[int] | None) -> LayerPlan:
    whole = whole_layer(sizes)
    return replace(
        whole,
        query_heads=tuple(h for h in whole.query_heads if h // sizes.heads_per_group not in (groups or ())),
        kv_heads=tuple(g for g in whole.kv_heads if g not in (groups or ())),
        ffn=tuple(c for c in whole.ffn if c not in (channels or ())),
    )


def _fill(pending: tuple[Removal, ...], need: int) -> list[Removal]:
    """Find the fewest extra weights that cover ``need``: one removal, or several smaller than the list's next."""
    next_of_module: dict[tuple[int, str], Removal] = {}
    for removal in pending:
        next_of_module.setdefault((removal.layer, removal.kind), removal)
    single = min((s for s in next_of_module.values() if s.weights >= need), key=lambda s: s.weights)
    several: list[Removal] = []
    blocked: set[tuple[int, str]] = set()  # modules whose next removal is a large one: what follows it must wait
    for removal in pending:
        if removal.weights >= single.weights or (removal.layer, removal.kind) in blocked:
            blocked.add((removal.layer, removal.kind))
            continue
        several.append(removal)
        need -= removal.weights
        if need <= 0:
            return several if sum(s.weights for s in several) < single.weights else [single]
    return [single]


def group_counts(sizes: LayerSizes, head_dim: int, block: int) -> list[int]:
    """Return the allowed numbers of KV groups, with all their query heads, largest first."""
    width = sizes.heads_per_group * head_dim
    return [sizes.kv_heads, *(n for n in range(sizes.kv_heads - 1, 0, -1) if n * width % block == 0)]


def block_removals(shape: ModelShape, layer: int, kind: str, scores: torch.Tensor, block: int) -> list[Removal]:
    """All removals of one module (ffn or group), least scores first; the smallest size of the grid stays."""
    sizes = shape.layers[layer]
    kept = widths_of(sizes.ffn, block)[::-1] if kind == "ffn" else group_counts(sizes, shape.head_dim, block)
    order = torch.argsort(scores.double(), stable=True).tolist()

    def weights(count: int) -> int:
        if kind == "ffn":
            return shape.weights(FFN, LayerSizes(ffn=count))
        return shape.weights(ATTENTION, LayerSizes(count * sizes.heads_per_group, count))

    total = kept[0]
    return [
        Removal(
            layer, kind, tuple(order[total - before : total - after]), weights(before) - weights(after),
            (total - before) / total, (total - after) / total,
        )
        for before, after in pairwise(kept)
    ]  # fmt: skip


def uniform_key(place: int, kind: str) -> Callable[[Removal], float]:
    """Order by the share that is gone, so that every layer loses the same ratio; ``place`` is among the pruned layers.

    Where a ratio falls between two notches, some layers take one notch more: the golden ratio's multiples decide which,
    because any beginning of that sequence is spread evenly over the layers.
    """
    phase = (place + 0.5) * 0.6180339887498949 % 1
    phase = 1 - phase if kind == "group" else phase  # so that a layer is not the first to lose both
    return lambda removal: removal.start + phase * (removal.stop - removal.start)


def threshold_key(scores: torch.Tensor) -> Callable[[Removal], float]:
    """Order by score over all modules, so that the width that a threshold asks for is rounded to the grid."""
    values = scores.double().tolist()
    return lambda removal: values[removal.gone[(len(removal.gone) - 1) // 2]]


def meet(plan_at: Callable[[float], PrunePlan], budget: Budget, dense: ModelShape) -> PrunePlan:
    """Return the plan that removes the smallest share of weights and meets the budget in its own unit.

    Plans cost less with the share only roughly (milliseconds do not follow weights), so shares are tried from the least
    upwards until one meets the budget, and the step in which that happened is halved; what is returned meets it.

    Raises:
        UserError: not even the largest share that ``plan_at`` takes meets the budget; names the least cost of a plan.
    """
    below, above, least = 0.0, 1.0, math.inf
    best: PrunePlan | None = None
    refusal: UserError | None = None
    while above - below > SHARE_STEP:
        share = min(below + 1 / SHARES, (below + above) / 2)
        try:
            plan = plan_at(share)
        except UserError as error:
            refusal, above = error, share
            continue
        total = budget.total(plan.kept_shape(dense))
        least = min(least, total)
        if budget.fits(total):
            best, above = plan, share
        else:
            below = share
    if best is not None:
        return best
    if refusal is not None and not math.isfinite(least):
        raise refusal
    raise budget.below_floor(float(least))
