"""Adaptive structure search: one option per block, least summed price, whole model within a budget.

Every block offers some options (:mod:`saap.prune.search.choices`), in some integers
(:mod:`saap.prune.forms`), each with a price in nats and a cost in units of the budget; a run of blocks may go in
one piece instead. To cover every block once is a set partition with a knapsack, solved as a mixed-integer program by
HiGHS (scipy.optimize.milp): exactly, or to a gap that the plan states.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from saap.base.errors import UserError
from saap.models.shape import ATTENTION, FFN, KINDS, ModelShape
from saap.models.slim_quant import MatrixForm
from saap.prune.forms import BlockForms, Place, PlanForms
from saap.prune.plan import Gained, LayerPlan, PrunePlan
from saap.prune.search.budget import Budget
from saap.prune.search.choices import choices, runs_of
from saap.prune.search.rounding import Rounding
from saap.quantize.bundle_size import VOCABULARY
from saap.quantize.solver import Numbers, least_price, one_for_each, within

if TYPE_CHECKING:
    from scipy.optimize import LinearConstraint

RETRIES = 8
LEAST_PRICE = 1e-7  # nats per token
LEAST_TIMES, MOST_TIMES = 0.5, 4.0  # times the price, that one option of an attention says of the others
# Of what was measured, what counts beside prices of widths: tuning gives more of the rest back (studies/search).
ATTENTION_COUNTS, GONE_COUNTS = 0.75, 0.5
ATTENTION_TIMES = 1.5  # times its price, that lost attention counts where it was not measured (studies/search)
ROUNDING_COUNTS = 0.15  # of what rounding costs; tuning gives the rest back (studies/search)


@dataclass(frozen=True)
class Option:
    """One way to cut one block: what is kept, its price in nats and its cost in the budget's unit."""

    keep: LayerPlan  # of the block alone
    price: float
    cost: float
    forms: BlockForms | None = None  # of its matrices; None: as the bundle
    bare: Option | None = None  # the same without forms
    words: int | None = None  # of those that the head may say, by their place; None: all

    @property
    def kept(self) -> int:
        """Number of query heads or channels."""
        return sum(len(getattr(self.keep, kind.sizes[0])) for kind in self.keep.blocks)


@dataclass(frozen=True)
class Block:
    """One block of the dense model with its options."""

    layer: int
    kind: str  # of block, by its name
    options: tuple[Option, ...]

    @cached_property
    def whole(self) -> Option:
        return max(self.options, key=lambda option: option.kept)


@dataclass(frozen=True)
class SearchResult:
    """The result of a search: one option of each block, and the plan that they form."""

    blocks: list[Block]
    chosen: list[Option]
    plan: PrunePlan
    integers: Gained | None = None
    words: Gained | None = None


@dataclass(frozen=True)
class Solution:
    """The option of each block, and by which share of their summed price a better choice might be cheaper."""

    options: list[Option]
    gap: float = 0.0


@dataclass(frozen=True)
class Gap:
    """A run of blocks that may go in one piece, for a price in nats; the last block before it makes up for them."""

    blocks: tuple[Place, ...]
    price: float
    measured: bool = False  # the price is the KL divergence in long windows


@dataclass(frozen=True)
class Library:
    """All that is on offer: what a block may keep and at which price in nats per token, and what may go whole."""

    offers: dict[Place, tuple[tuple[LayerPlan, float], ...]]  # the whole block among them, at 0
    gaps: tuple[Gap, ...] = ()
    rounding: Rounding | None = None  # prices of integers; None: they cost nothing
    # What some attention costs in long windows, over the price: of the one option of it that was measured.
    times: Mapping[Place, float] = field(default_factory=dict)

    def measured(self, times: Mapping[Place, float], divergences: Mapping[tuple[Place, ...], float]) -> Library:
        """Set these factors, and these KL divergences of runs in place of their prices."""
        gaps = tuple(
            Gap(gap.blocks, max(divergences[gap.blocks], LEAST_PRICE), True) if gap.blocks in divergences else gap
            for gap in self.gaps
        )
        return replace(self, times=times, gaps=gaps)

    def counted(self, recovered: float = 0.0) -> Library:
        """Reduce the prices of removed runs, attention and integers by what tuning recovers."""

        def times(place: Place) -> float:
            if place in self.times:
                return ATTENTION_COUNTS * min(MOST_TIMES, max(LEAST_TIMES, self.times[place]))
            return ATTENTION_TIMES if place[1] == ATTENTION.name else 1.0

        def lost(gap: Gap) -> float:
            counts = GONE_COUNTS if gap.measured else sum(map(times, gap.blocks)) / len(gap.blocks)
            return counts * gap.price

        offers = {
            place: tuple((keep, times(place) * price) for keep, price in kept) for place, kept in self.offers.items()
        }
        gaps = tuple(replace(gap, price=(1 - recovered) * lost(gap)) for gap in self.gaps)
        return Library(offers, gaps, self.rounding and self.rounding.counted(ROUNDING_COUNTS))

    def blocks(self, budget: Budget) -> list[Block]:
        """All blocks in order, with what their options cost."""
        return [
            Block(i, kind, tuple(Option(keep, nats, budget.cost(KINDS[kind], keep.sizes)) for keep, nats in offers))
            for (i, kind), offers in self.offers.items()
        ]

    def in_forms(self, blocks: list[Block], budget: Budget) -> list[Block]:
        """Return the blocks with every option in all allowed integers, followed by the vocabulary."""
        widened = [replace(block, options=tuple(self._in_forms(block, budget))) for block in blocks]
        prices = self.rounding.vocabulary if self.rounding else {}
        tables = [
            Option(
                LayerPlan(), prices.get(form, 0.0) + (words.price if words else 0.0),
                budget.outside_cost(form, words), BlockForms(form, form), words=place,
            )
            for place, words in ((None, None), *enumerate(budget.words))
            for form in (budget.base, *budget.vocabulary)
        ]  # fmt: skip
        return [*widened, Block(len(budget.dense.layers), VOCABULARY, tuple(tables))]

    def _in_forms(self, block: Block, budget: Budget) -> Iterator[Option]:
        """Yield the options that are not dominated in price and cost; the whole one as it is comes first."""
        kind, place, shape = KINDS[block.kind], (block.layer, block.kind), budget.cut
        alike: dict[tuple[object, ...], list[Option]] = {}
        for bare in block.options:
            if not bare.keep.blocks:
                alike.setdefault((), []).append(bare)
                continue
            share = shape.weights(kind, bare.keep.sizes) / shape.weights(kind, block.whole.keep.sizes)
            for forms in budget.forms_for(kind, bare.keep.sizes):
                price = bare.price + (share * self.rounding.price(place, forms) if self.rounding else 0.0)
                option = Option(bare.keep, price, budget.cost(kind, bare.keep.sizes, forms), forms, bare)
                if bare is block.whole and forms == (budget.base, budget.base):
                    yield option
                alike.setdefault((True, len(bare.keep.kv_heads) if shape.sources else 0), []).append(option)
        for options in alike.values():
            least = math.inf
            for option in sorted(options, key=lambda option: (option.cost, option.price)):
                if option.price < least:
                    least = option.price
                    yield option


def search(library: Library, budget: Budget, most_gone: int | None = None) -> SearchResult:
    """Find the plan of least price that meets the budget; the UserError if none does names the floor.

    ``most_gone``: blocks that may go whole at most; None: any number.
    """
    blocks = library.blocks(budget)
    several = bool(budget.forms or budget.words)
    offered = library.in_forms(blocks, budget) if several else blocks
    solution = solve(offered, budget, () if budget.allowed.one_width else library.gaps, most_gone)
    chosen = [option.bare or option for option in solution.options[: len(blocks)]]
    plan = plan_from(blocks, chosen, budget.dense)
    price = sum(option.price for option in solution.options)
    plan = replace(plan, price=price, gap=solution.gap)
    if not several:
        return SearchResult(blocks, chosen, plan)
    vocabulary = solution.options[-1]
    forms, integers = None, None
    if budget.forms:
        forms = _chosen_forms(offered, solution.options, budget.base)
        integers = _gained_by_forms(offered, solution.options, budget, library.rounding)
    plan = replace(plan, forms=forms, words=vocabulary.words)
    return SearchResult(blocks, chosen, plan, integers, _gained_by_words(vocabulary, budget))


def _gained_by_words(vocabulary: Option, budget: Budget) -> Gained | None:
    """Return what a smaller vocabulary saves and costs, in the head's integers; None if it is whole."""
    if vocabulary.words is None or vocabulary.forms is None:
        return None
    words = budget.words[vocabulary.words]
    saved = budget.outside_cost(vocabulary.forms.reads) - vocabulary.cost
    return Gained(budget.cut.head_rows - words.rows, saved, words.price)


def _chosen_forms(blocks: list[Block], chosen: list[Option], base: MatrixForm) -> PlanForms:
    """Return the integers of every kept block, and of the vocabulary, which is the last option."""
    *of_layers, vocabulary = chosen
    assert vocabulary.forms is not None, "embedding and head are in some integers"
    forms = {
        (block.layer, block.kind): option.forms
        for block, option in zip(blocks[:-1], of_layers, strict=True)
        if option.forms is not None
    }
    return PlanForms(base, forms, vocabulary.forms.reads)


def _gained_by_forms(blocks: list[Block], chosen: list[Option], budget: Budget, rounding: Rounding | None) -> Gained:
    """Return what the chosen integers save and cost compared with the bundle's."""
    base, changed, saved, price = BlockForms(budget.base, budget.base), 0, 0.0, 0.0
    for block, option in zip(blocks[:-1], chosen[:-1], strict=True):
        if option.forms is None or option.bare is None:
            continue
        changed += option.forms != base
        saved += option.bare.cost - option.cost
        if rounding:
            kind = KINDS[block.kind]
            share = budget.cut.weights(kind, option.keep.sizes) / budget.cut.weights(kind, block.whole.keep.sizes)
            price += option.price - option.bare.price - share * rounding.price((block.layer, block.kind), base)
    forms = chosen[-1].forms
    assert forms is not None, "embedding and head are in some integers"
    if rounding:
        price += rounding.vocabulary.get(forms.reads, 0.0) - rounding.vocabulary.get(budget.base, 0.0)
    return Gained(changed, saved - budget.outside_cost(forms.reads), price)


def check_floor(budget: Budget) -> None:
    """Refuse, before minutes of scoring, what no choice of options can meet; the UserError names the floor."""
    shape, allowed = budget.dense, budget.allowed
    free = {place: tuple((keep, 0.0) for keep in plans) for place, plans in choices(shape, allowed).items()}
    if allowed.one_width:
        free = {(i, kind): offers if kind == FFN.name else offers[:1] for (i, kind), offers in free.items()}
    gaps = [] if allowed.one_width else [Gap(run, 0.0) for run in runs_of(shape, allowed)]
    library = Library(free)
    blocks = library.blocks(budget)
    _check_floor(library.in_forms(blocks, budget) if budget.forms or budget.words else blocks, budget, gaps)


def _check_floor(blocks: list[Block], budget: Budget, gaps: Sequence[Gap] = ()) -> None:
    """Check that the least cost of a choice that keeps some attention fits."""
    free = {place for gap in gaps for place in gap.blocks}
    least = [0.0 if (b.layer, b.kind) in free else min(o.cost for o in b.options) for b in blocks]
    to_attend = [
        min(o.cost for o in block.options if o.keep.query_heads) - cost
        for block, cost in zip(blocks, least, strict=True)
        if block.kind == ATTENTION.name
    ]
    floor = budget.fixed + sum(least) + min(to_attend, default=0.0)
    if not budget.fits(floor):
        raise budget.below_floor(floor)


def solve(blocks: list[Block], budget: Budget, gaps: Sequence[Gap] = (), most_gone: int | None = None) -> Solution:
    """Choose an option of each block: least summed price, cost within the budget, attention somewhere.

    ``gaps``: runs of blocks that may go instead, no two of them side by side: their prices are of runs as they are.
    ``most_gone``: how many blocks may go so at most; None: any number.

    Raises:
        UserError: even the smallest options exceed the budget; the floor is named.
    """
    _check_floor(blocks, budget, gaps)
    if budget.allowed.one_width:
        return Solution(_of_one_width(blocks, budget))
    limit = budget.limit
    for _ in range(RETRIES):
        solution = _least_price(blocks, limit, budget, gaps, most_gone)
        excess = budget.fixed + sum(option.cost for option in solution.options) - budget.most
        if budget.fits(budget.most + excess):
            return replace(solution, options=_use_up(blocks, solution.options, -excess, budget.dense))
        limit -= 2 * excess  # HiGHS holds a constraint to a tolerance only
    raise UserError(f"the search found no plan within {budget.in_words(budget.most)}: require a little less")


def _of_one_width(blocks: list[Block], budget: Budget) -> list[Option]:
    """Choose the largest FFN width that fits, the same in every layer."""
    widths = sorted({len(option.keep.ffn) for block in blocks for option in block.options if option.keep.ffn})
    for width in reversed(widths):
        chosen = [next((o for o in block.options if len(o.keep.ffn) == width), block.whole) for block in blocks]
        if budget.fits(budget.fixed + sum(option.cost for option in chosen)):
            return chosen
    raise UserError(
        f"no common width of the FFNs meets {budget.in_words(budget.most)}: require less, or leave --for out"
    )


def _least_price(
    blocks: list[Block], limit: float, budget: Budget, gaps: Sequence[Gap], most_gone: int | None
) -> Solution:
    from scipy.optimize import LinearConstraint
    from scipy.sparse import coo_array

    flat = [option for block in blocks for option in block.options]
    covered = _covered(blocks, gaps)
    owner = np.concatenate([np.repeat(np.arange(len(blocks)), [len(b.options) for b in blocks]), *covered])
    columns = np.concatenate([np.arange(len(flat)), *(np.full(len(c), len(flat) + n) for n, c in enumerate(covered))])
    size = len(flat) + len(gaps)
    price = np.array([o.price for o in flat] + [gap.price for gap in gaps])
    cost = np.array([o.cost for o in flat] + [0.0] * len(gaps))
    attends = [i for i, option in enumerate(flat) if option.keep.query_heads]
    some_attention = coo_array((np.ones(len(attends)), (np.zeros(len(attends), int), attends)), (1, size))
    affordable = within(cost, limit)
    constraints = [
        *(
            LinearConstraint(np.pad(row, (0, len(gaps))), -np.inf, most)
            for row, most in _together(blocks, budget.dense)
        ),
        one_for_each(owner, columns, (len(blocks), size)),
        *([_apart(covered, len(blocks), len(flat))] if gaps else []),
        *(
            []
            if most_gone is None
            else [LinearConstraint(np.array([[0] * len(flat) + list(map(len, covered))]), 0, most_gone)]
        ),
        affordable,
        LinearConstraint(some_attention, 1, np.inf),
    ]
    answer = least_price(price, constraints)
    if answer.x is None and gaps:  # runs that may not touch leave more than the blocks one by one
        smallest = least_price(cost, [each for each in constraints if each is not affordable])
        if smallest.x is not None and not budget.fits(floor := budget.fixed + float(cost @ np.round(smallest.x))):
            raise budget.below_floor(floor)
    if answer.x is None:
        raise UserError(f"no plan meets {budget.in_words(budget.most)} ({answer.message}): require a little less")
    gap = float(answer.mip_gap or 0.0) if answer.status else 0.0  # its limit of nodes ended the search
    chosen: list[Option | None] = [None] * len(blocks)
    for column in np.flatnonzero(answer.x > 0.5):
        if column < len(flat):
            chosen[owner[column]] = flat[column]
            continue
        places = covered[column - len(flat)]
        for place in places:  # each bears its part of the price
            chosen[place] = Option(LayerPlan(), gaps[column - len(flat)].price / len(places), 0.0)
    return Solution([option for option in chosen if option is not None], gap)


def _covered(blocks: list[Block], gaps: Sequence[Gap]) -> list[NDArray[np.intp]]:
    """Numbers of the blocks of each gap."""
    numbers = {(block.layer, block.kind): number for number, block in enumerate(blocks)}
    return [np.array([numbers[place] for place in gap.blocks], dtype=np.intp) for gap in gaps]


def _apart(covered: list[NDArray[np.intp]], blocks: int, options: int) -> LinearConstraint:
    """Forbid gaps that touch: at most one ends before a block or starts with it."""
    from scipy.optimize import LinearConstraint
    from scipy.sparse import coo_array

    rows = [place for places in covered for place in (places[0], places[-1] + 1)]
    columns = [options + number for number in range(len(covered)) for _ in range(2)]
    shape = (blocks + 1, options + len(covered))
    return LinearConstraint(coo_array((np.ones(len(rows)), (rows, columns)), shape), -np.inf, 1)


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
    """Spend the rest of the budget on the larger options that gain most.

    HiGHS takes objectives as equal that differ by a millionth of the largest price. Where most prices are smaller than
    that, as those of random weights are, it would remove twice what was asked for.
    """
    chosen = list(chosen)
    while True:
        gone = [False, *(not option.keep.blocks for option in chosen), False]  # before the first to behind the last
        larger = [
            (place, other)
            for place, (block, option) in enumerate(zip(blocks, chosen, strict=True))
            for other in block.options
            if 0 < other.cost - option.cost <= left and other.price <= option.price
            if not (shape.sources and len(other.keep.kv_heads) != len(option.keep.kv_heads))
            # No price covers a run of removed blocks with one of them back.
            if not (gone[place + 1] and (gone[place] or gone[place + 2]))
        ]
        if not larger:
            return chosen

        def gain(step: tuple[int, Option], chosen: list[Option] = chosen) -> tuple[float, float, int]:
            place, other = step
            return chosen[place].price - other.price, other.cost - chosen[place].cost, -place  # of equals the first

        place, option = max(larger, key=gain)
        left -= option.cost - chosen[place].cost
        chosen[place] = option


def plan_from(blocks: list[Block], chosen: list[Option], shape: ModelShape) -> PrunePlan:
    layers = [LayerPlan()] * len(shape.layers)
    for block, option in zip(blocks, chosen, strict=True):
        layers[block.layer] = layers[block.layer].with_block(KINDS[block.kind], option.keep)
    return PrunePlan(tuple(layers), price=sum(option.price for option in chosen))
