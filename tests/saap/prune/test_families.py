"""Prune anything of any family: masked and slim agree, the slim model generates, is exported, and is pruned again."""

import subprocess
import sys

import pytest
import torch
from support.exported import export_bundle
from support.family_cuts import (
    ALL,
    CASES,
    EMPTY,
    EXPORTED,
    HEADS,
    IDS,
    PLANS,
    check_generation,
    cut,
    dense_dir,
    fitting,
    logits,
    masked_logits,
    shipped,
)

from export.graph.probe_model import read_probe_model
from saap.base.errors import UserError
from saap.models.architectures import FAMILIES as ROWS
from saap.models.architectures import shape_of, traits_of
from saap.models.checkpoint import load_model, read_config
from saap.models.shape import FFN, LayerSizes
from saap.prune.options import PruneOptions
from saap.prune.plan import LayerPlan, PrunePlan, whole_layer
from saap.prune.pruning import budget_of, prune

__all__ = ["dense_dir"]
HYBRID = {"lfm2": LayerSizes(conv=96), "lfm3": LayerSizes(conv=96), "qwen3.5": LayerSizes(delta=3)}
LOSING_LAYERS = [case for case in CASES if case != "gemma4"]  # whose later layers read keys of earlier ones


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
@pytest.mark.parametrize("case", CASES)
def test_slim_equals_masked_dense(dense_dir, tmp_path, case, plan):
    path = dense_dir(case)
    plan = fitting(path, plan)
    expected = masked_logits(path, plan)
    assert expected.std() > 0.2
    directory = cut(path, tmp_path / "slim", plan)
    slim = load_model(directory)
    most = 5e-5 if case in ("lfm3", "qwen3.5", "gemma4") else 1e-5  # norms behind small outputs make rounding larger
    assert (logits(slim) - expected).abs().max() <= most
    assert (logits(shipped(directory)) - expected).abs().max() <= most
    assert shape_of(read_config(directory)).parameters == sum(p.numel() for p in slim.parameters())
    check_generation(slim)


@pytest.mark.parametrize("case", LOSING_LAYERS)
def test_each_kept_layer_does_what_it_did(dense_dir, tmp_path, case):
    path = dense_dir(case)
    plan = fitting(path, PLANS["a layer dropped"])
    before = traits_of(read_config(path)).layers
    after = traits_of(read_config(cut(path, tmp_path / "slim", plan))).layers
    assert after == tuple(before[i] for i in (0, 2, 3, 4, 5))
    if ROWS[CASES[case][0]].window == "by layer" and case != "granite 4":  # all of whose layers attend to all
        assert len(set(after)) > 1
        config = read_config(tmp_path / "slim")
        assert len(config["layer_types"]) == 5


@pytest.mark.parametrize("case", LOSING_LAYERS)
def test_uniform_cuts_are_plain_directories_of_their_family(dense_dir, tmp_path, case):
    layer = LayerPlan((0, 2, 4), (0, 1, 2), tuple(range(32)))
    path = dense_dir(case, **({"layer_types": ["full_attention"] * 6} if case in HYBRID else {}))
    plan = fitting(path, PrunePlan((layer, layer, EMPTY, layer, layer, layer)))
    expected = masked_logits(path, plan)
    directory = cut(path, tmp_path / "slim", plan)
    assert read_config(directory)["model_type"] == CASES[case][0]
    assert not (directory / "modeling_slim.py").exists()
    slim = load_model(directory)
    assert (
        type(slim).__name__ == read_config(directory)["architectures"][0] == f"{ROWS[CASES[case][0]].family}ForCausalLM"
    )
    assert (logits(slim) - expected).abs().max() <= 1e-5
    check_generation(slim)


@pytest.mark.parametrize("case", LOSING_LAYERS)
def test_a_slim_model_is_pruned_again(dense_dir, tmp_path, case):
    path = dense_dir(case)
    first = cut(path, tmp_path / "first", fitting(path, PLANS["first layers without attention"]))
    sizes = shape_of(read_config(first)).layers
    again = PrunePlan((EMPTY, whole_layer(sizes[1]), LayerPlan((0,), (0,), (3, 7)), whole_layer(sizes[3]), EMPTY))
    again = fitting(first, again)
    expected = masked_logits(first, again)
    second = load_model(cut(first, tmp_path / "second", again))
    planned = [again.layers[i].sizes for i in (1, 2, 3)]
    assert (planned[0].blocks, planned[0].ffn, planned[1].ffn) == ([FFN], 32, 2)
    assert [list(s) for s in second.config.slim_layers] == [s.entry(ROWS[CASES[case][0]].rare) for s in planned]
    assert (logits(second) - expected).abs().max() <= 1e-5
    check_generation(second)


def test_slim_models_load_elsewhere_with_the_shipped_file(dense_dir, tmp_path):
    """Without saap, by trust_remote_code, in a fresh process."""
    slims = []
    for case in CASES:
        path = dense_dir(case)
        slims.append(cut(path, tmp_path / f"slim-{case}", fitting(path, EXPORTED)))
    script = (
        "import sys, torch; from transformers import AutoModelForCausalLM as A;"
        "models = [A.from_pretrained(p, trust_remote_code=True).eval() for p in sys.argv[1:]];"
        "assert 'saap' not in sys.modules;"
        "print(*(m(input_ids=torch.tensor([[5, 6, 7]])).logits.double().sum().item() for m in models))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", script, *map(str, slims)], capture_output=True, text=True, check=True,
        env={"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    expected = [logits(load_model(slim), torch.tensor([[5, 6, 7]])).double().sum().item() for slim in slims]
    assert [float(text) for text in done.stdout.split()] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("case", CASES)
def test_an_uneven_bundle_passes_parity_and_is_probed(dense_dir, tmp_path, case):
    dense, bundle = dense_dir(case), tmp_path / "bundle"
    plan = fitting(dense, EXPORTED)
    path = cut(dense, tmp_path / "slim", plan)
    dotprod = case != "gemma4"  # whose norms behind small outputs make rounding to int8 larger
    for bits in (32, 4):
        manifest = export_bundle(path, bundle, bits=bits, dotprod=dotprod, ids=IDS)
        assert manifest.parity.tokens == IDS.numel()
    planned = [plan.layers[i].sizes for i in plan.kept_layers]
    assert manifest.layers == planned
    heads = (4, 2) if case == "qwen3.5" else (6, 3)  # whose first layer, which stays whole, does not attend
    probed = read_probe_model(path)
    assert probed.architecture is ROWS[CASES[case][0]]
    assert probed.shape.layers == (LayerSizes(*heads, 64),) * len(planned)
    assert probed.largest == HYBRID.get(case, LayerSizes())
    assert probed.config.model_type == f"saap_{CASES[case][0]}"


def test_heads_that_a_norm_spans_stay_together(dense_dir, tmp_path):
    """Without some of them the norm's mean square is another, so the masked model is not the one that is cut."""
    path = dense_dir("olmo2")
    with pytest.raises(UserError, match="layer 1: a norm spans its heads, so it must keep all of them or none"):
        cut(path, tmp_path / "slim", EXPORTED)
    options = PruneOptions(ratio=0.2, heads=True)
    with pytest.raises(UserError, match="has a norm over all heads, so single heads cannot be removed: leave --heads"):
        budget_of(path, options)
    for method in ("saap", "flap"):
        slim, method_options = tmp_path / method, PruneOptions(ratio=0.15, method=method)
        prune(path, method_options, output=slim, calibration=IDS.repeat(4, 1))
        shape = shape_of(read_config(slim))
        assert shape.layer_weights <= 0.85 * shape_of(read_config(path)).layer_weights
        assert {layer.query_heads for layer in shape.layers} <= {0, HEADS}


def test_optimum_is_told_what_the_layers_with_a_cache_do(dense_dir, tmp_path):
    """Its config counts the layers that attend, so lists with one entry per layer are cut to these."""
    alike = PrunePlan((ALL, ALL, EMPTY, LayerPlan((), (), (1, 2)), LayerPlan(ALL.query_heads, ALL.kv_heads, ()), ALL))
    path = cut(dense_dir("smollm3"), tmp_path / "slim", alike)
    export_bundle(path, tmp_path / "bundle", bits=32)
    config = read_config(tmp_path / "bundle")
    assert (config["model_type"], config["num_hidden_layers"]) == ("smollm3", 4)
    assert config["no_rope_layers"] == [1, 0, 1, 0]
    assert config["layer_types"] == ["full_attention", "sliding_attention"] * 2
    assert "slim_layers" not in config


def test_all_families_are_here():
    assert {model_type for model_type, _ in CASES.values()} == set(ROWS)
