"""The graph of every family against transformers: prefill, prefill in pieces, one token after the other."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from support.export_cases import FAMILIES, IDS, PIECES, WINDOW, largest_differences, logits_of
from support.exported import export_bundle
from support.references import reference_model

from export.generate.scoring import BundleScorer
from saap.models.architectures import shape_of
from saap.models.checkpoint import load_model, read_config


@pytest.fixture(params=FAMILIES)
def model_dir(request, tiny_family):
    model_type, overrides = FAMILIES[request.param]
    return tiny_family(model_type, **overrides)


def test_fp32_graph_equals_transformers(model_dir, tmp_path):
    assert sum(PIECES) == IDS.shape[1]
    export_bundle(model_dir, tmp_path / "bundle", bits=32)
    expected = logits_of(load_model(model_dir), IDS)
    assert expected.std() > 0.3
    for difference in largest_differences(tmp_path / "bundle", expected):
        assert difference <= 1e-4


def test_int4_level_0_equals_torch_on_the_same_integers(model_dir, tmp_path):
    export_bundle(model_dir, tmp_path / "bundle", bits=4, accuracy_level=0)
    expected = logits_of(reference_model(model_dir, 4, 32, 4), IDS)
    assert np.abs(BundleScorer(tmp_path / "bundle").logits(IDS.numpy()) - expected).max() <= 2e-3
    assert np.abs(expected - logits_of(load_model(model_dir), IDS)).max() > 0.05, "nothing was quantised"


def test_parity_is_reported(model_dir, tmp_path):
    for bits in (32, 4):
        manifest = export_bundle(model_dir, tmp_path / "bundle", bits=bits, ids=IDS)
        assert manifest.parity.tokens == IDS.numel()


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
