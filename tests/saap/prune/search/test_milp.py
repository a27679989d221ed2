from __future__ import annotations

import itertools

import numpy as np
import pytest
from support.search_cases import SHAPE, TABLE, milliseconds, prices, weights

from saap.models.shape import LayerSizes
from saap.prune.baselines.plans import meet
from saap.prune.options import PruneOptions
from saap.prune.plan import LayerPlan, PrunePlan, check_plan, composed, whole_layer
from saap.prune.search.milp import blocks_of, check_floor, plan_from, search, solve
from saap.system.errors import UserError


def options_of(prices, budget, keep=frozenset()):
    return blocks_of(SHAPE, prices, budget, PruneOptions(keep_layers=keep))


def solved(prices, budget, keep=frozenset()):
    modules = options_of(prices, budget, keep)
    return plan_from(modules, solve(modules, budget).options, SHAPE)


@pytest.mark.parametrize("share", [0.9, 0.6, 0.3])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("budget_of", [weights, milliseconds])
def test_the_choice_is_the_cheapest_of_all(seed, share, budget_of):
    whole = budget_of(1).total(SHAPE)
    budget = budget_of(share * whole + (1 - share) * budget_of(1).fixed)
    modules = options_of(prices(seed), budget)
    every = itertools.product(*(m.options for m in modules))
    costs = ((c, budget.fixed + sum(o.cost for o in c)) for c in every if any(o.keep.query_heads for o in c))
    legal = [c for c, cost in costs if budget.fits(cost)]
    best = min(sum(o.price for o in c) for c in legal)
    chosen = solve(modules, budget).options
    assert sum(o.price for o in chosen) == pytest.approx(best, rel=1e-9)
    plan = plan_from(modules, chosen, SHAPE)
    check_plan(plan, SHAPE)
    assert budget.meets(plan.kept_shape(SHAPE))


def test_keeping_everything_is_free_and_the_costs_are_the_models():
    budget = weights(SHAPE.layer_weights)
    modules = options_of(prices(), budget)
    chosen = solve(modules, budget).options
    assert sum(o.price for o in chosen) == 0
    assert sum(o.cost for o in chosen) == SHAPE.layer_weights
    assert plan_from(modules, chosen, SHAPE).kept_shape(SHAPE) == SHAPE


def test_costs_are_in_the_budgets_unit():
    modules = options_of(prices(), milliseconds(2.0))
    assert max(o.cost for o in modules[0].options) == 0.9  # six query heads in three groups
    assert {round(o.cost, 9) for o in modules[1].options} == {0, 0.25, 0.45, 0.65, 0.85}  # widths 0, 32, 64, 96, 128


def test_a_budget_that_fits_exactly_is_met_exactly():
    """A solver's tolerance must not become a model that is a little too large."""
    for width in range(32, 129, 32):
        kept = SHAPE.with_layers((LayerSizes(6, 3, width), LayerSizes(6, 3, 96)))
        budget = weights(kept.layer_weights)
        assert solved(prices(modules=False), budget).kept_shape(SHAPE).layer_weights <= kept.layer_weights


def test_widths_are_whole_groups_and_attention_never_goes_everywhere():
    modules = options_of(prices(), weights(1))
    assert all(len(o.keep.ffn) % 32 == 0 and len(o.keep.query_heads) * 16 % 32 == 0 for m in modules for o in m.options)
    least = min(o.cost for o in modules[0].options if o.keep.query_heads)
    budget = weights(least)  # everything may go but one attention block of the fewest heads
    plan = plan_from(modules, solve(modules, budget).options, SHAPE)
    assert sorted(len(layer.query_heads) for layer in plan.layers) == [0, 2]
    with pytest.raises(UserError, match="the largest that these options allow is"):
        solve(modules, weights(least - 1))


def test_kept_layers_stay_whole():
    plan = solved(prices(modules=False), weights(0.7 * SHAPE.layer_weights), frozenset({1}))
    assert plan.layers[1].sizes == SHAPE.layers[1]
    assert plan.layers[0].sizes != SHAPE.layers[0]


def test_interaction_spreads_the_removal():
    """With equal prices everywhere a convex price must not empty one layer and spare the other."""
    flat = prices(modules=False, alpha=4.0)
    flat.structures["ffn"][:] = [np.ones(128), np.ones(128)]
    flat.structures["group"][:] = [np.full(3, 1e6)] * 2
    flat.structures["head"][:] = [np.full(6, 1e6)] * 2
    plan = solved(flat, weights(0.8 * SHAPE.layer_weights))
    widths = [len(layer.ffn) for layer in plan.layers]
    assert abs(widths[0] - widths[1]) <= 32


def test_the_named_floor_can_be_met_and_less_cannot():
    keep = frozenset({1})
    floor = 1.0 + 0.4 + 0.25 + 0.9 + 0.85  # two heads in one group, width 32; the other layer is whole
    check_floor(SHAPE, milliseconds(floor), PruneOptions(keep_layers=keep))
    assert milliseconds(floor).meets(solved(prices(modules=False), milliseconds(floor), keep).kept_shape(SHAPE))
    with pytest.raises(UserError, match=r"asked 3\.39 ms per token, the smallest that these options allow is 3\.4 ms"):
        check_floor(SHAPE, milliseconds(floor - 0.01), PruneOptions(keep_layers=keep))
    with pytest.raises(UserError, match=r"the smallest that these options allow is 1\.4 ms"):
        check_floor(SHAPE, milliseconds(1.3), PruneOptions(modules=True))


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
    least = 1 + 2 * (0.9 + TABLE.ffn_ms(128 - next(n for n in range(129) if 576 * n >= 0.3999 * SHAPE.layer_weights)))
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
    small = prices(0, modules=False)
    small.structures["ffn"][0] *= 1e9
    for part in (small.structures["ffn"][1:], small.structures["head"], small.structures["group"]):
        for values in part:
            values *= 1e-6
    whole = weights(1).total(SHAPE)
    budget = weights(round(0.9 * whole))
    modules = options_of(small, budget)
    chosen = solve(modules, budget).options
    left = budget.limit - sum(option.cost for option in chosen)
    assert left >= 0
    for module, option in zip(modules, chosen, strict=True):
        for other in module.options:
            assert not (0 < other.cost - option.cost <= left and other.price <= option.price)
    legal = [c for c in itertools.product(*(m.options for m in modules)) if sum(o.cost for o in c) <= budget.limit]
    best = min(sum(o.price for o in c) for c in legal)
    assert sum(o.price for o in chosen) <= best + 2e-6 * max(o.price for m in modules for o in m.options)


def test_a_search_that_ends_at_its_limit_says_how_far_from_the_best_it_may_be(monkeypatch):
    from scipy.optimize import OptimizeResult, milp

    budget = weights(0.6 * weights(1).total(SHAPE))
    assert search(prices(0), budget, PruneOptions()).plan.gap == 0

    def stopped(*arguments, **options):
        """HiGHS as it answers at its limit of nodes, which none of our searches has been hard enough to reach."""
        answer = milp(*arguments, **options)
        return OptimizeResult({**answer, "status": 1, "mip_gap": 0.03})

    monkeypatch.setattr("scipy.optimize.milp", stopped)
    plan = search(prices(0), budget, PruneOptions()).plan
    assert plan.gap == 0.03 and composed(PrunePlan(()), PrunePlan((), gap=0.03)).gap == 0.03
