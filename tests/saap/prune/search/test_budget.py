import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.cost_files import cost_file

from saap.base.errors import UserError
from saap.models.architectures import shape_of
from saap.models.shape import ATTENTION, FFN, LayerSizes
from saap.prune.options import PruneOptions
from saap.prune.search.budget import budget_for

CONFIG: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16,
    "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": 320, "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}  # fmt: skip
DENSE = shape_of(CONFIG)
SLIM = DENSE.with_layers((LayerSizes(6, 3, 96), LayerSizes(2, 1, 64), LayerSizes(0, 0, 32)))
LINEARS = {"attention": 96 * 96 * 2 + 96 * 96, "ffn": 3 * 96 * 128}  # of a dense layer: q and o, k and v; three of 128


@pytest.fixture
def costs(tmp_path: Path) -> Path:
    return cost_file(tmp_path / "cost.json")


def test_a_ratio_is_a_share_of_the_layers_weights() -> None:
    budget = budget_for(PruneOptions(ratio=0.25), DENSE, CONFIG)
    assert budget.unit == "weights" and budget.fixed == 0
    assert budget.limit == 0.75 * 3 * (sum(LINEARS.values()) + 2 * 96)
    assert budget.cost(ATTENTION, LayerSizes(6, 3, 0)) == LINEARS["attention"] + 96
    assert budget.cost(FFN, LayerSizes(0, 0, 64)) == LINEARS["ffn"] // 2 + 96
    assert budget.total(SLIM) == SLIM.layer_weights


def test_parameters_count_the_embedding() -> None:
    budget = budget_for(PruneOptions(max_params=200_000), DENSE, CONFIG)
    assert budget.unit == "parameters" and budget.fixed == 320 * 96 + 96
    assert budget.limit == 200_000 - 320 * 96 - 96
    assert budget.total(SLIM) == SLIM.parameters
    assert budget.meets(SLIM)


def test_bytes_are_those_of_the_weights_file() -> None:
    budget = budget_for(PruneOptions(max_bytes=200_000), DENSE, CONFIG)
    # In pages of 4096 bytes: integers, scales, norm. The last rotary table is no whole page.
    assert budget.cost(FFN, LayerSizes(0, 0, 128)) == (3 + 1 + 2 + 1 + 1) * 4096
    assert budget.cost(ATTENTION, LayerSizes(6, 3, 0)) == (3 + 1 + 2 + 1 + 1) * 4096
    assert budget.fixed == (1 + 4 + 1 + 2) * 4096 + 256 * 8 * 4
    assert budget.total(SLIM) == budget.report(SLIM)["bytes"]
    wider = budget_for(PruneOptions(max_bytes=700_000, bits=32), DENSE, CONFIG)
    assert wider.cost(FFN, LayerSizes(0, 0, 128)) == LINEARS["ffn"] * 4 + 4096


def test_milliseconds_are_the_tables(costs: Path) -> None:
    budget = budget_for(PruneOptions(ms_per_token=4.0, costs=costs), DENSE, CONFIG)
    assert budget.unit == "ms" and (budget.fixed, budget.limit) == (1, 3)
    assert budget.cost(ATTENTION, LayerSizes(2, 1, 0)) == 0.4 and budget.cost(FFN, LayerSizes(0, 0, 80)) == 0.5
    assert budget.total(DENSE) == pytest.approx(6.1)
    assert budget.total(SLIM) == pytest.approx(1 + 0.9 + 0.6 + 0.4 + 0.4 + 0.2)


def test_a_speed_up_is_a_share_of_the_dense_models_time(costs: Path) -> None:
    budget = budget_for(PruneOptions(speedup=1.25, costs=costs), DENSE, CONFIG)
    assert budget.most == pytest.approx(6.1 / 1.25)
    assert budget.report(SLIM)["speedup"] == pytest.approx(6.1 / 3.5)
    assert budget.meets(SLIM) and not budget.meets(DENSE)


def test_a_report_is_in_all_units_that_are_known(costs: Path) -> None:
    plain = budget_for(PruneOptions(ratio=0.2), DENSE, CONFIG)
    assert plain.report(SLIM) == {
        "ratio": 1 - SLIM.layer_weights / DENSE.layer_weights,
        "ratio_of_all": 1 - SLIM.parameters / DENSE.parameters,
        "parameters": SLIM.parameters,
        "bytes": budget_for(PruneOptions(max_bytes=100_000), DENSE, CONFIG).total(SLIM),
    }
    timed = budget_for(PruneOptions(speedup=1.2, costs=costs), DENSE, CONFIG).report(SLIM)
    assert set(timed) == {"ratio", "ratio_of_all", "parameters", "bytes", "ms_per_token", "speedup"}


def test_bytes_are_unknown_where_no_bundle_can_be_made() -> None:
    config = {**CONFIG, "hidden_size": 80}
    budget = budget_for(PruneOptions(ratio=0.2), shape_of(config), config)
    assert budget.report(shape_of(config))["bytes"] is None
    with pytest.raises(UserError, match="the hidden size is 80 wide, which groups of 32 do not divide"):
        budget_for(PruneOptions(max_bytes=100), shape_of(config), config)


def test_added_biases_are_counted_for_what_is_cut_only() -> None:
    cut = replace(DENSE, added_bias=True)
    budget = budget_for(PruneOptions(ratio=0.25), DENSE, CONFIG, cut=cut)
    assert budget.most == 0.75 * DENSE.layer_weights
    assert budget.cost(FFN, LayerSizes(0, 0, 64)) == DENSE.weights(FFN, LayerSizes(0, 0, 64)) + 96


def test_the_record_names_the_table(costs: Path) -> None:
    record = budget_for(PruneOptions(speedup=1.25, costs=costs), DENSE, CONFIG).record()
    assert record["asked"] == {"speedup": 1.25}
    assert record["costs"]["sha256"] == hashlib.sha256(costs.read_bytes()).hexdigest()
    assert record["costs"]["cpu_model"] == "Cortex-A76" and record["costs"]["threads"] == 1
    assert record["dense"]["ms_per_token"] == pytest.approx(6.1)
    assert record["bundle"] == {"bits": 4, "block": 32}
    assert "engine" not in record["costs"]
    json.dumps(record, allow_nan=False)
    assert "costs" not in budget_for(PruneOptions(ratio=0.2, bits=32), DENSE, CONFIG).record()


def test_the_record_names_an_engine_that_is_not_onnxruntime(tmp_path: Path) -> None:
    costs = cost_file(tmp_path / "llama.json", engine="llama.cpp")
    record = budget_for(PruneOptions(speedup=1.25, costs=costs), DENSE, CONFIG).record()
    assert record["costs"]["engine"] == "llama.cpp"


def test_the_share_that_has_to_go(costs: Path) -> None:
    budget = budget_for(PruneOptions(speedup=2, costs=costs), DENSE, CONFIG)
    assert budget.share == pytest.approx(1 - (6.1 / 2 - 1) / 5.1)  # a step takes 1 ms without any layer


@pytest.mark.parametrize("given", [{}, {"ratio": 0.2, "max_bytes": 10}, {"speedup": 2.0, "ms_per_token": 3.0}])
def test_one_requirement_only(given: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="give one requirement: --ratio, --max-params, --max-bytes, --speedup or"):
        PruneOptions(**given).check_requirement()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ratio": math.nan}, "ratio nan is not allowed: give a number between 0 and 1"),
        ({"ratio": 1.0}, "give a number between 0 and 1"),
        ({"max_params": 0}, "max-params 0 is not allowed: give a whole number above 0"),
        ({"max_bytes": -1}, "max-bytes -1 is not allowed: give a whole number above 0"),
        ({"speedup": 1.0}, r"speedup 1.0 is not allowed: give a number above 1"),
        ({"speedup": math.inf}, "speedup inf is not allowed"),
        ({"ms_per_token": math.nan}, "ms-per-token nan is not allowed: give a number above 0"),
        ({"ms_per_token": -2.0}, r"ms-per-token -2.0 is not allowed"),
        ({"speedup": 1.5}, "--speedup needs --costs FILE: measure one on the device with `saap devices costs"),
        ({"ratio": 0.2, "costs": Path("cost.json")}, "--costs is for --speedup and --ms-per-token: leave it out"),
        ({"max_bytes": 9, "threads": 1}, "--threads is for --speedup and --ms-per-token"),
        ({"ratio": 0.2, "bits": 3}, "bits 3 is not allowed: give 4, 8 or 32"),
    ],
)
def test_what_makes_no_sense_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        PruneOptions(**given).check_requirement()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_params": 10**9}, "the model has 224,928 parameters already, which meets 1,000,000,000 parameters"),
        ({"max_bytes": 10**9}, r"the model has 0.24 MB at 4 bit .237,568 bytes. already, which meets 1,000.00 MB"),
        ({"ms_per_token": 6.2}, r"the model has 6.1 ms per token already, which meets 6.2 ms per token"),
    ],
)
def test_what_the_dense_model_meets_is_said(given: dict[str, Any], message: str, costs: Path) -> None:
    timed = {"costs": costs} if "ms_per_token" in given else {}
    with pytest.raises(UserError, match=message):
        budget_for(PruneOptions(**given, **timed), DENSE, CONFIG)


def test_no_plan_is_made_from_an_invalid_table_unless_it_is_accepted(tmp_path: Path) -> None:
    timed = PruneOptions(speedup=1.5, costs=cost_file(tmp_path / "c.json", status="INVALID", reasons=["it waited"]))
    with pytest.raises(UserError, match=r"c.json is INVALID \(it waited\): measure it again .* accept_invalid=true"):
        budget_for(timed, DENSE, CONFIG)
    assert budget_for(replace(timed, accept_invalid=True), DENSE, CONFIG).most == pytest.approx(6.1 / 1.5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ratio": 0.9}, "asked a ratio of 0.9, the largest that these options allow is "),
        (
            {"speedup": 3.0},
            r"the largest that these options allow is 1.742: give a smaller --speedup",
        ),
        ({"ms_per_token": 3.1}, r"asked 3.1 ms per token, the smallest that these options allow is 3.5 ms per token"),
        ({"max_params": 40_000}, "asked 40,000 parameters, the smallest that these options allow is "),
        ({"max_bytes": 50_000}, r"asked 0.05 MB at 4 bit .50,000 bytes., the smallest that these options allow is 0.1"),
    ],
)
def test_the_floor_is_named_in_the_unit_that_was_asked_in(given: dict[str, Any], message: str, costs: Path) -> None:
    timed = {"costs": costs} if {"speedup", "ms_per_token"} & set(given) else {}
    budget = budget_for(PruneOptions(**given, **timed), DENSE, CONFIG)
    with pytest.raises(UserError, match=message):
        raise budget.below_floor(budget.total(SLIM))


@pytest.mark.parametrize("kind", ["ratio", "speedup", "ms_per_token"])
def test_the_floor_that_is_named_can_be_asked_for(kind: str, costs: Path) -> None:
    timed = {} if kind == "ratio" else {"costs": costs}
    tight = {"ratio": 0.99, "speedup": 6.0, "ms_per_token": 1.0}[kind]
    shape = DENSE.with_layers((LayerSizes(2, 1, 71), LayerSizes(0, 0, 37)))
    budget = budget_for(PruneOptions(**{kind: tight}, **timed), DENSE, CONFIG)
    words = str(budget.below_floor(budget.total(shape)))
    named = float(words.split("allow is ")[1].split()[0].rstrip(":"))
    assert budget_for(PruneOptions(**{kind: named}, **timed), DENSE, CONFIG).meets(shape)
