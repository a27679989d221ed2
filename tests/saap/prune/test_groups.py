"""Group size as something that the search chooses, by what the device's table of costs says of larger groups."""

from __future__ import annotations

import json

import pytest
import torch
from support.command_line import here, refused
from support.cost_files import cost_file

from export import ExportOptions, export
from export.bundle.manifest import read_manifest
from saap.models.checkpoint import load_model, read_config
from saap.models.record import read_record
from saap.prune import PruneOptions, prune
from saap.prune.pruning import budget_of
from saap.prune.search.layer_costs import read_costs
from saap.prune.search.rounding import rounding_prices
from saap.quantize.groups import quantize
from saap.system.errors import UserError
from saap.tune import TuneOptions, tune

IDS = torch.randint(320, (8, 16), generator=torch.Generator().manual_seed(0))
# A step takes 1 + 4 * (0.9 + 0.8) = 7.8 ms; in groups of 64 it takes 0.7 + 4 * (0.72 + 0.6) = 5.98 ms, 1.304x.
GROUPS = [{"group_size": 64, "attention_ms": 0.72, "ffn_ms": 0.6, "outside_ms": 0.7}]


@pytest.fixture
def model(tiny_model):
    return tiny_model(
        hidden_size=128, num_attention_heads=8, num_key_value_heads=4, head_dim=16, intermediate_size=512,
        num_hidden_layers=4,
    )  # fmt: skip


@pytest.fixture
def costs(tmp_path):
    path = cost_file(tmp_path / "cost.json")
    table = json.loads(path.read_text())
    table["model"]["hidden"] = 128
    attention = [
        {"query_heads": q, "kv_heads": kv, "ms": 0.1 + 0.8 * q / 8} for q, kv in ((1, 1), (2, 1), (4, 4), (8, 4))
    ]
    ffn = [{"width": 64, "ms": 0.2}, {"width": 512, "ms": 0.8}]
    table["threads"][0] |= {"attention": attention, "ffn": ffn, "groups": GROUPS}
    path.write_text(json.dumps(table))
    return path


def pruned(model, costs, out, speedup, **options):
    options = PruneOptions(costs=costs, speedup=speedup, keep_layers=None, **options)
    result = prune(model, options, output=out, calibration=IDS)
    return result, read_record(out)["plan"]


def test_larger_groups_come_before_pruning(model, costs, tmp_path, monkeypatch):
    monkeypatch.setattr("saap.prune.search.adaptive.rounding_prices", lambda *args: {32: 0.1, 64: 0.1})
    result, plan = pruned(model, costs, tmp_path / "slim", 1.2)
    assert plan["bundle"]["block"] == 64 and result.plan.group_size == 64
    assert plan["layers"] == [
        {name: list(range(count)) for name, count in sizes.items()} for sizes in plan["dense_layers"]
    ]  # nothing goes
    assert plan["dense"]["ms_per_token"] == pytest.approx(7.8) and plan["dense"]["speedup"] == 1
    assert plan["planned"]["ms_per_token"] == pytest.approx(5.98)
    assert plan["achieved"]["speedup"] == pytest.approx(7.8 / 5.98)

    more, plan = pruned(model, costs, tmp_path / "more", 2.0)
    assert plan["bundle"]["block"] == 64 and plan["achieved"]["speedup"] >= 2
    assert all(len(layer.ffn) % 64 == 0 for layer in more.plan.layers)
    assert all(len(layer.query_heads) * 16 % 64 == 0 for layer in more.plan.layers)
    alone, _ = pruned(model, costs, tmp_path / "alone", 2.0, group_size=32)
    assert more.budget.dense.layer_weights == alone.budget.dense.layer_weights
    assert more.achieved["parameters"] > alone.achieved["parameters"]


def test_bytes_have_groups_too(model, tmp_path, monkeypatch):
    monkeypatch.setattr("saap.prune.search.adaptive.rounding_prices", lambda *args: {32: 0.1, 64: 0.1, 128: 0.1})
    whole = budget_of(model, PruneOptions(ratio=0.1)).report_dense()["bytes"]
    options = PruneOptions(max_bytes=int(0.8 * whole), keep_layers=None)
    assert [each.group_size for each in budget_of(model, options).each] == [32, 64, 128]
    result = prune(model, options, output=tmp_path / "slim", calibration=IDS)
    assert result.plan.group_size in (64, 128)
    export(tmp_path / "slim", output=tmp_path / "bundle", options=ExportOptions(parity="none"))
    real = (tmp_path / "bundle/model.onnx.data").stat().st_size
    assert (
        real == result.achieved["bytes"] == read_record(tmp_path / "slim")["plan"]["achieved"]["bytes"] <= 0.8 * whole
    )


def test_tuning_and_export_take_the_groups(model, costs, tmp_path):
    pruned(model, costs, tmp_path / "slim", 1.2)
    tune(tmp_path / "slim", TuneOptions(tokens=64, length=16), output=tmp_path / "tuned", data=IDS)
    assert read_config(tmp_path / "tuned")["slim_quant"]["block"] == 64
    export(tmp_path / "slim", output=tmp_path / "bundle")
    assert read_manifest(tmp_path / "bundle").block == 64
    tune(tmp_path / "slim", TuneOptions(tokens=64, length=16, group_size=32), output=tmp_path / "own", data=IDS)
    assert read_config(tmp_path / "own")["slim_quant"]["block"] == 32
    tune(model, TuneOptions(tokens=64, length=16), output=tmp_path / "dense", data=IDS)
    assert read_config(tmp_path / "dense")["slim_quant"]["block"] == 32


def test_it_is_told(model, costs, tmp_path):
    (tmp_path / "text.txt").write_text("The boats came home before the storm, and nobody was lost at sea.\n" * 400)
    done = here("prune", model, "-o", tmp_path / "slim", "--speedup", 1.2, "--costs", costs, "--sequences", 8,
                "--length", 16, "--calibration", tmp_path / "text.txt")  # fmt: skip
    assert "64 weights share a scale, 32 in the dense model; saap tune and export will use this" in done.stdout


def test_what_is_asked_for_is_kept(model, costs, tmp_path):
    budget = budget_of(model, PruneOptions(costs=costs, speedup=2.0))
    assert [each.group_size for each in budget.each] == [32, 64]
    assert [
        each.group_size for each in budget_of(model, PruneOptions(costs=costs, speedup=2.0, group_size=32)).each
    ] == [32]
    (only,) = budget_of(model, PruneOptions(costs=costs, speedup=2.0, group_size=64)).each
    assert only.group_size == 64 and only.report_dense()["ms_per_token"] == pytest.approx(7.8)
    (flap,) = budget_of(model, PruneOptions(costs=costs, speedup=2.0, method="flap")).each
    assert flap.group_size == 32
    with pytest.raises(UserError, match="was measured for a model with block 32, not block 128"):
        budget_of(model, PruneOptions(costs=costs, speedup=2.0, group_size=128))
    # Without blocks that go and heads, 32 weights to a scale do not reach what 64 do.
    floors = [
        refused(
            "prune", model, "-o", tmp_path / "slim", "--speedup", 99, "--costs", costs, "--keep", "blocks,heads", *own
        )
        for own in ((), ("--group-size", 32))
    ]
    largest = [float(floor.split("allow is ")[1].split(":")[0]) for floor in floors]
    assert largest[0] > 1.1 * largest[1]


def test_a_table_in_larger_groups(model, costs):
    from saap.models.architectures import shape_of
    from saap.models.shape import LayerSizes

    table = read_costs(costs, shape_of(read_config(model)), bits=4, group_size=64)
    larger = table.in_groups_of(64)
    assert larger.total_ms([LayerSizes(8, 4, 512)] * 4) == pytest.approx(5.98)
    assert larger.ffn_ms(64) == pytest.approx(0.75 * table.ffn_ms(64))
    assert larger.attention_ms(4, 4) == pytest.approx(0.8 * table.attention_ms(4, 4))
    with pytest.raises(KeyError):
        table.in_groups_of(128)


@torch.no_grad()
def test_the_price_of_rounding_is_the_divergence(model):
    found = load_model(model)
    prices = rounding_prices(found, IDS, 4, (32, 64))
    whole = found(input_ids=IDS[:4]).logits.log_softmax(-1)
    kept = {name: p.clone() for name, p in found.named_parameters()}
    for group_size, price in prices.items():
        for name, p in found.named_parameters():
            if p.ndim == 2:
                p.data = quantize(kept[name], 4, group_size).dequantize()
        own = found(input_ids=IDS[:4]).logits.log_softmax(-1)
        expected = torch.nn.functional.kl_div(own, whole, log_target=True, reduction="sum") / IDS[:4].numel()
        assert price == pytest.approx(float(expected), rel=1e-3)
        for name, p in found.named_parameters():
            p.data = kept[name].clone()
    assert 0 < prices[32] < prices[64]
