"""The graph of every family against transformers: prefill, prefill in pieces, one token after the other."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from support.references import reference_model

from bench.runtimes.onnxruntime import OrtDecoder
from export.generate.run import BundleScorer
from export.parity.verify import check_parity
from export.write import export_bundle
from saap.models.architectures import shape_of
from saap.models.checkpoint import load_model, read_config

IDS = torch.randint(320, (2, 40), generator=torch.Generator().manual_seed(5))
WINDOW = 8  # five windows in the 40 tokens
PIECES = (7, 5, 1, 1, 20, 1, 1, 4)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
SLIDING = ["sliding_attention", "sliding_attention", "full_attention"]
FAMILIES = {
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True, "rope_scaling": YARN}),
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "mistral without window": ("mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen2 without window": ("qwen2", {"sliding_window": WINDOW, "tie_word_embeddings": True, "rope_scaling": YARN}),
    "qwen3": ("qwen3", {"attention_bias": True}),
    "qwen3 with windows": ("qwen3", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2,
                                     "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16}),
    "phi3": ("phi3", {"sliding_window": WINDOW}),
    "phi3 with partial rotary": ("phi3", {"partial_rotary_factor": 0.5, "tie_word_embeddings": True}),
    "gemma3": ("gemma3_text", {"sliding_window": WINDOW, "layer_types": SLIDING, "query_pre_attn_scalar": 24,
                               "final_logit_softcapping": 3.0}),
    "gemma3 scaled": ("gemma3_text", {"sliding_window": WINDOW, "layer_types": SLIDING, "attention_bias": True,
                                      "rope_scaling": {"rope_type": "linear", "factor": 8.0},
                                      "tie_word_embeddings": False}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1], "attention_bias": True, "mlp_bias": True}),
    "smollm3 with windows": ("smollm3", {"no_rope_layers": [0, 1, 1], "use_sliding_window": True,
                                         "sliding_window": WINDOW, "rope_scaling": LLAMA3}),
}  # fmt: skip


@pytest.fixture(params=FAMILIES)
def model_dir(request, tiny_family):
    model_type, overrides = FAMILIES[request.param]
    return tiny_family(model_type, **overrides)


def logits_of(model, ids=IDS):
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits.numpy()


def largest_differences(bundle, expected):
    """Of a whole prefill, of one in pieces, of one token after the other."""
    yield np.abs(BundleScorer(bundle).logits(IDS.numpy()) - expected).max()
    row, position = IDS[0].numpy(), 0
    decoder, found = OrtDecoder(bundle, 1, 48), []
    for length in PIECES:
        position += length
        found.append(decoder.prefill(row[position - length : position]) - expected[0, position - 1])
    yield np.abs(found).max()
    decoder.reset()
    decoder.prefill(row[:1])
    yield max(np.abs(decoder.step(int(row[i])) - expected[0, i]).max() for i in range(1, len(row)))


def test_fp32_graph_equals_transformers(model_dir, tmp_path):
    assert sum(PIECES) == IDS.shape[1]
    export_bundle(model_dir, tmp_path / "bundle", bits=32)
    expected = logits_of(load_model(model_dir))
    assert expected.std() > 0.3
    for difference in largest_differences(tmp_path / "bundle", expected):
        assert difference <= 1e-4


def test_int4_level_0_equals_torch_on_the_same_integers(model_dir, tmp_path):
    export_bundle(model_dir, tmp_path / "bundle", bits=4, accuracy_level=0)
    expected = logits_of(reference_model(model_dir, 4, 32, 4))
    assert np.abs(BundleScorer(tmp_path / "bundle").logits(IDS.numpy()) - expected).max() <= 2e-3
    assert np.abs(expected - logits_of(load_model(model_dir))).max() > 0.05, "nothing was quantised"


def test_parity_is_reported(model_dir, tmp_path):
    for bits in (32, 4):
        manifest = export_bundle(
            model_dir, tmp_path / "bundle", bits=bits, parity=lambda b: check_parity(b, model_dir, IDS, "dice")
        )
        assert manifest.parity["tokens"] == IDS.numel()


def test_sizes_are_those_of_the_model(model_dir, tmp_path):
    model = load_model(model_dir)
    shape = shape_of(read_config(model_dir))
    assert shape == shape_of(model.config)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    manifest = export_bundle(model_dir, tmp_path / "bundle", bits=32)
    embedding = 0 if shape.tied else model.get_input_embeddings().weight.numel()
    assert manifest.weight_bytes_per_token == 4 * (shape.parameters - embedding)
    assert manifest.model_type == model.config.model_type


def nodes_of(bundle, kind):
    graph = onnx.load(bundle / "model.onnx", load_external_data=False).graph
    return [
        {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        for node in graph.node
        if node.op_type == kind
    ]


@pytest.mark.parametrize("wrong", [WINDOW - 1, WINDOW + 1])
def test_a_window_that_is_one_off_is_seen(tiny_family, tmp_path, wrong):
    path = tiny_family("mistral", sliding_window=wrong)
    export_bundle(path, tmp_path / "bundle", bits=32)
    model = load_model(path)
    model.config.sliding_window = WINDOW
    for difference in largest_differences(tmp_path / "bundle", logits_of(model)):
        assert difference > 1e-2


def test_each_layer_has_its_own_window_and_rotary(tiny_family, tmp_path):
    model_type, overrides = FAMILIES["gemma3"]
    export_bundle(tiny_family(model_type, **overrides), tmp_path / "bundle")
    found = nodes_of(tmp_path / "bundle", "GroupQueryAttention")
    assert [node.get("local_window_size") for node in found] == [WINDOW, WINDOW, None]
    assert [node["scale"] for node in found] == pytest.approx([24**-0.5] * 3)
    model_type, overrides = FAMILIES["smollm3"]
    export_bundle(tiny_family(model_type, **overrides), tmp_path / "bundle")
    assert [n["do_rotary"] for n in nodes_of(tmp_path / "bundle", "GroupQueryAttention")] == [1, 0, 1]


def test_llama_pays_nothing_for_the_others(tiny_model, tmp_path):
    export_bundle(tiny_model(), tmp_path / "bundle")
    graph = onnx.load(tmp_path / "bundle/model.onnx", load_external_data=False).graph
    kinds = [node.op_type for node in graph.node]
    measure = ["ReduceSum", "Sub", "Shape", "Gather", "Cast", "Cast"]
    attention = ["MatMulNBits", "GroupQueryAttention", "MatMulNBits"]
    ffn = ["MatMulNBits", "Split", "Sigmoid", "Mul", "Mul", "MatMulNBits"]
    skip = "SkipSimplifiedLayerNormalization"
    layers = ["SimplifiedLayerNormalization", *attention, skip, *ffn, *(skip, *attention, skip, *ffn) * 2]
    assert kinds == [*measure, "GatherBlockQuantized", "Reshape", *layers, skip, "Gather", "MatMulNBits"]
    options = {"num_heads": 6, "kv_num_heads": 3, "do_rotary": 1, "rotary_interleaved": 0}
    assert nodes_of(tmp_path / "bundle", "GroupQueryAttention") == [options] * 3
