"""Parity: the reference that streams its layers equals the whole model, and a wrong graph is noticed."""

import math
from dataclasses import asdict

import onnx
import pytest
import torch
from onnx import numpy_helper
from support.export_cases import IDS, MODELS, logits_of, model_of
from support.exported import export_bundle, export_portable
from support.references import reference_model, streamed_logits

import export.parity.pieces
import export.parity.streamed
import export.parity.verify
from export.bundle.manifest import read_manifest, write_manifest
from export.engine.session import own_session
from export.parity.streamed import StreamedModel
from export.parity.verify import check_parity
from export.source import ModelSource, Precision
from saap.base.errors import UserError
from saap.tune import TuneOptions, tune


@pytest.mark.parametrize("kind", [*MODELS, "uneven", "tuned"])
def test_streamed_logits_and_the_report_are_the_whole_models(kind, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(export.parity.streamed, "HEAD_ROWS", 100)  # the vocabulary of 320 in four pieces
    monkeypatch.setattr(export.parity.streamed, "LOGIT_BYTES", 1)  # one row at a time
    path = model_of(kind, tiny_model, tmp_path)
    precisions = [Precision(bits, 32, bits) for bits in (32, 8, 4)]
    if kind == "tuned":
        tune(path, TuneOptions(learning_rate=2e-2), output=tmp_path / "tuned", data=IDS.repeat(4, 1))
        path = tmp_path / "tuned"
        precisions = [ModelSource(path).precision(None, None, None)]
    for precision in precisions:
        logits = torch.from_numpy(logits_of(reference_model(path, precision.bits, 32, precision.head_bits), IDS))
        found = torch.stack(list(streamed_logits(path, IDS, precision)))
        assert (found - logits).abs().max() <= 1e-5
    manifest = export_bundle(path, tmp_path / "bundle")
    assert (manifest.bits, manifest.lineage["head_bits"]) == (precision.bits, precision.head_bits)
    report = check_parity(tmp_path / "bundle", path, IDS, "dice")
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).item()
    assert report.nll_torch == pytest.approx(loss, rel=1e-5)
    assert report.perplexity_torch == pytest.approx(math.exp(loss), rel=1e-4)
    assert report.perplexity_graph / report.perplexity_torch == pytest.approx(report.perplexity_ratio)
    assert 0 < report.max_abs_logit_difference < 1
    assert report.tokens == 80


def test_one_layer_is_in_memory_at_a_time(tiny_model):
    reference = StreamedModel(ModelSource(tiny_model()), Precision(32, 0, 32))
    layers = reference._model.model.layers
    held, seen = [], []

    def look(*_):
        held.append([all(not p.is_meta for p in layer.parameters()) for layer in layers])

    for layer in layers:
        layer.mlp.register_forward_pre_hook(look)
    reference.hidden_states(IDS, lambda label, done, total: seen.append((done, total)))
    assert held == [[True, False, False], [False, True, False], [False, False, True]]
    assert all(p.is_meta for layer in layers for p in layer.parameters())
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]


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
    write_manifest(tmp_path / "bundle", read_manifest(tmp_path / "bundle"))
    with pytest.raises(UserError, match=r"parity failed .*max_abs_logit_difference"):
        check_parity(tmp_path / "bundle", path, IDS, "dice")


def numbers(report):
    return {key: value for key, value in asdict(report).items() if isinstance(value, float)}


@pytest.mark.parametrize("bits", [4, 32])
@pytest.mark.parametrize("write", [export_bundle, export_portable])
def test_a_large_bundle_is_run_in_pieces(tiny_model, tmp_path, monkeypatch, write, bits):
    path, bundle = tiny_model(), tmp_path / "bundle"
    write(path, bundle, bits=bits)
    whole = check_parity(bundle, path, IDS, "dice")
    before = sorted(bundle.iterdir())
    sessions = []
    monkeypatch.setattr(export.parity.verify, "WHOLE_BYTES", 0)
    monkeypatch.setattr(
        export.parity.pieces, "own_session", lambda *a: sessions.append(own_session(*a)) or sessions[-1]
    )
    # The portable graph's nodes are fused by ONNX Runtime, and other ones where a cut lies between them.
    near = {"abs": 1e-6} if write is export_bundle else {"rel": 2e-2, "abs": 1e-5}
    for piece_bytes, least in ((1, 20), (20_000, 3)):
        monkeypatch.setattr(export.parity.pieces.logits_in_pieces, "__defaults__", (1, piece_bytes))
        sessions.clear()
        assert numbers(check_parity(bundle, path, IDS, "dice")) == pytest.approx(numbers(whole), **near)
        assert len(sessions) > least
    assert sorted(bundle.iterdir()) == before


def test_a_piece_holds_its_own_weights_only(tiny_model, tmp_path):
    export_bundle(tiny_model(), tmp_path / "bundle", bits=32)
    graph = onnx.load(tmp_path / "bundle/scoring.onnx", load_external_data=False).graph
    sizes = {i.name: export.parity.pieces._bytes_of(i) for i in graph.initializer}
    cut = export.parity.pieces._Cut(graph, 20_000)
    held = [{name for node in piece for name in node.input if name in sizes} for piece in cut.pieces]
    assert set().union(*held) >= {name for name, size in sizes.items() if size > 100}
    largest = max(size for name, size in sizes.items() if "embedding" not in name)
    assert all(sum(sizes[n] for n in names if "embedding" not in n) <= 20_000 + largest for names in held)
