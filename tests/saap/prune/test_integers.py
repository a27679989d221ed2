"""Bits and group size of each matrix as something that the search chooses, by what the device's table says of them."""

import json

import pytest
import torch
from support.command_line import here, refused
from support.cost_files import cost_file

from export import ExportOptions, export
from export.bundle.manifest import read_manifest
from saap.base.errors import UserError
from saap.models.checkpoint import load_model, read_config
from saap.models.record import read_record
from saap.models.slim_quant import MatrixForm
from saap.prune import PruneOptions, prune
from saap.prune.pruning import budget_of
from saap.prune.search.choices import Allowed
from saap.prune.search.library import Pricing
from saap.quantize.choose_forms import rounded
from saap.tune import TuneOptions, tune

IDS = torch.randint(320, (8, 16), generator=torch.Generator().manual_seed(0))
# A step takes 1 + 4 * (0.9 + 0.8) = 7.8 ms; in groups of 64 it takes 0.7 + 4 * (0.72 + 0.6) = 5.98 ms, 1.304x.
LARGER = {"bits": 4, "group_size": 64, "attention_ms": 0.72, "ffn_ms": 0.6, "outside_ms": 0.7}
# In 8 bits an attention block is as fast as in 4, an FFN slower, and the head was not timed.
WIDER = {"bits": 8, "group_size": 64, "attention_ms": 0.9, "ffn_ms": 1.6}
MODULES = {
    "attention": (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",)),
    "ffn": (("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)),
}
BASE, LARGE, WIDE = MatrixForm(4, 32), MatrixForm(4, 64), MatrixForm(8, 64)


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
    table["threads"][0] |= {"attention": attention, "ffn": ffn, "forms": [LARGER, WIDER]}
    path.write_text(json.dumps(table))
    return path


def pruned(model, costs, out, speedup, **options):
    options = PruneOptions(costs=costs, speedup=speedup, keep_layers=None, **options)
    result = prune(model, options, output=out, calibration=IDS)
    return result, read_record(out)["plan"]


def test_faster_integers_come_before_pruning(model, costs, tmp_path):
    result, plan = pruned(model, costs, tmp_path / "slim", 1.2)
    assert plan["layers"] == [
        {name: list(range(count)) for name, count in sizes.items()} for sizes in plan["dense_layers"]
    ]  # nothing goes
    forms = result.plan.forms
    assert plan["bundle"]["bits"] == 4 and set(forms.blocks) == {
        (i, kind) for i in range(4) for kind in ("attention", "ffn")
    }
    assert LARGE in {form for held in forms.blocks.values() for form in held}
    assert plan["dense"]["ms_per_token"] == pytest.approx(7.8) and plan["dense"]["speedup"] == 1
    assert 7.8 / 1.2 >= plan["planned"]["ms_per_token"] == plan["achieved"]["ms_per_token"] > 5.98
    # 8 bits cost nothing where they take no more time, so what reads of attention has them.
    assert forms.blocks[0, "attention"].reads == WIDE and forms.vocabulary in (BASE, LARGE)
    told = plan["reasons"]["integers"]
    assert told["saved"] == pytest.approx(7.8 - plan["planned"]["ms_per_token"]) and told["count"] > 0

    more, plan = pruned(model, costs, tmp_path / "more", 2.0)
    assert plan["achieved"]["speedup"] >= 2
    alone, _ = pruned(model, costs, tmp_path / "alone", 2.0, group_size=32)
    assert alone.plan.forms is None and more.plan.price < alone.plan.price + 1
    assert more.achieved["parameters"] > alone.achieved["parameters"]


def test_a_step_is_the_sum_of_matrices_in_their_integers(model, costs, tmp_path):
    result, plan = pruned(model, costs, tmp_path / "slim", 1.25)
    table = result.budget.table
    ms = table.outside_ms() * (0.7 if result.plan.forms.vocabulary == LARGE else 1.0)
    whole = {"attention": 0.9, "ffn": 0.8}
    writes = {"attention": 128 * 128 / (2 * 128 * 128 + 2 * 64 * 128 + 128), "ffn": 512 * 128 / (3 * 512 * 128 + 128)}
    share = {"attention": {BASE: 1.0, LARGE: 0.8, WIDE: 1.0}, "ffn": {BASE: 1.0, LARGE: 0.75, WIDE: 2.0}}
    for (_, kind), held in result.plan.forms.blocks.items():
        of = share[kind]
        ms += whole[kind] * ((1 - writes[kind]) * of[held.reads] + writes[kind] * of[held.writes])
    assert plan["planned"]["ms_per_token"] == pytest.approx(ms)


def test_bytes_have_integers_too(model, tmp_path):
    whole = budget_of(model, PruneOptions(ratio=0.1)).report_dense()["bytes"]
    options = PruneOptions(max_bytes=int(0.9 * whole), keep_layers=None)
    assert budget_of(model, options).forms == ((4, 64), (4, 128), (8, 32), (8, 64), (8, 128))
    result = prune(model, options, output=tmp_path / "slim", calibration=IDS)
    assert len({form for held in result.plan.forms.blocks.values() for form in held}) > 1
    export(tmp_path / "slim", output=tmp_path / "bundle", options=ExportOptions(parity="none"))
    real = (tmp_path / "bundle/model.onnx.data").stat().st_size
    assert real == read_record(tmp_path / "slim")["plan"]["achieved"]["bytes"] <= 0.9 * whole
    assert result.achieved["bytes"] == real


def test_tuning_and_export_take_the_integers(model, costs, tmp_path):
    result, plan = pruned(model, costs, tmp_path / "slim", 1.2)
    tune(tmp_path / "slim", TuneOptions(tokens=64, length=16), output=tmp_path / "tuned", data=IDS)
    quant = read_config(tmp_path / "tuned")["slim_quant"]
    planned = plan["bundle"]
    assert quant["block"] == planned["block"] and quant["matrices"] == planned["matrices"]
    assert quant["blocks"] == {name: size for name, size in planned["blocks"].items() if size != quant["block"]}
    assert quant["matrices"] == {
        f"model.layers.{layer}.{module}": form.bits
        for (layer, kind), held in result.plan.forms.blocks.items()
        for form, modules in zip(held, MODULES[kind], strict=True)
        for module in modules
        if form.bits == 8
    }
    for name, source in (("bundle", "slim"), ("of tuned", "tuned")):
        lineage = export(tmp_path / source, output=tmp_path / name).manifest.lineage  # parity is checked
        assert lineage["matrices"] == quant["matrices"] and lineage["blocks"] == quant["blocks"]
    gptq = ExportOptions(integers="gptq", text=str(written_text(tmp_path)))
    export(tmp_path / "slim", output=tmp_path / "gptq", options=gptq)
    assert read_manifest(tmp_path / "gptq").lineage["matrices"] == quant["matrices"]


@pytest.mark.parametrize("asked", [{"group_size": 32}, {"head_bits": 8}, {"bits": 8}])
def test_who_asks_for_integers_gets_them(model, costs, tmp_path, asked):
    pruned(model, costs, tmp_path / "slim", 1.2)
    tune(tmp_path / "slim", TuneOptions(tokens=64, length=16, **asked), output=tmp_path / "own", data=IDS)
    quant = read_config(tmp_path / "own")["slim_quant"]
    assert "matrices" not in quant and "blocks" not in quant and quant["block"] == 32
    export(tmp_path / "slim", output=tmp_path / "bundle", options=ExportOptions(parity="none", **asked))
    assert "matrices" not in read_manifest(tmp_path / "bundle").lineage
    tune(model, TuneOptions(tokens=64, length=16), output=tmp_path / "dense", data=IDS)
    assert read_config(tmp_path / "dense")["slim_quant"]["block"] == 32


def written_text(folder):
    path = folder / "text.txt"
    path.write_text("The boats came home before the storm, and nobody was lost at sea.\n" * 400)
    return path


def test_it_is_told(model, costs, tmp_path):
    done = here("prune", model, "-o", tmp_path / "slim", "--speedup", 1.2, "--costs", costs, "--sequences", 8,
                "--length", 16, "--calibration", written_text(tmp_path), "--explain")  # fmt: skip
    assert "integers: 4 bit in groups of " in done.stdout and "saap tune and export will use these" in done.stdout
    assert "linears at 8 bit in groups of 64" in done.stdout and "bits and groups of weights" in done.stdout


def test_what_is_asked_for_is_kept(model, costs, tmp_path):
    assert budget_of(model, PruneOptions(costs=costs, speedup=2.0)).forms == (LARGE, WIDE)
    assert budget_of(model, PruneOptions(costs=costs, speedup=2.0)).vocabulary == (LARGE,)
    assert not budget_of(model, PruneOptions(costs=costs, speedup=2.0, group_size=32)).forms
    only = budget_of(model, PruneOptions(costs=costs, speedup=2.0, group_size=64))
    assert only.group_size == 64 and only.report_dense()["ms_per_token"] == pytest.approx(7.8)
    assert only.total(only.dense) == pytest.approx(5.98)
    assert not budget_of(model, PruneOptions(costs=costs, speedup=2.0, method="flap")).forms
    assert not budget_of(model, PruneOptions(ratio=0.2)).forms
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


def test_what_the_largest_speed_up_allows_can_be_asked_for(model, costs, tmp_path):
    told = refused("prune", model, "-o", tmp_path / "slim", "--speedup", 99, "--costs", costs, "--keep", "blocks")
    most = float(told.split("allow is ")[1].split(":")[0])
    _, plan = pruned(model, costs, tmp_path / "least", most, keep=frozenset({"blocks"}))
    assert plan["achieved"]["speedup"] >= most


def test_the_record_names_the_integers_of_kept_layers(model, costs, tmp_path):
    result, plan = pruned(model, costs, tmp_path / "slim", 2.5)
    slim = read_config(tmp_path / "slim")
    names = {f"model.layers.{place}." for place in range(slim["num_hidden_layers"])}
    own = [*plan["bundle"].get("matrices", {}), *plan["bundle"].get("blocks", {})]
    assert own and all(name.startswith(tuple(names)) or "layers" not in name for name in own)
    assert {layer for layer, _ in result.plan.forms.blocks} <= set(result.plan.kept_layers)
    assert plan["achieved"]["speedup"] >= 2.5
    export(tmp_path / "slim", output=tmp_path / "bundle")


@torch.no_grad()
def test_prices_of_rounding_are_the_divergence(model):
    """Of one matrix at a time to second order, of embedding and head as they are."""
    found = load_model(model)
    for parameter in found.parameters():  # so that rounding matters
        if parameter.ndim == 2:
            parameter.mul_(1.4)
    scores = {type_: torch.ones(4, count) for type_, count in (("ffn", 512), ("group", 4), ("head", 8))}
    ids = torch.randint(320, (24, 64), generator=torch.Generator().manual_seed(1))
    with torch.enable_grad():
        rounding = Pricing(found, scores, (IDS, ids), Allowed()).library().rounding
    whole = found(input_ids=ids).logits.log_softmax(-1)

    def divergence(names, form, rows):
        weights = [found.get_parameter(f"{name}.weight") for name in names]
        with rounded(weights, form):
            own = found(input_ids=ids[:rows]).logits.log_softmax(-1)
        sums = torch.nn.functional.kl_div(own, whole[:rows], log_target=True, reduction="sum")
        return float(sums) / ids[:rows].numel()

    tables = divergence(["model.embed_tokens", "lm_head"], MatrixForm(4, 32), 4)
    assert rounding.vocabulary[MatrixForm(4, 32)] == pytest.approx(tables, rel=1e-3)
    for (layer, kind), prices in rounding.blocks.items():
        for of, modules in zip(prices, MODULES[kind], strict=True):
            names = [f"model.layers.{layer}.{module}" for module in modules]
            for form in (MatrixForm(4, 32), MatrixForm(4, 64)):
                assert of[form] == pytest.approx(divergence(names, form, 24), rel=0.5)
            assert of[MatrixForm(8, 64)] < of[MatrixForm(4, 32)] / 50 < of[MatrixForm(4, 64)] / 50
