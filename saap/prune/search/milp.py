"""Adaptive structure search: one option per block, least summed price, whole model within a budget.

Every block offers a few options (widths on the quantisation grid, query heads per KV group, KV groups, nothing). An
option has a price in nats (predicted loss) and a cost in the budget's unit. Choosing one option per block is a
multiple-choice knapsack, solved as a mixed-integer program by HiGHS (scipy.optimize.milp): exactly, or to a gap that
the plan states.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saap.models.shape import ATTENTION, FFN, KINDS, BlockKind, LayerSizes, ModelShape
from saap.prune.options import PruneOptions
from saap.prune.plan import LayerPlan, PrunePlan, widths_of
from saap.prune.search.budget import Budget
from saap.system.errors import UserError

GAP = 0.0  # between the answer and the bound: none, the answer is the best
NODES = 50_000  # of branch and bound; a limit in seconds would make the answer depend on the machine
RETRIES = 8
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Option:
    """One way to cut one block: what is kept, its price in nats and its cost in the budget's unit."""

    keep: LayerPlan  # of the block alone
    price: float
    cost: float

    @property
    def kept(self) -> int:
        """How many query heads or channels."""
        return sum(len(getattr(self.keep, kind.sizes[0])) for kind in self.keep.blocks)


@dataclass(frozen=True)
class Block:
    """One block of the dense model with its options."""

    layer: int
    kind: str  # of block, by its name
    options: tuple[Option, ...]

    @property
    def whole(self) -> Option:
        return max(self.options, key=lambda option: option.kept)

    def nearest(self, share: float, among: Iterable[Option]) -> Option | None:
        """Of some of its options the one that keeps closest to this share of the block; the cheaper of two."""
        wanted = share * self.whole.kept
        return min(among, key=lambda option: (abs(option.kept - wanted), option.price), default=None)


@dataclass(frozen=True)
class Prices:
    """Prices in nats: per structure, and per whole block (None where it may not go)."""

    structures: dict[str, list[Numbers]]  # by type of structure, per layer [structures]
    gone: dict[str, list[float | None]]  # by kind of block, per layer
    alpha: dict[str, float]  # interaction per type: price * (1 + alpha * share of the block's structures that goes)
    heads: bool = True  # whether query heads and KV groups may go one by one

    def with_attention_whole(self) -> Prices:
        """These, with nothing of attention on offer."""
        nothing: list[float | None] = [None] * len(self.gone[ATTENTION.name])
        return replace(self, heads=False, gone={**self.gone, ATTENTION.name: nothing})


@dataclass(frozen=True)
class Found:
    """What a search chose: one option of each block, and the plan that they are."""

    blocks: list[Block]
    chosen: list[Option]
    plan: PrunePlan


@dataclass(frozen=True)
class Solution:
    """The option of each block, and by which share of their summed price a better choice might be cheaper."""

    options: list[Option]
    gap: float = 0.0


def search(prices: Prices, budget: Budget, options: PruneOptions) -> Found:
    """The plan of least price that meets the budget; the UserError of one that cannot be met names the floor."""
    blocks = blocks_of(budget.dense, prices, budget, options)
    solution = solve(blocks, budget)
    plan = plan_from(blocks, solution.options, budget.dense)
    return Found(blocks, solution.options, replace(plan, gap=solution.gap))


def blocks_of(shape: ModelShape, prices: Prices, budget: Budget, options: PruneOptions) -> list[Block]:
    """All blocks with their options; layers that are kept offer only to stay whole. The budget says costs."""
    found = []
    for index, sizes in enumerate(shape.layers):
        whole = index in options.kept_layers
        for kind in sizes.blocks:
            if kind is ATTENTION:
                counts = _head_counts(sizes, shape.head_of(sizes), options.group_size)
                if whole or budget.one_width or not prices.heads:
                    counts = [(sizes.kv_heads, sizes.heads_per_group)]
                together = [other for other in shape.sharing(index) if shape.layers[other].has(ATTENTION)]
                order = _group_order(prices, together)
                heads = [_cheapest_heads(sizes, prices, index, order, *count) for count in counts]
                facts = {name: getattr(sizes, name) for name in ATTENTION.facts}
                offers = [(replace(keep, **facts), price) for keep, price in heads]
            else:
                channels = getattr(sizes, kind.sizes[0])
                step = shape.width_of(kind.writes, sizes)
                stays = whole or (budget.one_width and kind is not FFN)
                widths = [channels] if stays else widths_of(channels, options.group_size, step)
                offers = _cheapest_channels(kind, prices, index, widths)
            plans = [Option(keep, price, budget.cost(kind, keep.sizes)) for keep, price in offers]
            fixed = whole or budget.one_width
            gone = None if fixed else prices.gone[kind.name][index]
            if gone is not None:
                plans.append(Option(LayerPlan(), gone, 0.0))
            found.append(Block(index, kind.name, tuple(plans)))
    return found


def _cheapest_channels(kind: BlockKind, prices: Prices, index: int, widths: list[int]) -> list[tuple[LayerPlan, float]]:
    """What each width keeps, and its price, of a kind of block whose structures are channels."""
    (type_,) = kind.types
    each = prices.structures[type_][index]
    order = np.argsort(each, kind="stable")
    ranked: list[int] = order.tolist()
    lost = np.concatenate([[0.0], np.cumsum(each[order], dtype=np.float64)])
    offers = []
    for width in widths:
        gone = len(order) - width
        kept = tuple(sorted(ranked[gone:]))  # every width shares the numbers: there are hundreds
        price = float(lost[gone]) * (1 + prices.alpha[type_] * gone / len(order))
        only: dict[str, Any] = {kind.sizes[0]: kept}
        offers.append((LayerPlan(**only), price))
    return offers


def _head_counts(sizes: LayerSizes, head_dim: int, group_size: int) -> list[tuple[int, int]]:
    """KV groups and query heads of each that an attention block may keep."""
    return [
        (groups, per_group)
        for groups in range(1, sizes.kv_heads + 1)
        for per_group in range(1, sizes.heads_per_group + 1)
        if (groups, per_group) == (sizes.kv_heads, sizes.heads_per_group)
        or groups * per_group * head_dim % group_size == 0
    ]


def _group_order(prices: Prices, layers: list[int]) -> NDArray[np.intp]:
    """KV groups that these layers share, the cheapest to remove from all of them first."""
    return np.argsort(np.sum([prices.structures["group"][index] for index in layers], axis=0), kind="stable")


def _cheapest_heads(
    sizes: LayerSizes, prices: Prices, index: int, order: NDArray[np.intp], groups: int, per_group: int
) -> tuple[LayerPlan, float]:
    """What so many groups, the last in ``order``, keep with so many query heads each, and its price."""
    group_prices, head_prices = (prices.structures[type_][index] for type_ in ("group", "head"))
    kept_groups = sorted(int(g) for g in order[sizes.kv_heads - groups :])
    gone = sizes.kv_heads - groups
    price = float(group_prices[order[:gone]].sum()) * (1 + prices.alpha["group"] * gone / sizes.kv_heads)
    heads: list[int] = []
    per_head = 1 + prices.alpha["head"] * (1 - per_group / sizes.heads_per_group)
    for group in kept_groups:
        members = np.arange(sizes.heads_per_group) + group * sizes.heads_per_group
        ranked = members[np.argsort(head_prices[members], kind="stable")]
        heads += [int(h) for h in ranked[sizes.heads_per_group - per_group :]]
        price += float(head_prices[ranked[: sizes.heads_per_group - per_group]].sum()) * per_head
    return LayerPlan(tuple(sorted(heads)), tuple(kept_groups)), price


def check_floor(shape: ModelShape, budget: Budget, options: PruneOptions) -> None:
    """Refuse, before minutes of scoring, what no choice of options can meet; the UserError names the floor."""
    gone = [0.0 if options.modules and i not in options.kept_layers else None for i in range(len(shape.layers))]
    counted = {type_: size for kind in KINDS.values() for type_, size in zip(kind.types, kind.sizes, strict=True)}
    free = Prices(
        structures={type_: [np.zeros(getattr(s, size)) for s in shape.layers] for type_, size in counted.items()},
        gone=dict.fromkeys(KINDS, gone),
        alpha=dict.fromkeys(counted, 0.0),
        heads=options.prunes_heads(shape),
    )
    _check_floor(blocks_of(shape, free, budget, options), budget)


def _check_floor(blocks: list[Block], budget: Budget) -> None:
    """The least summed cost of any choice that leaves attention somewhere must fit."""
    least = [min(o.cost for o in block.options) for block in blocks]
    to_attend = [
        min(o.cost for o in block.options if o.keep.query_heads) - cost
        for block, cost in zip(blocks, least, strict=True)
        if block.kind == ATTENTION.name
    ]
    floor = budget.fixed + sum(least) + min(to_attend, default=0.0)
    if not budget.fits(floor):
        raise budget.below_floor(floor)


def solve(blocks: list[Block], budget: Budget) -> Solution:
    """The option of each block with the least summed price, all costs within the budget; some block keeps attention.

    Raises:
        UserError: even the smallest options exceed the budget; the floor is named.
    """
    _check_floor(blocks, budget)
    if budget.one_width:
        return Solution(_of_one_width(blocks, budget))
    limit = budget.limit
    for _ in range(RETRIES):
        found = _least_price(blocks, limit, budget)
        excess = budget.fixed + sum(option.cost for option in found.options) - budget.most
        if budget.fits(budget.most + excess):
            return replace(found, options=_use_up(blocks, found.options, -excess, budget.dense))
        limit -= 2 * excess  # HiGHS holds a constraint to a tolerance only
    raise UserError(f"no choice of options was found within {budget.in_words(budget.most)}: require a little less")


def _of_one_width(blocks: list[Block], budget: Budget) -> list[Option]:
    """The largest width that fits, of the FFN of every layer."""
    widths = sorted({len(option.keep.ffn) for block in blocks for option in block.options if option.keep.ffn})
    for width in reversed(widths):
        chosen = [next((o for o in block.options if len(o.keep.ffn) == width), block.whole) for block in blocks]
        if budget.fits(budget.fixed + sum(option.cost for option in chosen)):
            return chosen
    raise UserError(f"no width of all FFNs meets {budget.in_words(budget.most)}: require less, or leave --for out")


def _least_price(blocks: list[Block], limit: float, budget: Budget) -> Solution:
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    flat = [option for block in blocks for option in block.options]
    owner = np.repeat(np.arange(len(blocks)), [len(block.options) for block in blocks])
    price, cost = np.array([o.price for o in flat]), np.array([o.cost for o in flat])
    columns = np.arange(len(flat))
    attends = [i for i, option in enumerate(flat) if option.keep.query_heads]
    some_attention = coo_array((np.ones(len(attends)), (np.zeros(len(attends), int), attends)), (1, len(flat)))
    largest = max(float(cost.max()), 1e-12)
    constraints = [
        *(LinearConstraint(row, -np.inf, most) for row, most in _together(blocks, budget.dense)),
        LinearConstraint(coo_array((np.ones(len(flat)), (owner, columns)), (len(blocks), len(flat))), 1, 1),
        LinearConstraint(cost[None] / largest, -np.inf, limit / largest),
        LinearConstraint(some_attention, 1, np.inf),
    ]
    answer = milp(
        price / max(float(price.max()), 1e-12),
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": GAP, "node_limit": NODES},
    )
    if answer.x is None:
        raise UserError(
            f"no choice of options meets {budget.in_words(budget.most)} ({answer.message}): require a little less"
        )
    gap = float(answer.mip_gap or 0.0) if answer.status else 0.0  # its limit of nodes ended the search
    return Solution([flat[i] for i in np.flatnonzero(answer.x > 0.5)], gap)


def _together(blocks: list[Block], shape: ModelShape) -> list[tuple[Numbers, int]]:
    """Rows over all options, and what each may come to at most: what goes together with something of another block.

    A layer that reads keys and values has as many KV groups as the layer that they are of, or no attention; and a layer
    with an embedding of its own keeps a block.
    """
    flat = [(block, option) for block in blocks for option in block.options]
    attending = [(n, block.layer, len(o.keep.kv_heads)) for n, (block, o) in enumerate(flat) if o.keep.query_heads]
    rows = []
    for index, source in enumerate(shape.sources):
        for groups in {groups for _, layer, groups in attending if layer == index and source != index}:
            row = np.zeros(len(flat))
            row[[n for n, layer, count in attending if (layer, count) == (index, groups)]] = 1
            row[[n for n, layer, count in attending if (layer, count) == (source, groups)]] = -1
            rows.append((row, 0))
    for index in range(len(shape.layers)) if shape.per_layer else ():
        gone = [n for n, (block, option) in enumerate(flat) if block.layer == index and not option.keep.blocks]
        row = np.zeros(len(flat))
        row[gone] = 1
        rows.append((row, sum(block.layer == index for block in blocks) - 1))
    return rows


def _use_up(blocks: list[Block], chosen: list[Option], left: float, shape: ModelShape) -> list[Option]:
    """Give what is left of the budget back, to what gains most by it.

    HiGHS takes objectives as equal that differ by a millionth of the largest price. Where most prices are smaller than
    that, as those of random weights are, it would remove twice what was asked for.
    """
    chosen = list(chosen)
    while True:
        larger = [
            (option.price - other.price, other.cost - option.cost, -place, other)
            for place, (block, option) in enumerate(zip(blocks, chosen, strict=True))
            for other in block.options
            if 0 < other.cost - option.cost <= left and other.price <= option.price
            if not (shape.sources and len(other.keep.kv_heads) != len(option.keep.kv_heads))
        ]
        if not larger:
            return chosen
        _, cost, place, option = max(larger, key=lambda found: found[:3])
        chosen[-place] = option
        left -= cost


def plan_from(blocks: list[Block], chosen: list[Option], shape: ModelShape) -> PrunePlan:
    layers = [LayerPlan()] * len(shape.layers)
    for block, option in zip(blocks, chosen, strict=True):
        layers[block.layer] = layers[block.layer].with_block(KINDS[block.kind], option.keep)
    return PrunePlan(tuple(layers), price=sum(option.price for option in chosen))
