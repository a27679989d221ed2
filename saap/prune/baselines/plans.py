"""From scores of a baseline to plans: an ordered list of removal steps, and the shortest part of it that is enough.

A step takes one notch off one module: one grid step of an FFN's width, whole KV groups with all their query heads, or a
whole layer. Every plan is a beginning of the list, so a plan costs microseconds once the list is made.

Worked example, 30 layers of FFN 1536 on a grid of 64: 24 widths, 23 steps of 64 channels in each layer, 3 * 64 * 576
weights a step. One ratio of 20 % is 4.8 steps in each layer: 24 layers give up 5, spread evenly, and 6 layers 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from saap.models.shape import LayerSizes, ModelShape
from saap.prune.plan import LayerPlan, PrunePlan, whole_layer
from saap.system.errors import UserError

SLACK = 1e-12  # a share that was computed from a plan's weights leads back to this plan


@dataclass(frozen=True)
class Step:
    """One notch: what goes, and how many weights that is.

    Attributes:
        layer: index of the layer.
        kind: ffn | group | layer.
        gone: FFN channels or KV groups that go; empty for a whole layer.
        weights: that go with them.
        start, stop: shares of the module's structures that are gone before and after this step.
        key: place in the ranking, least first; within a module never less than that of the step before.
    """

    layer: int
    kind: str
    gone: tuple[int, ...]
    weights: int
    start: float
    stop: float
    key: float = 0.0

    def at(self, key: float) -> Step:
        """The same step at another place of the ranking."""
        return replace(self, key=key)


@dataclass(frozen=True)
class Ranking:
    """What a baseline would remove, in order; ``plan_at`` stops where enough is gone."""

    method: str
    shape: ModelShape
    steps: tuple[Step, ...]

    @property
    def largest_share(self) -> float:
        """The share of the decoder layers' weights that is gone when every step is taken."""
        return sum(step.weights for step in self.steps) / self.shape.layer_weights

    def plan_at(self, share: float) -> PrunePlan:
        """The plan that removes at least ``share`` of the decoder layers' weights, and as little more as steps allow.

        The list is followed as long as its steps fit in; what is left is filled by the one step that is just enough, or
        by further steps that are smaller, whichever overshoots less. A larger share never removes less.

        Raises:
            UserError: the share is out of range, or more than every step together removes.
        """
        target = math.ceil(self._asked(share) * (1 - SLACK))
        if target > sum(step.weights for step in self.steps):
            raise UserError(
                f"{self.method} can remove {self.largest_share:.2%} of the decoder layers' weights at most here, "
                f"{share:.2%} was asked: ask for less, keep fewer layers whole, or let heads go too"
            )
        taken, need = self._beginning(target)
        if need > 0:
            taken = [*taken, *_fill(self.steps[len(taken) :], need)]
        return self._plan(taken)

    def plan_below(self, share: float) -> PrunePlan:
        """The plan of the longest beginning of the list that removes at most ``share``.

        For methods with large steps (whole layers), which take the next larger model in a table.

        Raises:
            UserError: the share is out of range.
        """
        return self._plan(self._beginning(math.floor(self._asked(share) * (1 + SLACK)))[0])

    def _asked(self, share: float) -> float:
        if not (math.isfinite(share) and 0 <= share < 1):
            raise UserError(f"share {share} is not allowed: give one from 0 to below 1, such as 0.2")
        return share * self.shape.layer_weights

    def _beginning(self, target: int) -> tuple[list[Step], int]:
        count = 0
        for step in self.steps:
            if step.weights > target:
                break
            target -= step.weights
            count += 1
        return list(self.steps[:count]), target

    def _plan(self, taken: list[Step]) -> PrunePlan:
        gone: dict[tuple[int, str], set[int]] = {}
        for step in taken:
            gone.setdefault((step.layer, step.kind), set()).update(step.gone)
        nothing = LayerPlan((), (), ())
        return PrunePlan(
            tuple(
                nothing if (i, "layer") in gone else _without(sizes, gone.get((i, "group")), gone.get((i, "ffn")))
                for i, sizes in enumerate(self.shape.layers)
            )
        )


def _without(sizes: LayerSizes, groups: set[int] | None, channels: set[int] | None) -> LayerPlan:
    whole = whole_layer(sizes)
    return LayerPlan(
        tuple(h for h in whole.query_heads if h // sizes.heads_per_group not in (groups or ())),
        tuple(g for g in whole.kv_heads if g not in (groups or ())),
        tuple(c for c in whole.ffn if c not in (channels or ())),
    )


def _fill(pending: tuple[Step, ...], need: int) -> list[Step]:
    """The fewest extra weights that cover ``need``: one step, or several that are smaller than the list's next."""
    next_of_module: dict[tuple[int, str], Step] = {}
    for step in pending:
        next_of_module.setdefault((step.layer, step.kind), step)
    single = min((s for s in next_of_module.values() if s.weights >= need), key=lambda s: s.weights)
    several: list[Step] = []
    blocked: set[tuple[int, str]] = set()  # modules whose next step is a large one: what follows it must wait
    for step in pending:
        if step.weights >= single.weights or (step.layer, step.kind) in blocked:
            blocked.add((step.layer, step.kind))
            continue
        several.append(step)
        need -= step.weights
        if need <= 0:
            return several if sum(s.weights for s in several) < single.weights else [single]
    return [single]


def ffn_widths(ffn: int, block: int) -> list[int]:
    """The widths that an FFN may keep, largest first: multiples of the grid, and the width it has."""
    # Rows in multiples of 64 suit the fast kernels, and a quantised down_proj needs whole groups.
    step = max(block, 64) if ffn >= 512 else block
    return [ffn, *reversed(range(step, ffn, step))]


def group_counts(sizes: LayerSizes, head_dim: int, block: int) -> list[int]:
    """How many KV groups may stay, with all their query heads, largest first."""
    width = sizes.heads_per_group * head_dim
    return [sizes.kv_heads, *(n for n in range(sizes.kv_heads - 1, 0, -1) if n * width % block == 0)]


def module_steps(shape: ModelShape, layer: int, kind: str, scores: torch.Tensor, block: int) -> list[Step]:
    """All steps of one module in order, least scores first; the smallest size of the grid always stays.

    Args:
        kind: ffn | group.
        scores: [structures] of this module.
    """
    sizes = shape.layers[layer]
    kept = ffn_widths(sizes.ffn, block) if kind == "ffn" else group_counts(sizes, shape.head_dim, block)
    order = torch.argsort(scores.double(), stable=True).tolist()

    def weights(count: int) -> int:
        if kind == "ffn":
            return shape.ffn_weights(LayerSizes(0, 0, count))
        return shape.attention_weights(LayerSizes(count * sizes.heads_per_group, count, 0))

    total = kept[0]
    return [
        Step(
            layer, kind, tuple(order[total - before : total - after]), weights(before) - weights(after),
            (total - before) / total, (total - after) / total,
        )
        for before, after in pairwise(kept)
    ]  # fmt: skip


def uniform_key(place: int, kind: str) -> Callable[[Step], float]:
    """Order by the share that is gone, so that every layer loses the same ratio.

    Where a ratio falls between two notches, some layers take one notch more: the golden ratio's multiples decide which,
    because any beginning of that sequence is spread evenly over the layers.

    Args:
        place: of the layer among those that are pruned.
    """
    phase = (place + 0.5) * 0.6180339887498949 % 1
    phase = 1 - phase if kind == "group" else phase  # so that a layer is not the first to lose both
    return lambda step: step.start + phase * (step.stop - step.start)


def threshold_key(scores: torch.Tensor) -> Callable[[Step], float]:
    """Order by score over all modules: a step is taken when the threshold passes the middle of its structures.

    So the width that a threshold asks for is rounded to the nearest one of the grid.
    """
    values = scores.double().tolist()
    return lambda step: values[step.gone[(len(step.gone) - 1) // 2]]
