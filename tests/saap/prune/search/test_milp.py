from dataclasses import replace

import pytest
from support.search_cases import SHAPE, TABLE, library, milliseconds, weights

from saap.base.errors import UserError
from saap.models.shape import ATTENTION, FFN, LayerSizes
from saap.prune.baselines.plans import meet
from saap.prune.plan import LayerPlan, PrunePlan, check_plan, whole_layer
from saap.prune.search.choices import Allowed
from saap.prune.search.milp import Gap, Library, check_floor, search

WHOLE_ONLY = Allowed(keep=frozenset({"blocks"}))


def choices_within(found, budget, most_gone=None):
    """Every way to cover the blocks in order by an option each and by gaps, no two side by side: (price, cost)."""
    blocks = found.blocks(budget)

    def ways(at, after_gap, attends, left):
        if at == len(blocks):
            if attends:
                yield 0.0, budget.fixed
            return
        for option in blocks[at].options:
            for price, cost in ways(at + 1, False, attends or bool(option.keep.query_heads), left):
                yield price + option.price, cost + option.cost
        for gap in found.gaps if not after_gap else ():
            if gap.blocks[0] == (blocks[at].layer, blocks[at].kind) and len(gap.blocks) <= left:
                for price, cost in ways(at + len(gap.blocks), True, attends, left - len(gap.blocks)):
                    yield price + gap.price, cost

    left = len(blocks) if most_gone is None else most_gone
    return [(price, cost) for price, cost in ways(0, False, False, left) if budget.fits(cost)]


@pytest.mark.parametrize("share", [0.9, 0.6, 0.3])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("budget_of", [weights, milliseconds])
@pytest.mark.parametrize("options", [Allowed(), WHOLE_ONLY])
def test_the_choice_is_the_cheapest_of_all(seed, share, budget_of, options):
    whole = budget_of(1).total(SHAPE)
    budget = budget_of(share * whole + (1 - share) * budget_of(1).fixed)
    found = library(seed, options)
    legal = choices_within(found, budget)
    if not legal:
        with pytest.raises(UserError, match="that these options allow is"):
            search(found, budget)
        return
    plan = search(found, budget).plan
    assert plan.price == pytest.approx(min(price for price, _ in legal), rel=1e-9)
    check_plan(plan, SHAPE)
    assert budget.meets(plan.kept_shape(SHAPE))


@pytest.mark.parametrize("most_gone", [0, 1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_so_many_blocks_go_at_most(seed, most_gone):
    budget = weights(0.4 * SHAPE.layer_weights)
    found = library(seed)
    found = replace(found, gaps=tuple(replace(gap, price=0.1 * gap.price) for gap in found.gaps))
    plan = search(found, budget, most_gone).plan
    assert plan.price == pytest.approx(min(price for price, _ in choices_within(found, budget, most_gone)), rel=1e-9)
    assert sum((not layer.query_heads) + (not layer.ffn) for layer in plan.layers) <= most_gone
    with pytest.raises(UserError, match="that these options allow is"):
        search(found, weights(0.01 * SHAPE.layer_weights), most_gone)


def test_attention_counts_more_than_its_price():
    found = library(0)
    counted = found.counted()
    for place, offers in found.offers.items():
        times = 1.5 if place[1] == "attention" else 1.0
        assert counted.offers[place] == tuple((keep, times * price) for keep, price in offers)
    ratios = {
        "+".join(kind for _, kind in gap.blocks): counted_gap.price / gap.price
        for gap, counted_gap in zip(found.gaps, counted.gaps, strict=True)
    }
    assert ratios["attention"] == 1.5 and ratios["ffn"] == 1.0
    assert ratios["attention+ffn"] == pytest.approx(1.25), "half of the run's blocks"


def test_gaps_go_where_they_are_cheap_and_not_side_by_side():
    """The price of a run is that of the run: two cheap halves of it say nothing about both."""
    found = library(0)
    cheap = [gap for gap in found.gaps if len(gap.blocks) == 1]
    found = replace(found, gaps=tuple(replace(gap, price=0.001) for gap in cheap))
    chosen = search(found, weights(0.45 * SHAPE.layer_weights)).plan
    gone = [(i, kind.name) for i, layer in enumerate(chosen.layers) for kind in (ATTENTION, FFN) if not layer.has(kind)]
    assert gone in ([(0, kind), (1, kind)] for kind in ("attention", "ffn"))
    one = replace(found, gaps=(replace(found.gaps[0], blocks=((1, "attention"), (1, "ffn")), price=0.002),))
    result = search(one, weights(0.6 * SHAPE.layer_weights))
    assert not result.plan.layers[1].blocks
    assert [option.price for option in result.chosen[2:]] == [0.001, 0.001]  # each bears its part


def test_no_block_comes_back_into_the_middle_of_a_run():
    found = library()
    last = len(SHAPE.layers) - 1
    run = ((last, ATTENTION.name), (last, FFN.name))
    gaps = tuple(replace(gap, price=0.002 if gap.blocks == run else 50.0) for gap in found.gaps)
    narrow = min((keep for keep, _ in found.offers[last, FFN.name]), key=lambda keep: len(keep.ffn))
    offers = {
        place: tuple((keep, 0.0005 if keep is narrow else price) for keep, price in kept)
        for place, kept in found.offers.items()
    }
    budget = weights(SHAPE.layer_weights // 2 + 4 * SHAPE.hidden * len(narrow.ffn))  # one layer, and room for it
    plan = search(replace(found, offers=offers, gaps=gaps), budget).plan
    assert plan.layers[last] == LayerPlan() and plan.price == pytest.approx(0.002)


def test_keeping_everything_is_free_and_the_costs_are_the_models():
    found = search(library(), weights(SHAPE.layer_weights))
    assert found.plan.price == 0
    assert sum(o.cost for o in found.chosen) == SHAPE.layer_weights
    assert found.plan.kept_shape(SHAPE) == SHAPE


def test_costs_are_in_the_budgets_unit():
    blocks = library().blocks(milliseconds(2.0))
    assert max(o.cost for o in blocks[0].options) == 0.9  # six query heads in three groups
    assert {round(o.cost, 9) for o in blocks[1].options} == {0.25, 0.45, 0.65, 0.85}  # widths 32, 64, 96, 128


def test_a_budget_that_fits_exactly_is_met_exactly():
    """A solver's tolerance must not become a model that is a little too large."""
    for width in range(32, 129, 32):
        kept = SHAPE.with_layers((LayerSizes(6, 3, width), LayerSizes(6, 3, 96)))
        found = search(library(0, WHOLE_ONLY), weights(kept.layer_weights)).plan
        assert found.kept_shape(SHAPE).layer_weights <= kept.layer_weights


def test_widths_are_whole_groups_and_attention_never_goes_everywhere():
    found = library()
    blocks = found.blocks(weights(1))
    assert all(len(o.keep.ffn) % 32 == 0 and len(o.keep.query_heads) * 16 % 32 == 0 for b in blocks for o in b.options)
    free = replace(found, gaps=tuple(Gap(((0, "ffn"), (1, "attention"), (1, "ffn")), 1.0) for _ in range(1)))
    least = min(o.cost for o in blocks[0].options if o.keep.query_heads)
    plan = search(free, weights(least)).plan  # everything may go but one attention block of the fewest heads
    assert sorted(len(layer.query_heads) for layer in plan.layers) == [0, 2]
    with pytest.raises(UserError, match="the largest that these options allow is"):
        search(free, weights(least - 1))


def test_kept_layers_stay_whole():
    plan = search(library(0, Allowed(keep_layers=frozenset({1}))), weights(0.7 * SHAPE.layer_weights)).plan
    assert plan.layers[1].sizes == SHAPE.layers[1]
    assert plan.layers[0].sizes != SHAPE.layers[0]


def test_the_named_floor_can_be_met_and_less_cannot():
    kept = Allowed(keep_layers=frozenset({1}), keep=frozenset({"blocks"}))
    floor = 1.0 + 0.4 + 0.25 + 0.9 + 0.85  # two heads in one group, width 32; the other layer is whole
    check_floor(replace(milliseconds(floor), allowed=kept))
    assert milliseconds(floor).meets(search(library(0, kept), milliseconds(floor)).plan.kept_shape(SHAPE))
    with pytest.raises(UserError, match=r"asked 3\.39 ms per token, the smallest that these options allow is 3\.4 ms"):
        check_floor(replace(milliseconds(floor - 0.01), allowed=kept))
    with pytest.raises(UserError, match=r"the smallest that these options allow is 1\.4 ms"):
        check_floor(milliseconds(1.3))


def uniform(share):
    """Every FFN loses as much: what a method plans that knows only shares of weights."""
    if share > 0.4:
        raise UserError("no more than 0.4 can go")
    gone = min(n for n in range(0, 129) if 2 * 3 * 96 * n >= share * SHAPE.layer_weights)
    return PrunePlan(tuple(LayerPlan(*whole_layer(s).__dict__.values()) for s in narrowed(gone)))


def narrowed(gone):
    return (LayerSizes(6, 3, 128 - gone),) * 2


@pytest.mark.parametrize("budget", [milliseconds(4.0), weights(0.8 * SHAPE.layer_weights), milliseconds(4.49)])
def test_meet_finds_the_least_share(budget):
    plan = meet(uniform, budget, SHAPE)
    gone = 128 - len(plan.layers[0].ffn)
    first = min(n for n in range(129) if budget.meets(SHAPE.with_layers(narrowed(n))))
    assert budget.meets(plan.kept_shape(SHAPE)) and gone == first


def test_meet_returns_what_meets_although_plans_are_not_monotone():
    """Where a larger share costs more again, what was tried last may not meet the budget."""
    budget = milliseconds(4.2)

    def jagged(share):
        return uniform(share - 0.1 if int(share * 100) % 3 == 0 and share > 0.1 else share)

    plan = meet(jagged, budget, SHAPE)
    assert budget.meets(plan.kept_shape(SHAPE))


def test_meet_fails_with_the_least_that_can_be_had():
    gone = next(n for n in range(129) if 576 * n >= 0.3999 * SHAPE.layer_weights)
    least = 1 + 2 * TABLE.layer_ms(LayerSizes(6, 3, 128 - gone))
    with pytest.raises(UserError, match="asked 2 ms per token, the smallest that these options allow is") as error:
        meet(uniform, milliseconds(2.0), SHAPE)
    named = float(str(error.value).split("allow is ")[1].split()[0])
    assert named == pytest.approx(least, rel=0.01)
    with pytest.raises(UserError, match="nothing can go"):
        meet(refusing, milliseconds(2.0), SHAPE)


def refusing(share):
    raise UserError("nothing can go")


def test_prices_far_below_the_largest_still_count():
    """HiGHS sees differences down to a millionth of the largest price."""
    found = library(0, WHOLE_ONLY)
    small = {
        place: tuple((keep, price * (1e9 if place == (0, "ffn") else 1e-6)) for keep, price in offers)
        for place, offers in found.offers.items()
    }
    whole = weights(1).total(SHAPE)
    budget = weights(round(0.9 * whole))
    result = search(Library(small), budget)
    chosen = result.chosen
    left = budget.limit - sum(option.cost for option in chosen)
    assert left >= 0
    for block, option in zip(result.blocks, chosen, strict=True):
        for other in block.options:
            assert not (0 < other.cost - option.cost <= left and other.price <= option.price)
    best = min(price for price, _ in choices_within(Library(small), budget))
    assert result.plan.price <= best + 2e-6 * max(price for offers in small.values() for _, price in offers)


def test_a_search_that_ends_at_its_limit_says_how_far_from_the_best_it_may_be(monkeypatch):
    from scipy.optimize import OptimizeResult, milp

    budget = weights(0.6 * weights(1).total(SHAPE))
    assert search(library(0), budget).plan.gap == 0

    def stopped(*arguments, **options):
        """HiGHS as it answers at its limit of nodes, which none of our searches has been hard enough to reach."""
        answer = milp(*arguments, **options)
        return OptimizeResult({**answer, "status": 1, "mip_gap": 0.03})

    monkeypatch.setattr("scipy.optimize.milp", stopped)
    assert search(library(0), budget).plan.gap == 0.03
