import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saap.base.errors import UserError
from saap.models.shape import LayerSizes, ModelShape
from saap.prune.baselines.plans import Ranking, block_removals, threshold_key, uniform_key
from saap.prune.plan import check_plan, widths_of

SMOLLM2 = ModelShape(576, 64, 49152, True, (LayerSizes(9, 3, 1536),) * 30)
SHAPES = [
    SMOLLM2.with_layers(SMOLLM2.layers[:12]),
    ModelShape(96, 16, 320, True, (LayerSizes(6, 3, 128),) * 3),
    ModelShape(
        64, 32, 320, False, (LayerSizes(8, 8, 600), LayerSizes(4, 2, 352), LayerSizes(0, 0, 64), LayerSizes(2, 1, 0))
    ),
]


@functools.cache
def ranking_of(method, shape, heads, block, seed):
    """A ranking of random scores, without a model."""
    draw = torch.Generator().manual_seed(seed)
    steps = []
    for place, sizes in enumerate(shape.layers):
        for kind, count in (("ffn", sizes.ffn), *((("group", sizes.kv_heads),) if heads else ())):
            scores = torch.randn(count, generator=draw)
            key = threshold_key(scores) if method == "flap" else uniform_key(place, kind)
            steps += [step.at(key(step)) for step in block_removals(shape, place, kind, scores, block)]
    return Ranking(method, shape, tuple(sorted(steps, key=lambda step: step.key)))


@given(
    st.sampled_from(SHAPES), st.sampled_from(["flap", "wanda_sp"]), st.booleans(), st.sampled_from([32, 64]),
    st.floats(0, 0.999), st.floats(0, 0.999), st.integers(0, 1),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_plans_are_on_the_grid_and_never_below_the_share(shape, method, heads, block, share, other, seed):
    ranking = ranking_of(method, shape, heads, block, seed)
    if share > ranking.largest_share + 1e-12:
        with pytest.raises(UserError, match="at most"):
            ranking.plan_at(share)
        return
    plan = ranking.plan_at(share)
    check_plan(plan, shape)
    removed = shape.layer_weights - plan.kept_shape(shape).layer_weights
    assert removed >= share * shape.layer_weights * (1 - 1e-9)
    assert removed - share * shape.layer_weights <= max(step.weights for step in ranking.removals)
    if shape is SHAPES[0]:
        assert removed / shape.layer_weights - share < 0.005
    for keep, sizes in zip(plan.layers, shape.layers, strict=True):
        assert len(keep.ffn) in widths_of(sizes.ffn, block) if sizes.ffn else not keep.ffn
        if len(keep.kv_heads) < sizes.kv_heads:
            assert heads and len(keep.query_heads) * shape.head_dim % block == 0
    smaller = min(share, other)
    assert shape.layer_weights - ranking.plan_at(smaller).kept_shape(shape).layer_weights <= removed
    assert (
        ranking.plan_at(removed / shape.layer_weights).kept_shape(shape).layer_weights == shape.layer_weights - removed
    )


@pytest.mark.parametrize("share", [0.1, 0.2, 0.37, 0.5])
def test_one_ratio_means_at_most_one_notch_between_layers(share):
    layers = ranking_of("wanda_sp", SMOLLM2, True, 32, 0).plan_at(share).layers
    widths = {len(layer.ffn) for layer in layers}
    assert max(widths) - min(widths) <= 64
    groups = [len(layer.kv_heads) for layer in layers]
    assert max(groups) - min(groups) <= 1
    assert sum(groups) / 90 == pytest.approx(1 - share, abs=0.035)
    assert sum(len(layer.ffn) for layer in layers) / (30 * 1536) == pytest.approx(1 - share, abs=0.02)
    # What is uneven is spread: no third of the layers carries more than its part and two.
    fewer = [i for i, n in enumerate(groups) if n == min(groups)]
    for start in (0, 10, 20):
        assert abs(sum(start <= i < start + 10 for i in fewer) - len(fewer) / 3) <= 2


def test_a_threshold_is_global_and_rounds_widths_to_the_grid():
    shape = ModelShape(96, 16, 320, True, (LayerSizes(6, 3, 128),) * 2)
    low, high = torch.arange(128) / 128 - 3, torch.arange(128) / 128 + 3
    steps = [
        s.at(threshold_key(v)(s)) for i, v in enumerate((low, high)) for s in block_removals(shape, i, "ffn", v, 32)
    ]
    ranking = Ranking("flap", shape, tuple(sorted(steps, key=lambda s: s.key)))
    per_step = 3 * 32 * 96
    plan = ranking.plan_at(2 * per_step / shape.layer_weights)
    assert plan.layers[0].ffn == tuple(range(64, 128))
    assert plan.layers[1].ffn == tuple(range(128))
    assert [s.key for s in ranking.removals[:3]] == pytest.approx([15 / 128 - 3, 47 / 128 - 3, 79 / 128 - 3])


def test_the_rest_is_filled_by_the_step_that_overshoots_least():
    shape = ModelShape(96, 16, 320, True, (LayerSizes(6, 3, 128),) * 2)
    group = block_removals(shape, 0, "group", torch.tensor([1.0, 2.0, 3.0]), 32)[0].at(0.0)
    ffn = [s.at(1.0) for s in block_removals(shape, 1, "ffn", torch.arange(128.0), 32)]
    ranking = Ranking("flap", shape, (group, *ffn))
    assert (group.weights, ffn[0].weights) == (96 * 96, 3 * 32 * 96)
    assert ranking.plan_at(0.9 * group.weights / shape.layer_weights).layers[0].kv_heads == (1, 2)
    small = block_removals(shape, 1, "ffn", torch.arange(128.0), 8)[:9]
    ranking = Ranking("flap", shape, (group, *(s.at(1.0) for s in small)))
    plan = ranking.plan_at(2.5 * small[0].weights / shape.layer_weights)
    assert (plan.layers[0].kv_heads, len(plan.layers[1].ffn)) == ((0, 1, 2), 128 - 24)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(UserError, match="give one from 0 to below 1"):
        ranking_of("flap", SMOLLM2, True, 32, 0).plan_at(share)
