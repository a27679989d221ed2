"""`saap prune --drop-layers`: whole layers first, then the rest of the requirement in width."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.command_line import here, prune_words, refused
from support.cost_files import cost_file

from saap.models.architectures import shape_of
from saap.models.checkpoint import load_model, read_config
from saap.models.record import read_record
from saap.prune.options import PruneOptions
from saap.prune.pruning import prune
from saap.prune.search.budget import budget_for
from saap.prune.stages import stages_of

IDS = torch.randint(320, (8, 16), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def model(tiny_model):
    return tiny_model(num_hidden_layers=6)


def dropped(plan):
    return [index for index, layer in enumerate(plan.layers) if not layer.query_heads and not layer.ffn]


def test_it_is_shortgpt_and_then_saap(model, tmp_path):
    """To the byte what both give one after the other, with the plan told of the dense model."""
    plan = prune(model, PruneOptions(ratio=0.4, drop_layers=2), output=tmp_path / "slim", calibration=IDS).plan
    shortgpt = prune(
        model, PruneOptions(ratio=0.33, method="shortgpt"), output=tmp_path / "depth", calibration=IDS
    ).plan
    assert len(dropped(shortgpt)) == 2 and dropped(plan) == dropped(shortgpt)
    prune(tmp_path / "depth", PruneOptions(ratio=1 - 0.6 * 6 / 4), output=tmp_path / "width", calibration=IDS)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("slim", "width")]
    assert files[0] == files[1]
    record = read_record(tmp_path / "slim")
    assert record["method"] == "saap" and record["options"]["drop_layers"] == 2 and record["options"]["steps"] == 2
    assert 0.4 <= record["plan"]["achieved"]["ratio"] < 0.46
    assert read_config(tmp_path / "slim")["num_hidden_layers"] == 4
    assert torch.isfinite(load_model(tmp_path / "slim")(input_ids=IDS).logits).all()


def test_layers_that_are_kept_do_not_go(model, tmp_path):
    free = prune(model, PruneOptions(ratio=0.4, drop_layers=2), output=tmp_path / "free", calibration=IDS).plan
    keep = frozenset(dropped(free))
    plan = prune(
        model, PruneOptions(ratio=0.4, drop_layers=2, keep_layers=keep), output=tmp_path / "slim", calibration=IDS
    ).plan
    assert len(dropped(plan)) == 2 and not keep & set(dropped(plan))
    assert {len(plan.layers[i].ffn) for i in keep} == {128} and {len(plan.layers[i].kv_heads) for i in keep} == {3}


def test_the_width_is_scored_as_often_as_it_takes(model):
    config = read_config(model)
    budget = budget_for(PruneOptions(ratio=0.5), shape_of(config), config)
    options = PruneOptions(ratio=0.5)
    assert [stage.layers for stage in stages_of(budget, options)] == [0, 0, 0, 0]
    stages = stages_of(budget, replace(options, drop_layers=1))
    assert [(stage.layers, stage.last) for stage in stages] == [(1, False), (0, False), (0, False), (0, True)]
    limits = [stage.budget.limit / shape_of(config).layer_weights for stage in stages]
    assert limits == pytest.approx([5 / 6, 5 / 6 - 1 / 9, 5 / 6 - 2 / 9, 0.5])
    assert len(stages_of(budget, replace(options, drop_layers=2))) == 3  # 0.25 of what is left
    assert len(stages_of(budget, replace(options, drop_layers=1, stages=1))) == 2
    assert len(stages_of(budget, replace(options, method="flap"))) == 1


def test_a_time_is_met_with_fewer_layers(model, tmp_path, river):
    costs = cost_file(tmp_path / "cost.json")
    here(*prune_words(model, tmp_path / "slim", river, "--speedup", "1.6", "--costs", costs, "--drop-layers", "1"))
    plan = read_record(tmp_path / "slim")["plan"]
    assert plan["achieved"]["speedup"] == pytest.approx(1.6, rel=0.1)
    assert plan["achieved"]["ms_per_token"] <= plan["dense"]["ms_per_token"] / 1.6 * (1 + 1e-9)
    assert read_config(tmp_path / "slim")["num_hidden_layers"] == 5


def test_layers_that_went_have_no_price(model, tmp_path, river):
    asked = ["--ratio", "0.4", "--drop-layers", "2", "--explain"]
    told = here(*prune_words(model, tmp_path / "slim", river, *asked)).stdout
    blocks = read_record(tmp_path / "slim")["plan"]["reasons"]["blocks"]
    gone = {block["layer"] for block in blocks if block["price"] is None}
    assert len(gone) == 2 and len(blocks) == 12
    assert all(block["saved"] == block["whole"] for block in blocks if block["layer"] in gone)
    for layer in gone:
        (row,) = [line for line in told.splitlines() if line.split()[:4] == [str(layer), "0/6", "0/3", "0/128"]]
        assert row.split()[5:] == ["-", "-", "none", "on", "offer", "-"]
    assert "nats per million weights" in told
    first, second = sorted(gone)
    assert f"Layers {first} and {second} went whole, as asked: they change least what passes through." in " ".join(
        told.split()
    )
    assert "100%" not in told


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--ratio 0.3 --drop-layers 2", "--drop-layers 2 is more than has to go: give at most 1, or ask"),
        ("--ratio 0.1 --drop-layers 1", "--drop-layers 1 is more than has to go: leave it out, or ask"),
        ("--ratio 0.3 --drop-layers -1", "--drop-layers -1 is not allowed: give a whole number from 0"),
        ("--ratio 0.9 --drop-layers 6", "--drop-layers 6 leaves no layer: 6 of 6 may go"),
        ("--ratio 0.9 --drop-layers 5 --keep-layers 0-1", "leaves no layer: 4 of 6 may go"),
        ("--ratio 0.4 --drop-layers 1 --method flap", "--drop-layers is for the method saap: leave"),
        ("--ratio 0.99 --drop-layers 1", "asked a ratio of 0.99, the largest that these options allow is"),
    ],
)
def test_what_makes_no_sense(model, tmp_path, river, options, message):
    assert message in refused(*prune_words(model, tmp_path / "slim", river, *options.split()))
    assert not (tmp_path / "slim").exists()
