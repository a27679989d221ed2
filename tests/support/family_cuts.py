"""Models of every family, cut in every way, and what a cut model must give."""

import importlib.util
import json
import random
import sys
from dataclasses import replace

import pytest
import torch
from support.masking import masked
from transformers.modeling_outputs import CausalLMOutputWithPast

from saap.models.architectures import LLAMA, architecture_of, shape_of
from saap.models.checkpoint import load_model, read_config, slim_config, write_slim
from saap.models.shape import ATTENTION, CONV
from saap.models.weight_files import tensor_reader
from saap.prune.cut.surgery import cut_tensors
from saap.prune.plan import LayerPlan, PrunePlan, whole_layer

# Later releases of transformers 5 call the cache by another name.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
IDS = torch.randint(320, (2, 40), generator=torch.Generator().manual_seed(5))
WINDOW = 8  # five windows in the 40 tokens
HEADS, GROUPS, CHANNELS, LAYERS = 6, 3, 64, 6
# Windows and layers without rotary embedding fall differently on the layers, by lists and by what a config leaves out.
MULTIPLIERS = {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.6,
               "logits_scaling": 2.0}  # fmt: skip
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
    "granite": ("granite", {**MULTIPLIERS, "attention_bias": True, "mlp_bias": True}),
    "granite 4": ("granitemoehybrid", {**MULTIPLIERS, "attention_bias": True}),
    "ministral 3": ("ministral3", {"sliding_window": WINDOW}),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention", "conv", "full_attention", "conv", "full_attention"],
                      "block_auto_adjust_ff_dim": False, "conv_bias": True}),
    "gemma4": ("gemma4_text", {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 3}),
    "qwen3.5": ("qwen3_5_text", {"head_dim": 32, "layer_types": [
        "linear_attention", "full_attention", "linear_attention", "linear_attention", "full_attention",
        "linear_attention"]}),
    "lfm3": ("lfm3", {"layer_types": ["conv", "full_attention", "sliding_attention", "conv", "sliding_attention",
                                      "full_attention"], "sliding_window": WINDOW, "attention_bias": True}),
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
    **{f"random {seed}": random_plan(seed) for seed in range(2)},
}


EXPORTED = PrunePlan(
    (ALL, NARROW, EMPTY, LayerPlan((), (), tuple(range(32))), LayerPlan((0, 1, 4, 5), (0, 2), ()), ALL)
)


def fitting(path, plan):
    """The plan, with all heads or none where a norm spans them, and of another mixer as much as of the heads."""
    shape = shape_of(read_config(path))
    if shape.sources:
        return PrunePlan(tuple(_sharing(shape, index, keep) for index, keep in enumerate(plan.layers)))
    if shape.conv_kernel:
        layers = [*map(_mixed, plan.layers, shape.layers)]
        if not any(keep.query_heads for keep in layers):  # some layer has to attend
            last = max(i for i, sizes in enumerate(shape.layers) if sizes.query_heads)
            layers[last] = whole_layer(shape.layers[last])
        return PrunePlan(tuple(layers))
    if shape.separable_heads:
        return plan
    whole = map(whole_layer, shape.layers)
    pairs = zip(plan.layers, whole, strict=True)
    return PrunePlan(tuple(replace(w, ffn=k.ffn) if k.query_heads else k for k, w in pairs))


def _sharing(shape, index, keep):
    """A block is left of each layer; those that share keys and values keep the same KV group, or no attention."""
    whole = whole_layer(shape.layers[index])
    if len(shape.sharing(index)) > 1 and (keep.query_heads or shape.is_read(index)):
        keep = replace(keep, query_heads=(2,) if index % 2 else (2, 3), kv_heads=(1,))
    facts = {name: getattr(whole, name) for name in ATTENTION.facts if keep.query_heads}
    return replace(keep, ffn=keep.ffn if keep.query_heads else keep.ffn or whole.ffn, **facts)


def _mixed(keep, sizes):
    kind = sizes.mixer
    if kind is ATTENTION or keep.has(kind):
        return keep
    (field,) = kind.sizes
    some = range(0, getattr(sizes, field), 1 if len(keep.query_heads) == HEADS else 3 if kind is CONV else 2)
    return LayerPlan(ffn=keep.ffn, **{field: tuple(some) if keep.query_heads else ()})


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
    with masked(dense, dict(enumerate(plan.layers))):
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


FULL = {"attention_bias": False, "mlp_bias": False, "conv_bias": False}  # what the cases of some families switch on


def kept_modules(plan, architecture=LLAMA):
    """(layer of the base, layer of the slim model, module) of each module that writes and is left."""
    for new, old in enumerate(plan.kept_layers):
        for kind in plan.layers[old].blocks:
            yield old, new, architecture.writing(kind)


@pytest.fixture
def compensated(dense_dir, tmp_path):
    """A slim directory with random biases and one changed matrix, and the logits that it must give."""

    def make(case, plan=EXPORTED):
        path = dense_dir(case, **{key: False for key in FULL if key in CASES[case][1]})
        plan = fitting(path, plan)
        generator = torch.Generator().manual_seed(9)
        architecture = architecture_of(read_config(path))
        down = architecture.down
        biases = {place: torch.randn(96, generator=generator) * 0.3 for place in kept_modules(plan, architecture)}
        replaced = {f"model.layers.{new}.{module}.bias": bias for (_, new, module), bias in biases.items()}
        dense = load_model(path)
        changed = dense.model.layers[0].get_parameter(f"{down}.weight")
        changed.data += 0.05 * torch.randn(changed.shape, generator=generator)
        replaced[f"model.layers.0.{down}.weight"] = changed.detach()[:, list(plan.layers[0].ffn)].clone()
        with masked(dense, dict(enumerate(plan.layers))):
            for (old, _, module), bias in biases.items():
                dense.model.layers[old].get_submodule(module).bias = torch.nn.Parameter(bias)
            expected = logits(dense)
        return cut(path, tmp_path / "slim", plan, replaced, added_bias=True), expected

    return make
