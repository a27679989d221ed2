"""The plan of a pruning: kept structures and reasons, made by a search and recorded in saap.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from saap.base.errors import UserError
from saap.models.shape import ATTENTION, LayerSizes, ModelShape, OfBlocks
from saap.prune.forms import PlanForms

Amount = int | float  # in the budget's unit; what is counted stays whole, on disk too


@dataclass(frozen=True)
class LayerPlan(OfBlocks):
    """The structures that one layer of the base model keeps: sorted indices of heads, groups and channels."""

    query_heads: tuple[int, ...] = ()
    kv_heads: tuple[int, ...] = ()
    ffn: tuple[int, ...] = ()
    conv: tuple[int, ...] = ()  # channels of the short convolution
    delta: tuple[int, ...] = ()  # key heads of the delta net
    head_dim: int = 0  # as in LayerSizes
    reads: bool = False

    @property
    def sizes(self) -> LayerSizes:
        kept: dict[str, Any] = {each.name: getattr(self, each.name) for each in fields(self)}
        for name in kept.keys() - set(ATTENTION.facts):
            kept[name] = len(kept[name])
        return LayerSizes(**kept)


@dataclass(frozen=True)
class Move:
    """A step of one block between two options."""

    to: LayerSizes  # what is kept after it
    price: float  # predicted loss that it adds, nats per token
    saved: Amount  # what it saves, in the budget's unit; above 0

    @property
    def per_unit(self) -> float:
        """Nats per unit of the budget."""
        return self.price / self.saved


@dataclass(frozen=True)
class Reason:
    """One block: what went, at what price, and what was left."""

    layer: int  # index in the model that was pruned
    kind: str  # of block, by its name
    had: LayerSizes  # before; of this block alone
    keeps: LayerSizes  # after
    whole: Amount  # what the block cost before, in the budget's unit
    saved: Amount  # how much of that went
    price: float | None = None  # predicted loss of what went, nats per token; None where the method has no prices
    last: Move | None = None  # the dearest part of the way to the chosen option; None where nothing went
    next: Move | None = None  # the cheapest way on, per unit; None where nothing smaller is on offer


@dataclass(frozen=True)
class Gained:
    """The gain by a choice outside a single block: integers, or a smaller vocabulary."""

    count: int  # of blocks that are held in other integers, or of words that went
    saved: float  # in the budget's unit; below 0 where it takes more
    price: float  # nats per token; below 0 where it costs less


@dataclass(frozen=True)
class Reasons:
    """All blocks of a plan, in the budget's unit."""

    unit: str
    blocks: tuple[Reason, ...]
    integers: Gained | None = None  # other ones than the bundle's
    words: Gained | None = None  # fewer of them in the head

    @property
    def dearest_step(self) -> Reason | None:
        """The block with the dearest step per unit that was taken."""
        return max((b for b in self.blocks if b.last), key=lambda b: b.last.per_unit, default=None)  # type: ignore[union-attr]

    @property
    def cheapest_left(self) -> Reason | None:
        """The block with the cheapest step per unit that was not taken."""
        return min((b for b in self.blocks if b.next), key=lambda b: b.next.per_unit, default=None)  # type: ignore[union-attr]

    def record(self) -> dict[str, object]:
        """Return the JSON for ``saap.json``: unknown is null, prices per unit are nats per unit of the budget."""
        dearest, left = self.dearest_step, self.cheapest_left
        return {
            "unit": self.unit,
            "dearest_taken": dearest.last.per_unit if dearest and dearest.last else None,
            "cheapest_left": left.next.per_unit if left and left.next else None,
            "blocks": [_recorded(block) for block in self.blocks],
            **({"integers": asdict(self.integers)} if self.integers else {}),
            **({"words": asdict(self.words)} if self.words else {}),
        }


def _recorded(reason: Reason) -> dict[str, object]:
    """Return the JSON of a reason."""
    record = asdict(reason) | {"had": reason.had.record(), "keeps": reason.keeps.record()}
    moves = {name: getattr(reason, name) for name in ("last", "next")}
    return record | {name: asdict(move) | {"to": move.to.record()} for name, move in moves.items() if move}


@dataclass(frozen=True)
class PrunePlan:
    """The structures to keep of every layer of the base model; a layer with an empty plan is removed."""

    layers: tuple[LayerPlan, ...]
    price: float = 0.0  # predicted loss, nats per token
    reasons: Reasons | None = None  # why each block lost what it lost
    gap: float = 0.0  # by which share of its price a better plan might be cheaper; 0: none is
    forms: PlanForms | None = None  # integers that the search chose; None: as was asked
    words: int | None = None  # of the heads that it could choose, by their place; None: all words, or as was asked

    @property
    def kept_layers(self) -> tuple[int, ...]:
        """Indices, in the base model, of the layers that are not dropped."""
        return tuple(index for index, plan in enumerate(self.layers) if plan.blocks)

    def cut_layers(self, dense: ModelShape) -> dict[int, LayerPlan]:
        """Return the plans of the layers that lose something."""
        return {i: keep for i, keep in enumerate(self.layers) if keep != whole_layer(dense.layers[i])}

    def kept_shape(self, dense: ModelShape) -> ModelShape:
        return dense.with_layers(tuple(self.layers[index].sizes for index in self.kept_layers))


def whole_layer(sizes: LayerSizes) -> LayerPlan:
    counts: dict[str, Any] = {each.name: getattr(sizes, each.name) for each in fields(LayerPlan)}
    for name in counts.keys() - set(ATTENTION.facts):
        counts[name] = tuple(range(counts[name]))
    return LayerPlan(**counts)


def widths_of(channels: int, group_size: int, step: int = 1) -> list[int]:
    """Return the widths that a block may keep, smallest first: multiples of the grid, and its own.

    ``step``: columns that each is of the matrix that writes; of more than one there are few, and no grid but groups.
    """
    if step > 1:
        return [count for count in range(1, channels + 1) if count == channels or not count * step % group_size]
    # Rows in multiples of 64 suit the fast kernels, and the quantised matrix that writes needs whole groups.
    grid = max(group_size, 64) if channels >= 512 else group_size
    return [*range(grid, channels, grid), channels]


def check_plan(plan: PrunePlan, dense: ModelShape) -> None:
    """Raise UserError where a plan does not fit the model or breaks GQA."""
    if len(plan.layers) != len(dense.layers):
        raise UserError(f"the plan has {len(plan.layers)} layers, the model has {len(dense.layers)}")
    for index, (keep, sizes) in enumerate(zip(plan.layers, dense.layers, strict=True)):
        for kept, count, what in (
            (keep.query_heads, sizes.query_heads, "query head"),
            (keep.kv_heads, sizes.kv_heads, "KV head"),
            (keep.ffn, sizes.ffn, "FFN channel"),
            (keep.conv, sizes.conv, "channel of the convolution"),
            (keep.delta, sizes.delta, "key head of the delta net"),
        ):
            if list(kept) != sorted(set(kept)) or any(not 0 <= i < count for i in kept):
                raise UserError(f"layer {index}: the kept {what}s are not distinct sorted indices below {count}")
        if dense.per_layer and not keep.blocks:
            raise UserError(f"layer {index}: it has an embedding of its own, so it must keep a block")
        read = plan.layers[dense.sources[index]].kv_heads if dense.sources else keep.kv_heads
        if keep.kv_heads and keep.kv_heads != read:
            raise UserError(
                f"layer {index}: it reads another layer's keys and values, so it must keep the same KV groups"
            )
        per_group = sizes.heads_per_group
        counts = {sum(head // per_group == group for head in keep.query_heads) for group in keep.kv_heads}
        owners = {head // per_group for head in keep.query_heads} if per_group else set()
        if not dense.separable_heads and 0 < len(keep.query_heads) < sizes.query_heads:
            raise UserError(f"layer {index}: a norm spans its heads, so it must keep all of them or none")
        if owners != set(keep.kv_heads) or len(counts) > 1:
            raise UserError(
                f"layer {index}: every kept KV group must keep the same number of query heads, at least one"
            )
    if not any(keep.query_heads for keep in plan.layers):
        raise UserError("the plan leaves no layer with attention: prune less")
