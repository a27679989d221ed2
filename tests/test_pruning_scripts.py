"""The arithmetic, the cells and the resuming of the scripts that measure pruning."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from saap.architectures import shape_of
from saap.checkpoint import load_model, read_config
from saap.masking import masked, mean_nll
from saap.search import Module, Option
from saap.structures import LayerPlan, PrunePlan, whole_layer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import pruning_prices as prices
from pruning_bench import options_of

IDS = torch.randint(320, (10, 24), generator=torch.Generator().manual_seed(2))
HELD = torch.randint(320, (3, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def judged(tiny_model):
    """The tiny model, and 20 of its options priced and measured."""
    directory = tiny_model(head_dim=32)
    model = load_model(directory)
    options = options_of({"ratio": 0.3})
    budget = options.requirement.budget(shape_of(model.config), read_config(directory))
    return model, prices.judged(model, IDS, HELD, options, budget, None, count=20, seed=1)


def test_options_of_all_types_and_depths_are_priced_and_measured(judged):
    model, record = judged
    shape = shape_of(model.config)
    counts = {}
    for point in record["points"]:
        counts[point["type"]] = counts.get(point["type"], 0) + 1
    # Three layers have one option each without a module, and one with fewer query heads in every group.
    assert counts == {"FFN width": 4, "KV groups": 4, "no FFN": 3, "no attention": 3, "query heads": 3}
    for kind in counts:
        assert {p["layer"] for p in record["points"] if p["type"] == kind} >= {0, 2}
    point = next(p for p in record["points"] if p["type"] == "no attention" and p["layer"] == 1)
    base = mean_nll(model, HELD)
    with masked(model, {1: LayerPlan((), (), whole_layer(shape.layers[1]).ffn)}, 32):
        assert point["alone"] == pytest.approx(mean_nll(model, HELD) - base, abs=1e-4)
    assert abs(point["alone"]) > 1e-3


def test_on_a_plan_a_module_counts_from_whole(tiny_model):
    model = load_model(tiny_model())
    shape = shape_of(model.config)
    whole = [whole_layer(sizes) for sizes in shape.layers]
    kept = {width: LayerPlan((), (), tuple(range(width))) for width in (32, 64, 128)}
    plan = PrunePlan((prices.with_module(whole[0], "ffn", kept[64]), *whole[1:]))
    drawn = [("FFN width", Module(0, "ffn", ()), Option(kept[width], 1.0, 1.0)) for width in (32, 128)]
    base = mean_nll(model, HELD)
    with masked(model, {0: prices.with_module(whole[0], "ffn", kept[32])}, 16):
        quarter = mean_nll(model, HELD)
    found = prices.increases(model, shape, plan, drawn, HELD)
    assert found == pytest.approx([quarter - base, 0], abs=1e-5) and abs(quarter - base) > 1e-3


def test_rank_correlation_is_of_ranks():
    found = prices.rank_correlation([1, 2, 3, 4, 5, 6], [0.1, 0.2, 10, 20, 30, 300])
    assert found == {"rho": pytest.approx(1), "low": pytest.approx(1), "high": pytest.approx(1)}
    found = prices.rank_correlation([1, 2, 3, 4], [2, 1, 4, 3])
    assert found["rho"] == pytest.approx(1 - 6 * 4 / (4 * 15)) and found["low"] < found["rho"] < found["high"]
    assert prices.rank_correlation([1, 1, 1], [1, 2, 3]) == {"rho": None, "low": None, "high": None}


def test_variants_are_judged_by_the_same_options(tiny_model):
    directory = tiny_model()
    model, drawn = load_model(directory), []
    for variant in ({"score": "token"}, {"score": "vector", "corrections": 1}):
        options = options_of({**variant, "ratio": 0.3})
        budget = options.requirement.budget(shape_of(model.config), read_config(directory))
        record = prices.judged(model, IDS, HELD, options, budget, None, count=12)
        drawn.append([(p["layer"], p["type"], p["keep"]) for p in record["points"]])
    assert drawn[0] == drawn[1]
