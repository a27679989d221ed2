"""The graph of every family against transformers: prefill, prefill in pieces, one token after the other."""

import numpy as np
import onnx
import pytest
from support.export_cases import FAMILIES, IDS, PIECES, WINDOW, largest_differences, logits_of
from support.exported import export_bundle
from support.references import reference_model

from export.engine.scoring import BundleScorer
from saap.models.architectures import ARCHITECTURES, Architecture, shape_of
from saap.models.architectures import FAMILIES as FAMILIES_OF_SAAP
from saap.models.checkpoint import load_model, read_config


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_equals_transformers(family, tiny_family, tmp_path):
    model_type, overrides = FAMILIES[family]
    path, bundle = tiny_family(model_type, **overrides), tmp_path / "bundle"
    model, shape = load_model(path), shape_of(read_config(path))
    assert shape == shape_of(model.config)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    manifest = export_bundle(path, bundle, bits=32, ids=IDS)
    embedding = 0 if shape.tied else model.get_input_embeddings().weight.numel()
    count = len(shape.layers)
    for_layers = count * (shape.vocab * shape.per_layer - 1) if shape.per_layer else 0  # a table, and a scale for each
    assert manifest.weight_bytes_per_token == 4 * (shape.parameters - embedding - for_layers)
    assert manifest.model_type == model.config.model_type and manifest.parity.tokens == IDS.numel()
    dense = logits_of(model, IDS)
    assert dense.std() > 0.3 and sum(PIECES) == IDS.shape[1]
    assert max(largest_differences(bundle, dense)) <= 1e-4
    assert export_bundle(path, bundle, bits=4, dotprod=False, ids=IDS).parity.tokens == IDS.numel()
    expected = logits_of(reference_model(path, 4, 32, 4), IDS)
    assert np.abs(BundleScorer(bundle).logits(IDS.numpy()) - expected).max() <= 2e-3
    assert np.abs(expected - dense).max() > 0.05, "nothing was quantised"


def test_a_new_row_is_enough_for_a_family_whose_module_has_another_name(tiny_family, tmp_path, monkeypatch):
    """As docs/extending.md says; transformers has it in seed_oss."""
    for table in (FAMILIES_OF_SAAP, ARCHITECTURES):
        monkeypatch.setitem(table, "seed_oss", Architecture("SeedOss", qkv_bias=True))
    path = tiny_family("seed_oss", attention_bias=True, attention_out_bias=False, head_dim=16)
    export_bundle(path, tmp_path / "bundle", bits=32, ids=IDS)
    assert max(largest_differences(tmp_path / "bundle", logits_of(load_model(path), IDS))) <= 1e-4


def nodes_of(bundle, kind):
    graph = onnx.load(bundle / "model.onnx", load_external_data=False).graph
    return [
        {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        for node in graph.node
        if node.op_type == kind
    ]


@pytest.mark.parametrize("target", ["cpu", "portable"])
@pytest.mark.parametrize("wrong", [WINDOW - 1, WINDOW + 1])
def test_a_window_that_is_one_off_is_seen(tiny_family, tmp_path, wrong, target):
    path = tiny_family("mistral", sliding_window=wrong)
    export_bundle(path, tmp_path / "bundle", bits=32, target=target)
    model = load_model(path)
    model.config.sliding_window = WINDOW
    for difference in largest_differences(tmp_path / "bundle", logits_of(model, IDS)):
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
