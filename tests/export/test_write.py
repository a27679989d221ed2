"""The exported graphs against transformers, on tiny random models."""

import json
import re

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from packaging.version import Version
from support.command_line import refused
from support.cuts import cut
from support.export_cases import (
    IDS,
    MODELS,
    UNEVEN,
    bytes_read,
    largest_differences,
    logits_of,
    model_of,
    tensors_of,
)
from support.exported import export_bundle
from support.references import reference_model

from export.bundle.manifest import read_manifest
from export.engine.onnxruntime import OnnxRuntimeEngine
from export.engine.protocol import EngineOptions
from export.engine.scoring import BundleScorer
from export.graph.targets import ONNXRUNTIME_INT8_CACHE
from export.options import ExportOptions
from export.parity.verify import check_parity
from export.write import export
from saap.base.errors import UserError
from saap.models.checkpoint import load_model
from saap.models.weight_files import tensor_reader
from saap.prune.plan import PrunePlan
from saap.tune import TuneOptions, tune


@pytest.mark.parametrize("kind", [*MODELS, "uneven"])
def test_every_precision_computes_what_torch_does(kind, tiny_model, tmp_path):
    path, bundle = model_of(kind, tiny_model, tmp_path), tmp_path / "bundle"
    dense = logits_of(load_model(path), IDS)
    manifest = export_bundle(path, bundle, bits=32)
    assert manifest.weight_bytes_per_token == bytes_read(bundle)
    assert max(largest_differences(bundle, dense)) <= 1e-4
    export_bundle(path, bundle, bits=4, dotprod=False)
    expected = logits_of(reference_model(path, 4, 32, 4), IDS)
    assert np.abs(BundleScorer(bundle).logits(IDS.numpy()) - expected).max() <= 2e-3
    assert np.abs(expected - dense).max() > 0.05, "nothing was quantised"
    for bits in (4, 8):
        manifest = export_bundle(path, bundle, bits=bits, ids=IDS)
        assert manifest.parity.tokens == IDS.numel() and manifest.parity.kl <= 0.05
        assert read_manifest(bundle).parity == manifest.parity
        assert manifest.weight_bytes_per_token == bytes_read(bundle)
        check_fast_kernels(bundle)


def check_fast_kernels(bundle):
    tensors = tensors_of(bundle)
    quantised = [n for n in nodes_of(bundle) if n.op_type == "MatMulNBits"]
    assert quantised
    for node in quantised:
        assert len(node.input) < 5 or not node.input[4], "g_idx switches the packing off"
        assert len(node.input) < 4 or not node.input[3], "symmetric groups need no zero points and are faster"
        assert {a.name: a.i for a in node.attribute}["accuracy_level"] == 4
        assert node.input[1] in tensors, "the weight must be a constant"


def test_tuned_integers_are_in_the_file_bit_for_bit(tiny_model, tmp_path):
    slim = cut(tiny_model(), tmp_path / "slim", PrunePlan(UNEVEN))
    tune(slim, TuneOptions(learning_rate=2e-2), output=tmp_path / "tuned", data=IDS.repeat(4, 1))
    export_bundle(tmp_path / "tuned", tmp_path / "bundle", ids=IDS)
    found, (_, read) = tensors_of(tmp_path / "bundle"), tensor_reader(tmp_path / "tuned")
    fused = {"qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], "o": ["self_attn.o_proj"],
             "gate_up": ["mlp.gate_proj", "mlp.up_proj"], "down": ["mlp.down_proj"]}  # fmt: skip
    checked = 0
    for name, array in found.items():
        if name.startswith("layers.") and name.rsplit(".", 1)[1] in ("qweight", "scales", "zero_points"):
            _, layer, matrix, part = name.split(".")
            stacked = torch.cat([read(f"model.layers.{layer}.{m}.{part}") for m in fused[matrix]]).numpy()
            assert array.reshape(-1).tobytes() == stacked.reshape(-1).tobytes(), name
            checked += 1
    assert checked == 2 * (2 + 4 + 2)  # symmetric: the kernel knows the zero points
    table = read("model.embed_tokens.qweight").numpy()
    assert found["embedding.qweight"].tobytes() == table.tobytes()
    norm = read("model.norm.weight").numpy()
    assert found["norm"].tobytes() == norm.tobytes()


def nodes_of(bundle, name="model.onnx"):
    return onnx.load(bundle / name, load_external_data=False).graph.node


def test_a_tied_table_is_stored_once_and_both_graphs_share_the_weights(tiny_model, tmp_path):
    for bits in (4, 32):
        manifest = export_bundle(tiny_model(), tmp_path / "bundle", bits=bits)
        assert max(manifest.files[name].bytes for name in ("model.onnx", "scoring.onnx")) < 60_000
        tensors = tensors_of(tmp_path / "bundle")
        tables = [name for name, array in tensors.items() if array.nbytes == 320 * 96 * bits // 8]
        assert len([name for name in tables if "embedding" in name or "head" in name]) == 1


def test_kv_heads_are_concrete_per_layer(tiny_model, tmp_path):
    export_bundle(cut(tiny_model(), tmp_path / "slim", PrunePlan(UNEVEN)), tmp_path / "bundle")
    graph = onnx.load(tmp_path / "bundle/model.onnx", load_external_data=False).graph
    heads = [i.type.tensor_type.shape.dim[1].dim_value for i in graph.input if i.name.endswith(".key")]
    assert heads == [2, 2]
    manifest = read_manifest(tmp_path / "bundle")
    assert [layer.kv_heads for layer in manifest.kv_layers] == heads
    assert manifest.kv_bytes_per_token == 4 * 2 * 16 * sum(heads)
    assert json.loads((tmp_path / "bundle/genai_config.json").read_text())["model"]["decoder"]["num_hidden_layers"] == 2


def test_ends_of_text_are_in_the_manifest(tiny_model, tmp_path):
    manifest = export_bundle(tiny_model(), tmp_path / "bundle")
    assert (manifest.bos_token_id, manifest.eos_token_ids) == (1, [2, 0])


def test_parity_that_fails_exports_nothing(tiny_model, tmp_path, monkeypatch):
    path, other = tiny_model(seed=1), tiny_model("other", seed=2)
    monkeypatch.setattr(
        "export.write.check_parity", lambda bundle, _, *rest, **options: check_parity(bundle, other, *rest)
    )
    with pytest.raises(UserError, match="parity failed"):
        export_bundle(path, tmp_path / "bundle", ids=IDS)
    assert not (tmp_path / "bundle").exists()


def test_what_is_wrong_with_chosen_integers_names_the_model(tiny_model, tmp_path, monkeypatch):
    path = tiny_model()

    def broken(source, *_):
        raise UserError(f"{source}/config.json is damaged")

    monkeypatch.setattr("export.write.write_bundle", broken)
    with pytest.raises(UserError, match=rf"^{path}/config\.json is damaged$"):
        export(path, ExportOptions(), output=tmp_path / "bundle")


@pytest.mark.skipif(
    Version(onnxruntime.__version__) < Version(ONNXRUNTIME_INT8_CACHE), reason="this ONNX Runtime has no int8 cache"
)
def test_an_int8_cache_is_close_to_a_float_one(tiny_model, tmp_path):
    model = cut(tiny_model(), tmp_path / "slim", PrunePlan(UNEVEN))
    plain = export_bundle(model, tmp_path / "plain", bits=32)
    manifest = export_bundle(model, tmp_path / "int8", bits=32, kv_bits=8, ids=IDS)
    assert manifest.kv_dtype == "int8"
    assert manifest.kv_bytes_per_token * 4 == plain.kv_bytes_per_token
    assert not (tmp_path / "int8/probe.onnx").exists()
    found = BundleScorer(tmp_path / "int8").logits(IDS.numpy())
    expected = BundleScorer(tmp_path / "plain").logits(IDS.numpy())
    spread = expected.std()
    assert 0 < np.abs(found - expected).max() < 0.2 * spread
    stepwise = OnnxRuntimeEngine(tmp_path / "int8", EngineOptions(1, 32))
    rows = [stepwise.prefill(IDS[0, :9].numpy()), *(stepwise.step(int(t)).copy() for t in IDS[0, 9:12])]
    assert np.abs(rows[-1] - found[0, 11]).max() < 1e-3


@pytest.mark.parametrize("bits", [4, 16])
def test_the_cuda_graph_is_half_precision_and_computes_the_same(tiny_model, tmp_path, bits):
    """ONNX Runtime's CPU kernels run the float16 graph too: what it computes is checked, its speed on a GPU is not."""
    model = cut(tiny_model(), tmp_path / "slim", PrunePlan(UNEVEN))
    manifest = export_bundle(model, tmp_path / "cuda", bits=bits, target="cuda")
    assert (manifest.target, manifest.kv_dtype, manifest.bits) == ("cuda", "float16", bits)
    graph = onnx.load(tmp_path / "cuda/model.onnx", load_external_data=False).graph
    floats = {i.data_type for i in graph.initializer} - {onnx.TensorProto.UINT8, onnx.TensorProto.INT64}
    assert floats == {onnx.TensorProto.FLOAT16}
    reference = export_bundle(model, tmp_path / "cpu", bits=4 if bits == 4 else 32, dotprod=False)
    assert reference.kv_dtype == "float32"
    found = BundleScorer(tmp_path / "cuda").logits(IDS.numpy())
    expected = BundleScorer(tmp_path / "cpu").logits(IDS.numpy())
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()


def test_sliding_windows_need_a_newer_runtime_to_write_and_to_load(tiny_family, tmp_path, monkeypatch):
    path, bundle = tiny_family("mistral", sliding_window=8), tmp_path / "bundle"
    with pytest.raises(UserError, match=r"1\.23 is too old, 1\.24 or newer is needed for sliding windows"):
        export_bundle(path, bundle, onnxruntime="1.23")
    assert export_bundle(path, bundle, onnxruntime="1.24").onnxruntime_min == "1.24"
    whole = tiny_family("mistral", name="whole", sliding_window=None)
    assert export_bundle(whole, tmp_path / "wide", onnxruntime="1.23").onnxruntime_min == "1.23"
    monkeypatch.setattr("onnxruntime.__version__", "1.23.2")
    said = r"needs ONNX Runtime 1\.24 or newer, and 1\.23\.2 is installed"
    for load in (lambda: BundleScorer(bundle), lambda: OnnxRuntimeEngine(bundle, EngineOptions(1, 32))):
        with pytest.raises(ValueError, match=said):
            load()
    assert re.search(said, refused("export", path, "-o", tmp_path / "again"))
    assert not (tmp_path / "again").exists()


def test_what_cannot_be_exported_is_refused(tiny_model, tmp_path):
    path = tiny_model()
    dynamic = tiny_model("dynamic", rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    for model, options, message in (
        (dynamic, {}, "rope type 'dynamic' is not supported"),
        (path, {"group_size": 64}, "not a multiple of the group size 64"),
        (path, {"bits": 3}, "3 bits are not supported"),
        (path, {"head_bits": 8, "dotprod": False}, "without dot product has no 8-bit kernel"),
        (path, {"kv_bits": 8}, "needs text"),
        (path, {"bits": 8, "dotprod": False}, "without dot product has no 8-bit kernel"),
        (path, {"kv_bits": 8, "target": "cuda"}, "cache in float16"),
        (path, {"kv_bits": 8, "onnxruntime": "1.23"}, "1.23 has no int8 cache"),
        (path, {"onnxruntime": "1.19"}, "1.19 is too old"),
        (path, {"onnxruntime": "1.22"}, "1.22 is too old, 1.23 or newer is needed$"),
        (path, {"onnxruntime": "new"}, "no version of ONNX Runtime"),
        (path, {"bits": 16}, "16 bits are not supported"),
    ):
        with pytest.raises(UserError, match=message):
            export_bundle(model, tmp_path / "bundle", **options)
    assert not (tmp_path / "bundle").exists()
    assert export_bundle(path, tmp_path / "old", dotprod=False).accuracy_level == 0
