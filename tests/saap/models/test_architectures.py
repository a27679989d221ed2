"""The table of families, what is read from a config, and what is refused."""

import json
from dataclasses import asdict

import pytest
import torch
import transformers
from support.exported import export_bundle

from saap.base.errors import UserError
from saap.models.architectures import FAMILIES, LayerTraits, Traits, architecture_of, positions_of, shape_of, traits_of
from saap.models.checkpoint import load_model, read_config
from saap.models.resolve import resolve

IDS = torch.randint(320, (4, 16), generator=torch.Generator().manual_seed(5))
# What google/gemma-3-1b-it's config.json says and, above all, leaves out.
GEMMA3 = {"model_type": "gemma3_text", "hidden_size": 1152, "intermediate_size": 6912, "num_attention_heads": 4,
          "num_key_value_heads": 1, "num_hidden_layers": 26, "head_dim": 256, "sliding_window": 512,
          "sliding_window_pattern": 6, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256,
          "rope_local_base_freq": 10000, "rope_theta": 1000000, "vocab_size": 262144,
          "attn_logit_softcapping": None, "final_logit_softcapping": None}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_every_name_of_a_row_is_a_module_of_the_model(tiny_family, family):
    model = load_model(tiny_family(family))
    row = FAMILIES[family]
    for name in (row.embedding, row.final_norm, row.head):
        assert model.get_submodule(name).weight.shape[-1] == 96
    layers = model.get_submodule(row.layers)
    norms = (row.attention_norm, row.query_norm, row.key_norm, row.attention_post_norm, row.ffn_norm, row.ffn_post_norm)
    some = [*norms, row.conv_in, row.conv_kernel, row.conv_out]
    if row.delta:  # two of whose names are parameters of the net itself
        some += [name for name in asdict(row.delta).values() if name not in (row.delta.log_decay, row.delta.decay_bias)]
        some.append("linear_attn")
    if row.per_layer:
        some += [row.per_layer.gate, row.per_layer.output, row.per_layer.output_norm]
    assert {*row.qkv, row.output, *row.gate_up, row.down, *filter(None, some)} == {
        name
        for layer in layers
        for name, module in layer.named_modules()
        if dict(module.named_parameters(recurse=False))
    }
    attends = layers[1]  # where some layers convolve, the second does not
    rows = sum(attends.get_submodule(name).weight.shape[0] for name in row.qkv)
    dim = 64 if row.per_layer else 32
    assert rows == (3 + 2 * 1) * dim + (3 if row.head_gate else 3 * 32 if row.gated_queries else 0)
    assert sum(attends.get_submodule(name).weight.shape[0] for name in row.gate_up) == 2 * 128


def test_what_a_config_leaves_out_is_the_familys_default():
    assert shape_of(GEMMA3).tied
    assert shape_of(GEMMA3).parameters == 999_885_952  # as the model card's 1B counts
    traits = traits_of(GEMMA3)
    assert [layer.window for layer in traits.layers[:7]] == [512] * 5 + [0, 512]
    assert traits.layers[5] == LayerTraits(0, "default")
    assert traits.layers[6] == LayerTraits(512, "local")
    assert traits.embedding_scale == 1152**0.5
    assert traits.attention_scale == 1 / 16
    smollm3 = traits_of({"model_type": "smollm3", "num_hidden_layers": 8, "hidden_size": 2048})
    assert [layer.rotary for layer in smollm3.layers] == ["default"] * 3 + [None] + ["default"] * 3 + [None]
    qwen2 = {"model_type": "qwen2", "num_hidden_layers": 2, "sliding_window": 32768, "use_sliding_window": False}
    assert traits_of(qwen2).layers == (LayerTraits(0), LayerTraits(0))


def test_llama_has_no_traits_of_its_own():
    config = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 96, "sliding_window": 8}
    assert traits_of(config) == Traits((LayerTraits(),) * 2)


@pytest.mark.parametrize("family", [name for name, row in FAMILIES.items() if row.transformers == 4])
def test_a_slim_model_is_of_its_family(family):
    assert architecture_of({"model_type": f"saap_{family}"}) is FAMILIES[family]


@pytest.mark.parametrize("changes", [{"num_attention_heads": 4}, {"slim_layers": [[3, 1, 8], [3, 2, 8]]}])
def test_heads_that_their_kv_groups_do_not_divide(changes):
    config = {"model_type": "llama", "hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3,
              "intermediate_size": 8, "num_hidden_layers": 2, "vocab_size": 320}  # fmt: skip
    assert shape_of(config).layers[0].heads_per_group == 2
    with pytest.raises(UserError, match=r"layer \d has \d query heads on \d KV heads: must be a multiple; mend config"):
        shape_of(config | changes)


def with_config(path, **changes):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))
    return path


LONG = [1.0] * 16
REFUSED = {
    "experts": ("granitemoehybrid", {"num_local_experts": 8}, "a mixture of 8 experts, which is not supported"),
    "state space layers": ("granitemoehybrid", {"layer_types": ["mamba", "attention", "attention"]},
                           "layers of type 'linear_attention' are not supported; supported: full_attention"),
    "an LFM3 without norms behind its blocks": ("lfm3", {"use_sandwich_norm": False},
                                                "use_sandwich_norm off, which is not supported; supported: use_sand"),
    "a family like another": ("llama", {"model_type": "qwen3_5"},
                              r"model type 'qwen3_5' is not supported \(the nearest that is: qwen3\); supported"),
    "an unknown family": ("llama", {"model_type": "gpt2"}, "model type 'gpt2' is not supported; supported: llama, m"),
    "another activation": ("gemma3_text", {"hidden_activation": "relu"}, "activation 'relu' is not supported"),
    "another kind of layer": ("qwen3", {"layer_types": ["full_attention", "chunked_attention", "full_attention"]},
                              "layers of type 'chunked_attention' are not supported"),
    "attention both ways": ("gemma3_text", {"use_bidirectional_attention": True}, "in both directions"),
    "a growing rope": ("qwen2", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic' is"),
    "longrope": ("phi3", {"rope_scaling": {"type": "longrope", "short_factor": LONG, "long_factor": LONG}},
                 "rope type 'longrope' is not supported; supported: default, linear, llama3, yarn"),
    "a factor of nothing": ("granite", {"logits_scaling": 0}, "logits_scaling '0': must be a number above 0"),
    "a config that transformers refuses": ("phi3", {"rope_scaling": {"type": "longrope", "short_factor": 1}},
                                           "short_factor '1': must be a list of numbers"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_exported_is_refused_in_one_line(tiny_family, tmp_path, case):
    family, changes, complaint = REFUSED[case]
    path = with_config(tiny_family(family), **changes)
    with pytest.raises(UserError, match=complaint) as caught:
        export_bundle(path, tmp_path / "bundle", bits=32)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.skipif(not transformers.__version__.startswith("4."), reason="transformers 5 reads its own configs")
def test_a_config_that_transformers_4_would_misread(tiny_family):
    rope = {"rope_theta": 500000.0, "rope_type": "default"}
    path = with_config(tiny_family("llama"), rope_parameters=rope)
    config = read_config(path)
    del config["rope_theta"]
    assert transformers.LlamaConfig.from_dict(config).rope_theta == 10000, "no longer misread: the check can go"
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"of transformers 5, .* install transformers 5, or write rope_theta"):
        load_model(path)


@pytest.mark.parametrize("family", [name for name, row in FAMILIES.items() if row.transformers > 4])
def test_a_family_of_transformers_5_is_refused_by_an_older_one(family, monkeypatch):
    monkeypatch.setattr("saap.models.architectures._installed_transformers", lambda: "4.57.6")
    with pytest.raises(UserError, match=f"{family} models are of transformers 5, .*4.57.6.* install transformers 5"):
        shape_of({"model_type": family})


def test_what_ministral_3_scales_by_the_position_is_not_offered(tiny_family, tmp_path):
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64,
            "llama_4_scaling_beta": 0.1}  # fmt: skip
    path = tiny_family("ministral3", rope_parameters=rope, max_position_embeddings=256)
    assert positions_of(read_config(path)) == 64
    assert export_bundle(path, tmp_path / "bundle", bits=32).context_length == 64


@pytest.mark.parametrize(
    ("family", "changes", "complaint"),
    [
        ("smollm3", {"head_dim": 24}, "head size of 24 cannot be exported: .* multiples of 16"),
        ("smollm3", {"head_dim": 20, "no_rope_layers": [0, 0, 0]}, "head size of 20 .* multiples of 8"),
        ("smollm3", {"num_key_value_heads": 2}, "layer 0 has 3 query heads on 2 KV heads"),
        ("phi3", {"partial_rotary_factor": 0.75}, "rotary embedding of 24 elements of a head cannot be exported"),
        ("phi3", {}, "qkv_proj has 96 input columns, not a multiple of the group size 64"),
        ("smollm3", {"head_dim": 24, "no_rope_layers": [0, 0, 0]}, None),
    ],
)
def test_sizes_that_the_attention_or_groups_refuse(tiny_family, tmp_path, family, changes, complaint):
    path, options = tiny_family(family, **changes), {"bits": 32} if changes else {"group_size": 64}
    if complaint is None:
        assert export_bundle(path, tmp_path / "bundle", **options).head_dim == 24
        return
    with pytest.raises(UserError, match=complaint):
        export_bundle(path, tmp_path / "bundle", **options)


def test_a_checkpoint_without_a_promised_tensor(tiny_family, tmp_path):
    path = with_config(tiny_family("qwen2", tie_word_embeddings=True), tie_word_embeddings=False)
    with pytest.raises(UserError, match=r"has no tensor lm_head\.weight, which its config\.json asks for"):
        export_bundle(path, tmp_path / "bundle")


def test_positions_of_configs_that_leave_them_out():
    for family, config in (("llama", "LlamaConfig"), ("mistral", "MistralConfig"), ("qwen3", "Qwen3Config")):
        expected = getattr(transformers, config)().max_position_embeddings
        assert positions_of({"model_type": family}) == expected
        assert positions_of({"model_type": family, "max_position_embeddings": 77}) == 77
    with pytest.raises(UserError, match="max_position_embeddings 'many': must be a whole number of 1 to"):
        positions_of({"model_type": "llama", "max_position_embeddings": "many"})


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_labels"])
def test_a_config_of_endless_layers_is_refused_before_transformers_counts_them(tmp_path, key):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3_text", key: 1 << 60}))
    with pytest.raises(UserError, match=f"config.json has {key} '1152921504606846976': must be a whole number of 0 to"):
        load_model(tmp_path)


def test_what_is_strange_in_an_unknown_family_is_named(tiny_family):
    path = with_config(tiny_family("lfm2"), model_type="qwen3_vl")
    told = r"'qwen3_vl' is not supported \(the nearest that is: qwen3, which has no .*conv.*\); .* docs/extending.md"
    with pytest.raises(UserError, match=told) as caught:
        resolve(path)
    assert "\n" not in str(caught.value)
    alike = with_config(tiny_family("qwen3"), model_type="qwen3_vl")
    with pytest.raises(UserError, match=r"nearest that is: qwen3\); supported"):
        resolve(alike)
