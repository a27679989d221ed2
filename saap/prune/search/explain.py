"""Why each block lost what it lost: its price, what that saved, and what the next step down would have cost.

The search (:mod:`saap.prune.search.milp`) looks for the steps that cost the fewest nats per unit saved over the whole
model. Under
a Lagrange multiplier of the budget, its shadow price (Everett, Operations Research 11(3), 1963), every step that costs
less per unit is taken and none that costs more, so the dearest step taken and the cheapest one left enclose it. Options
come in whole pieces, so the two may overlap a little.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from saap.models.structures import LayerPlan, LayerSizes, PrunePlan
from saap.prune.search.budget import Budget
from saap.prune.search.milp import Module, Option

CLEAR = 2.0  # standard errors: what is gained by less on calibration text was lost several times over on other text


@dataclass(frozen=True)
class Move:
    """A step of one block between two options.

    Attributes:
        to: what is kept after it.
        price: predicted loss that it adds, nats per token.
        saved: what it saves, in the budget's unit; above 0.
    """

    to: LayerSizes
    price: float
    saved: float

    @property
    def per_unit(self) -> float:
        """Nats per unit of the budget."""
        return self.price / self.saved


@dataclass(frozen=True)
class Reason:
    """One attention or feed-forward block: what went, at what price, and what was left.

    Attributes:
        layer: index in the model that was pruned; ``kind``: attention or ffn.
        had, keeps: sizes before and after; a feed-forward block has no heads and attention no channels.
        whole: what the block cost before, in the budget's unit; ``saved``: how much of that went.
        price: predicted loss of what went, nats per token; None where the method has no prices.
        last: the dearest part of the way to the chosen option; None where nothing went.
        next: the cheapest way on, per unit; None where nothing smaller is on offer.
        quarter: losing the part of the whole block that is nearest a quarter, by which blocks compare; of the first
            search where there were several. None where nothing between all and nothing is on offer.
    """

    layer: int
    kind: str
    had: LayerSizes
    keeps: LayerSizes
    whole: float
    saved: float
    price: float | None = None
    last: Move | None = None
    next: Move | None = None
    quarter: Move | None = None


@dataclass(frozen=True)
class Weighed:
    """A plan that cuts attention, held against one that leaves it whole; see
    :func:`saap.prune.search.adaptive.adaptive_plan`.

    Attributes:
        gain: by how much it was measured to lose less, nats per token.
        error: standard error of that, over sequences.
    """

    gain: float
    error: float

    @property
    def pays(self) -> bool:
        """Whether attention is cut."""
        return self.gain > CLEAR * self.error


@dataclass(frozen=True)
class Reasons:
    """All blocks of a plan, in the budget's unit; and how attention was weighed, once per search where it was."""

    unit: str
    blocks: tuple[Reason, ...]
    weighed: tuple[Weighed, ...] = ()

    @property
    def dearest_taken(self) -> Reason | None:
        """The block with the dearest step per unit that was taken."""
        return max((b for b in self.blocks if b.last), key=lambda b: b.last.per_unit, default=None)  # type: ignore[union-attr]

    @property
    def cheapest_left(self) -> Reason | None:
        """The block with the cheapest step per unit that was not taken."""
        return min((b for b in self.blocks if b.next), key=lambda b: b.next.per_unit, default=None)  # type: ignore[union-attr]

    def of_layer(self, layer: int) -> list[Reason]:
        """The blocks of one layer."""
        return [block for block in self.blocks if block.layer == layer]

    @property
    def layers(self) -> list[int]:
        """Indices of the layers, in order."""
        return sorted({block.layer for block in self.blocks})

    def record(self) -> dict[str, Any]:
        """For ``saap.json``; what is not known is null, prices per unit are nats per unit of the budget."""
        taken, left = self.dearest_taken, self.cheapest_left
        return {
            "unit": self.unit,
            "dearest_taken": taken.last.per_unit if taken and taken.last else None,
            "cheapest_left": left.next.per_unit if left and left.next else None,
            "blocks": [asdict(block) for block in self.blocks],
            "weighed": [asdict(each) for each in self.weighed],
        }


def reasons_of(modules: Sequence[Module], chosen: Sequence[Option], unit: str) -> Reasons:
    """Why the search chose these options.

    Args:
        modules: every block with its options, at the prices that the search saw; ``chosen``: one option of each.
        unit: of the options' costs.
    """
    return Reasons(unit, tuple(_reason(module, option) for module, option in zip(modules, chosen, strict=True)))


def _reason(module: Module, chosen: Option) -> Reason:
    whole = max(module.options, key=_kept)
    parts = [o for o in module.options if 0 < _kept(o) < _kept(whole) and o.cost < whole.cost]
    quarter = min(parts, key=lambda o: (abs(_kept(o) - 0.75 * _kept(whole)), o.price), default=None)
    taken = [_move(o, chosen) for o in module.options if o.cost > chosen.cost] if chosen is not whole else []
    left = [_move(chosen, o) for o in module.options if o.cost < chosen.cost]
    return Reason(
        module.layer, module.kind, whole.keep.sizes, chosen.keep.sizes, whole.cost, whole.cost - chosen.cost,
        chosen.price,
        max(taken, key=lambda move: move.per_unit, default=None),
        min(left, key=lambda move: move.per_unit, default=None),
        _move(whole, quarter) if quarter else None,
    )  # fmt: skip


def _kept(option: Option) -> int:
    return len(option.keep.query_heads) + len(option.keep.ffn)


def _move(start: Option, end: Option) -> Move:
    return Move(end.keep.sizes, end.price - start.price, start.cost - end.cost)


def sizes_lost(plan: PrunePlan, budget: Budget) -> Reasons:
    """What each block lost and what that saved, for a method that has no prices."""
    blocks = []
    for index, (sizes, keep) in enumerate(zip(budget.dense.layers, plan.layers, strict=True)):
        had = {"attention": LayerSizes(sizes.query_heads, sizes.kv_heads, 0), "ffn": LayerSizes(0, 0, sizes.ffn)}
        kept = {
            "attention": LayerPlan(keep.query_heads, keep.kv_heads, ()).sizes,
            "ffn": LayerPlan((), (), keep.ffn).sizes,
        }
        costs: dict[str, Callable[[LayerSizes], float]]
        costs = {"attention": budget.attention_cost, "ffn": budget.ffn_cost}
        for kind, cost in costs.items():
            if _present(had[kind]):
                whole = cost(had[kind])
                left = cost(kept[kind]) if _present(kept[kind]) else 0.0
                blocks.append(Reason(index, kind, had[kind], kept[kind], whole, whole - left))
    return Reasons(budget.unit, tuple(blocks))


def _present(sizes: LayerSizes) -> bool:
    return bool(sizes.query_heads or sizes.ffn)


def after(first: Reasons | None, second: Reasons | None, kept_layers: tuple[int, ...]) -> Reasons | None:
    """Reasons of a model that was pruned and pruned again: prices and savings add up, steps are the last search's.

    Args:
        first: of the first pruning; None where there was none.
        second: of the second, whose layers are those of ``kept_layers`` in the first model.
    """
    if second is None:
        return first
    later = {(kept_layers[b.layer], b.kind): replace(b, layer=kept_layers[b.layer]) for b in second.blocks}
    if first is None:
        return replace(second, blocks=tuple(later.values()))
    blocks = tuple(_added(b, later.get((b.layer, b.kind))) for b in first.blocks)
    return replace(second, blocks=blocks, weighed=first.weighed + second.weighed)


def _added(before: Reason, now: Reason | None) -> Reason:
    if now is None:  # gone whole before the last search
        return replace(before, last=None, next=None)
    known = before.price is not None and now.price is not None
    price = before.price + now.price if known else None  # type: ignore[operator]
    return replace(
        now, had=before.had, whole=before.whole, saved=before.saved + now.saved, price=price, quarter=before.quarter
    )
