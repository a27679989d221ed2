"""Parity: the reference that streams its layers equals the whole model, and a wrong graph is noticed."""

from __future__ import annotations

import math

import onnx
import pytest
import torch
from onnx import numpy_helper
from test_export import IDS, MODELS, logits_of, model_of

import export.streamed
from export.bundle import read_manifest
from export.export import export_bundle
from export.source import ModelSource, Precision
from export.streamed import StreamedModel, streamed_logits
from export.verify import check_parity, reference_model
from saap.errors import SaapError
from saap.tune import TuneOptions, tune


@pytest.fixture(params=[*MODELS, "uneven", "tuned"])
def any_model(request, tiny_model, tmp_path):
    path = model_of(request.param, tiny_model, tmp_path)
    if request.param == "tuned":
        tune(path, tmp_path / "tuned", IDS.repeat(4, 1), TuneOptions(learning_rate=2e-2))
        path = tmp_path / "tuned"
    return path


@pytest.mark.parametrize("bits", [4, 8, 32])
def test_streamed_logits_are_the_whole_models(any_model, bits, monkeypatch):
    monkeypatch.setattr(export.streamed, "HEAD_ROWS", 100)  # the vocabulary of 320 in four pieces
    monkeypatch.setattr(export.streamed, "LOGIT_BYTES", 1)  # one row at a time
    source = ModelSource(any_model)
    precision = source.precision(None, None, None) if source.quant else Precision(bits, 32, bits)
    found = torch.stack(list(streamed_logits(any_model, IDS, precision)))
    expected = logits_of(reference_model(any_model, precision.bits, 32, precision.head_bits), IDS)
    assert (found - torch.from_numpy(expected)).abs().max() <= 1e-5


def test_one_layer_is_in_memory_at_a_time(tiny_model):
    reference = StreamedModel(ModelSource(tiny_model()), Precision(32, 0, 32))
    layers = reference._model.model.layers
    held = []

    def look(*_):
        held.append([all(not p.is_meta for p in layer.parameters()) for layer in layers])

    for layer in layers:
        layer.mlp.register_forward_pre_hook(look)
    reference.hidden_states(IDS)
    assert held == [[True, False, False], [False, True, False], [False, False, True]]
    assert all(p.is_meta for layer in layers for p in layer.parameters())


def test_progress_counts_layers(tiny_model):
    seen = []
    reference = StreamedModel(ModelSource(tiny_model()), Precision(32, 0, 32))
    reference.hidden_states(IDS, lambda label, done, total: seen.append((done, total)))
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_the_report_says_what_the_whole_model_says(any_model, tmp_path):
    export_bundle(any_model, tmp_path / "bundle")
    manifest = read_manifest(tmp_path / "bundle")
    report = check_parity(tmp_path / "bundle", any_model, IDS, "dice")
    logits = torch.from_numpy(logits_of(reference_model(any_model, 4, 32, manifest.lineage["head_bits"]), IDS))
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).item()
    assert report["nll_torch"] == pytest.approx(loss, rel=1e-5)
    assert report["perplexity_torch"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert report["perplexity_graph"] / report["perplexity_torch"] == pytest.approx(report["perplexity_ratio"])
    assert 0 < report["max_abs_logit_difference"] < 1
    assert report["tokens"] == 80


def test_one_wrong_weight_is_noticed(tiny_model, tmp_path):
    path = tiny_model()
    export_bundle(path, tmp_path / "bundle", bits=32)
    check_parity(tmp_path / "bundle", path, IDS, "dice")
    graph = onnx.load(tmp_path / "bundle/model.onnx", load_external_data=False).graph
    norm = next(i for i in graph.initializer if i.name == "layers.1.ffn_norm")
    offset = next(int(e.value) for e in norm.external_data if e.key == "offset")
    data = bytearray((tmp_path / "bundle/model.onnx.data").read_bytes())
    value = numpy_helper.to_array(onnx.TensorProto(data_type=1, dims=[1], raw_data=bytes(data[offset : offset + 4])))
    data[offset : offset + 4] = (value * 1.5).tobytes()
    (tmp_path / "bundle/model.onnx.data").write_bytes(data)
    with pytest.raises(SaapError, match=r"parity failed .*max_abs_logit_difference"):
        check_parity(tmp_path / "bundle", path, IDS, "dice")
