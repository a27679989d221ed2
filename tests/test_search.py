from __future__ import annotations

import itertools

import numpy as np
import pytest

from saap.errors import SaapError
from saap.search import Prices, modules_of, plan_from, solve
from saap.structures import LayerSizes, ModelShape, check_plan

SHAPE = ModelShape(hidden=96, head_dim=16, vocab=320, tied=True, layers=(LayerSizes(6, 3, 128),) * 2)


def prices(seed=0, modules=True, alpha=0.0):
    rng = np.random.default_rng(seed)
    return Prices(
        ffn=[rng.random(128) for _ in range(2)],
        head=[rng.random(6) * 5 for _ in range(2)],
        group=[rng.random(3) * 15 for _ in range(2)],
        no_attention=list(rng.random(2) * 60) if modules else [None, None],
        no_ffn=list(rng.random(2) * 80) if modules else [None, None],
        alpha={"ffn": alpha, "head": alpha, "group": alpha},
    )


@pytest.mark.parametrize("share", [0.9, 0.6, 0.3])
@pytest.mark.parametrize("seed", range(3))
def test_the_choice_is_the_cheapest_of_all(seed, share):
    modules = modules_of(SHAPE, prices(seed), 32)
    budget = share * SHAPE.layer_weights
    every = itertools.product(*(m.options for m in modules))
    legal = [c for c in every if sum(o.cost for o in c) <= budget and any(o.keep.query_heads for o in c)]
    best = min(sum(o.price for o in c) for c in legal)
    chosen = solve(modules, budget, "weights")
    assert sum(o.cost for o in chosen) <= budget
    assert sum(o.price for o in chosen) == pytest.approx(best, rel=1e-4)
    check_plan(plan_from(modules, chosen, SHAPE), SHAPE)


def test_keeping_everything_is_free_and_the_costs_are_the_models():
    modules = modules_of(SHAPE, prices(), 32)
    chosen = solve(modules, SHAPE.layer_weights, "weights")
    assert sum(o.price for o in chosen) == 0
    assert sum(o.cost for o in chosen) == SHAPE.layer_weights
    assert plan_from(modules, chosen, SHAPE).kept_shape(SHAPE) == SHAPE


def test_widths_are_whole_groups_and_attention_never_goes_everywhere():
    modules = modules_of(SHAPE, prices(), 32)
    assert all(len(o.keep.ffn) % 32 == 0 and len(o.keep.query_heads) * 16 % 32 == 0 for m in modules for o in m.options)
    floor = sum(min(o.cost for o in m.options) for m in modules)
    # One attention block has to stay, so the floor itself cannot be met.
    with pytest.raises(SaapError, match="no choice of options"):
        solve(modules, floor, "weights")


def test_kept_layers_stay_whole():
    plan = plan_from(
        *(lambda m: (m, solve(m, 0.7 * SHAPE.layer_weights, "weights"), SHAPE))(
            modules_of(SHAPE, prices(modules=False), 32, frozenset({1}))
        )
    )
    assert plan.layers[1].sizes == SHAPE.layers[1]
    assert plan.layers[0].sizes != SHAPE.layers[0]


def test_interaction_spreads_the_removal():
    """With equal prices everywhere a convex price must not empty one layer and spare the other."""
    flat = prices(modules=False, alpha=4.0)
    flat.ffn[:] = [np.ones(128), np.ones(128)]
    flat.group[:] = [np.full(3, 1e6)] * 2
    flat.head[:] = [np.full(6, 1e6)] * 2
    plan = plan_from(
        *(lambda m: (m, solve(m, 0.8 * SHAPE.layer_weights, "weights"), SHAPE))(modules_of(SHAPE, flat, 32))
    )
    widths = [len(layer.ffn) for layer in plan.layers]
    assert abs(widths[0] - widths[1]) <= 32


def test_a_budget_below_the_floor_names_the_floor():
    with pytest.raises(SaapError, match="below the floor of"):
        solve(modules_of(SHAPE, prices(modules=False), 32), 10, "weights")
