"""Prune anything of any family: masked and slim agree, the slim model generates, is exported, and is pruned again."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from support.exported import export_bundle

from export.generate.ort_model import CACHE
from export.graph.probe_model import read_probe_model
from saap.models.architectures import FAMILIES as ROWS
from saap.models.architectures import architecture_of, shape_of, traits_of
from saap.models.checkpoint import load_model, read_config, slim_config, write_slim
from saap.models.shape import LayerSizes
from saap.models.weight_files import tensor_reader
from saap.prune.cut.surgery import cut_tensors
from saap.prune.options import PruneOptions
from saap.prune.plan import LayerPlan, PrunePlan, whole_layer
from saap.prune.pruning import budget_of, prune
from saap.prune.search.masking import masked
from saap.system.errors import UserError

IDS = torch.randint(320, (2, 40), generator=torch.Generator().manual_seed(5))
WINDOW = 8  # five windows in the 40 tokens
HEADS, GROUPS, CHANNELS, LAYERS = 6, 3, 64, 6
# Windows and layers without rotary embedding fall differently on the layers, by lists and by what a config leaves out.
CASES = {
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 3}),
    "qwen3": ("qwen3", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2,
                        "attention_bias": True}),
    "phi3": ("phi3", {"sliding_window": WINDOW}),
    "gemma3": ("gemma3_text", {"sliding_window": WINDOW, "sliding_window_pattern": 3, "query_pre_attn_scalar": 24}),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": WINDOW,
                            "attention_bias": True, "mlp_bias": True}),
    "olmo2": ("olmo2", {"attention_bias": True}),
    "granite": ("granite", {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.6,
                            "logits_scaling": 2.0, "attention_bias": True, "mlp_bias": True}),
}  # fmt: skip
ALL = LayerPlan(tuple(range(HEADS)), tuple(range(GROUPS)), tuple(range(CHANNELS)))
EMPTY = LayerPlan((), (), ())


def random_layer(generator):
    """Any legal layer of 3 KV groups of 2 heads and 64 channels."""
    groups = sorted(generator.sample(range(GROUPS), generator.randint(1, GROUPS)))
    each = generator.randint(1, 2)
    heads = tuple(sorted(h for g in groups for h in generator.sample([2 * g, 2 * g + 1], each)))
    channels = tuple(sorted(generator.sample(range(CHANNELS), generator.choice([1, 37, 32, 63]))))
    kind = generator.choice(["both", "both", "attention", "ffn", "none"])
    return LayerPlan(
        heads if kind in ("both", "attention") else (), tuple(groups) if kind in ("both", "attention") else (),
        channels if kind in ("both", "ffn") else (),
    )  # fmt: skip


def random_plan(seed):
    generator = random.Random(seed)
    layers = [random_layer(generator) for _ in range(LAYERS)]
    layers[generator.randrange(LAYERS)] = LayerPlan((0, 1, 4, 5), (0, 2), tuple(range(0, CHANNELS, 2)))
    return PrunePlan(tuple(layers))


NARROW = LayerPlan((0, 3), (0, 1), tuple(range(32)))
PLANS = {
    "a layer dropped": PrunePlan((ALL, EMPTY, ALL, NARROW, ALL, ALL)),
    "first layers without attention": PrunePlan(
        (LayerPlan((), (), (1, 5, 9)), EMPTY, LayerPlan((), (), tuple(range(32))), NARROW, ALL, ALL)
    ),
    "last layers dropped": PrunePlan((ALL, LayerPlan((2, 4), (1, 2), ()), NARROW, EMPTY, EMPTY, EMPTY)),
    **{f"random {seed}": random_plan(seed) for seed in range(4)},
}


EXPORTED = PrunePlan(
    (ALL, NARROW, EMPTY, LayerPlan((), (), tuple(range(32))), LayerPlan((0, 1, 4, 5), (0, 2), ()), ALL)
)


def fitting(path, plan):
    """The plan, with all heads or none where a norm spans them."""
    shape = shape_of(read_config(path))
    if shape.separable_heads:
        return plan
    whole = map(whole_layer, shape.layers)
    pairs = zip(plan.layers, whole, strict=True)
    return PrunePlan(tuple(replace(w, ffn=k.ffn) if k.query_heads else k for k, w in pairs))


@pytest.fixture
def dense_dir(tiny_family):
    def make(case, **more):
        model_type, overrides = CASES[case]
        sizes = {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": GROUPS,
                 "head_dim": 16, "intermediate_size": CHANNELS}  # fmt: skip
        return tiny_family(model_type, **{**sizes, **overrides, **more})

    return make


def cut(path, out, plan, replaced=None, **shape_changes):
    config = read_config(path)
    shape = shape_of(config)
    names, read = tensor_reader(path)
    tensors = cut_tensors(names, read, plan, shape, architecture_of(config), replaced)
    kept = replace(plan.kept_shape(shape), **shape_changes)
    return write_slim(out, path, slim_config(config, kept, kept=plan.kept_layers), tensors, {"plan": {}})


def logits(model, ids=IDS):
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits


def masked_logits(path, plan):
    dense = load_model(path)
    with masked(dense, dict(enumerate(plan.layers)), shape_of(dense.config).head_dim):
        return logits(dense)


def shipped(directory):
    """The model by the modelling file in its directory, without a class registered anywhere."""
    spec = importlib.util.spec_from_file_location("shipped_slim", directory / "modeling_slim.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["shipped_slim"] = module
    try:
        spec.loader.exec_module(module)
        name = json.loads((directory / "config.json").read_text())["architectures"][0]
        return getattr(module, name).from_pretrained(directory, dtype=torch.float32).eval()
    finally:
        del sys.modules["shipped_slim"]


def check_generation(model):
    """With a cache, and by whole forwards, past the window."""
    prompt = IDS[:1, :6]
    cached, plain = (
        model.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=use, eos_token_id=None)
        for use in (True, False)
    )
    assert cached.shape == (1, 12)
    assert (cached == plain).all()
    with torch.inference_mode():
        first = model(input_ids=IDS[:, :25], use_cache=True)
        rest = model(input_ids=IDS[:, 25:], use_cache=True, **{CACHE: getattr(first, CACHE)}).logits
    assert (rest - logits(model)[:, 25:]).abs().max() <= 1e-4


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
@pytest.mark.parametrize("case", CASES)
def test_slim_equals_masked_dense(dense_dir, tmp_path, case, plan):
    path = dense_dir(case)
    plan = fitting(path, plan)
    expected = masked_logits(path, plan)
    assert expected.std() > 0.2
    directory = cut(path, tmp_path / "slim", plan)
    slim = load_model(directory)
    assert (logits(slim) - expected).abs().max() <= 1e-5
    assert (logits(shipped(directory)) - expected).abs().max() <= 1e-5
    assert shape_of(read_config(directory)).parameters == sum(p.numel() for p in slim.parameters())
    check_generation(slim)


@pytest.mark.parametrize("case", CASES)
def test_each_kept_layer_does_what_it_did(dense_dir, tmp_path, case):
    path = dense_dir(case)
    plan = fitting(path, PLANS["a layer dropped"])
    before = traits_of(read_config(path)).layers
    after = traits_of(read_config(cut(path, tmp_path / "slim", plan))).layers
    assert after == tuple(before[i] for i in (0, 2, 3, 4, 5))
    if ROWS[CASES[case][0]].window == "by layer":
        assert len(set(after)) > 1
        config = read_config(tmp_path / "slim")
        assert len(config["layer_types"]) == 5


@pytest.mark.parametrize("case", CASES)
def test_uniform_cuts_are_plain_directories_of_their_family(dense_dir, tmp_path, case):
    layer = LayerPlan((0, 2, 4), (0, 1, 2), tuple(range(32)))
    path = dense_dir(case)
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


@pytest.mark.parametrize("case", CASES)
def test_a_slim_model_is_pruned_again(dense_dir, tmp_path, case):
    path = dense_dir(case)
    first = cut(path, tmp_path / "first", fitting(path, PLANS["first layers without attention"]))
    sizes = shape_of(read_config(first)).layers
    again = PrunePlan((EMPTY, whole_layer(sizes[1]), LayerPlan((0,), (0,), (3, 7)), whole_layer(sizes[3]), EMPTY))
    again = fitting(first, again)
    expected = masked_logits(first, again)
    second = load_model(cut(first, tmp_path / "second", again))
    narrow = [len(again.layers[2].query_heads), len(again.layers[2].kv_heads), 2]
    assert [list(s) for s in second.config.slim_layers] == [[0, 0, 32], narrow, [6, 3, 64]]
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
def test_an_uneven_bundle_passes_parity(dense_dir, tmp_path, case):
    dense, bundle = dense_dir(case), tmp_path / "bundle"
    plan = fitting(dense, EXPORTED)
    path = cut(dense, tmp_path / "slim", plan)
    for bits in (32, 4):
        manifest = export_bundle(path, bundle, bits=bits, ids=IDS)
        assert manifest.parity.tokens == IDS.numel()
    planned = [plan.layers[i].sizes for i in plan.kept_layers]
    assert [LayerSizes(s.query_heads, s.kv_heads, s.ffn) for s in manifest.layers] == planned


@pytest.mark.parametrize("case", CASES)
def test_slim_models_and_their_bundles_are_probed(dense_dir, tmp_path, case):
    dense = dense_dir(case)
    path = cut(dense, tmp_path / "slim", fitting(dense, EXPORTED))
    export_bundle(path, tmp_path / "bundle", bits=4)
    for directory in (path, tmp_path / "bundle"):
        probed = read_probe_model(directory)
        assert probed.architecture is ROWS[CASES[case][0]]
        assert probed.shape.layers == (LayerSizes(6, 3, 64),) * 5
        assert probed.config.model_type == f"saap_{CASES[case][0]}"


def test_heads_that_a_norm_spans_stay_together(dense_dir, tmp_path):
    """Without some of them the norm's mean square is another, so the masked model is not the one that is cut."""
    path = dense_dir("olmo2")
    with pytest.raises(UserError, match="layer 1: a norm spans its heads, so all of them are kept or none"):
        cut(path, tmp_path / "slim", EXPORTED)
    options = PruneOptions(ratio=0.2, heads=True)
    with pytest.raises(UserError, match="has a norm over all heads, so they are not pruned one by one: leave --heads"):
        budget_of(path, options)
    for method in ("saap", "flap"):
        slim, method_options = tmp_path / method, PruneOptions(ratio=0.15, method=method, modules=method == "saap")
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
