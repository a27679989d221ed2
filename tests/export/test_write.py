"""The exported graphs against transformers, on tiny random models."""

from __future__ import annotations

import json
import re

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file, save_file
from support.command_line import refused
from support.cuts import cut
from support.edited import edited
from support.export_cases import IDS, MODELS, UNEVEN, logits_of, model_of, tensors_of
from support.exported import export_bundle
from support.references import reference_model

from export.bundle.decoder import OrtDecoder
from export.bundle.manifest import BundleError, read_manifest, verify_files
from export.generate.scoring import BundleScorer
from export.graph.targets import ONNXRUNTIME_INT8_CACHE
from export.parity.verify import check_parity
from saap.models.checkpoint import load_model, read_config
from saap.models.weight_files import tensor_reader
from saap.prune.plan import PrunePlan
from saap.system.errors import UserError
from saap.tune import TuneOptions, tune


@pytest.fixture(params=[*MODELS, "uneven"])
def any_model(request, tiny_model, tmp_path):
    return model_of(request.param, tiny_model, tmp_path)


def test_fp32_prefill_chunked_prefill_and_decode(any_model, tmp_path):
    export_bundle(any_model, tmp_path / "bundle", bits=32)
    expected = logits_of(load_model(any_model), IDS)
    assert np.abs(BundleScorer(tmp_path / "bundle").logits(IDS.numpy()) - expected).max() <= 1e-4
    row, decoder = IDS[0].numpy(), OrtDecoder(tmp_path / "bundle", 1, 48)
    assert np.abs(decoder.prefill(row[:17]) - expected[0, 16]).max() <= 1e-4
    assert np.abs(decoder.prefill(row[17:30]) - expected[0, 29]).max() <= 1e-4
    for position in range(30, 40):
        assert np.abs(decoder.step(int(row[position])) - expected[0, position]).max() <= 1e-4


def test_int4_level_0_equals_torch_on_the_same_integers(any_model, tmp_path):
    export_bundle(any_model, tmp_path / "bundle", bits=4, accuracy_level=0)
    expected = logits_of(reference_model(any_model, 4, 32, 4), IDS)
    assert np.abs(BundleScorer(tmp_path / "bundle").logits(IDS.numpy()) - expected).max() <= 2e-3
    dense = logits_of(load_model(any_model), IDS)
    assert np.abs(expected - dense).max() > 0.05, "nothing was quantised"


@pytest.mark.parametrize("bits", [4, 8])
def test_parity_report_of_the_deployed_precision(any_model, tmp_path, bits):
    manifest = export_bundle(any_model, tmp_path / "bundle", bits=bits, ids=IDS)
    assert manifest.parity.tokens == IDS.numel()
    assert manifest.parity.kl <= 0.05
    assert read_manifest(tmp_path / "bundle").parity == manifest.parity


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


def test_only_fast_kernels_are_written(any_model, tmp_path):
    for bits in (4, 8):
        export_bundle(any_model, tmp_path / "bundle", bits=bits)
        tensors = tensors_of(tmp_path / "bundle")
        quantised = [n for n in nodes_of(tmp_path / "bundle") if n.op_type == "MatMulNBits"]
        assert quantised
        for node in quantised:
            assert len(node.input) < 5 or not node.input[4], "g_idx switches the packing off"
            assert len(node.input) < 4 or not node.input[3], "symmetric groups need no zero points and are faster"
            assert {a.name: a.i for a in node.attribute}["accuracy_level"] == 4
            assert node.input[1] in tensors, "the weight must be a constant"


def test_eight_bit_below_level_4_is_refused(tiny_model, tmp_path):
    for wrong in ({"bits": 8}, {"bits": 4, "head_bits": 8}):
        with pytest.raises(UserError, match="8 bit needs accuracy level 4"):
            export_bundle(tiny_model(), tmp_path / "bundle", accuracy_level=0, **wrong)
    assert not (tmp_path / "bundle").exists()


def test_a_tied_table_is_stored_once_and_both_graphs_share_the_weights(tiny_model, tmp_path):
    for bits in (4, 32):
        manifest = export_bundle(tiny_model(), tmp_path / "bundle", bits=bits)
        graphs = [manifest.files[name].bytes for name in ("model.onnx", "scoring.onnx")]
        assert max(graphs) < 60_000
        table = 320 * 96 * bits // 8
        tables = [
            a for n, a in tensors_of(tmp_path / "bundle").items() if a.nbytes == table and "." in n and a.size >= 320
        ]
        assert (
            sum(
                "embedding" in n or "head" in n for n, a in tensors_of(tmp_path / "bundle").items() if a.nbytes == table
            )
            == 1
        )
        assert len(tables) >= 1


def test_weight_bytes_per_token_are_what_the_file_holds(any_model, tmp_path):
    for bits in (4, 8, 32):
        manifest = export_bundle(any_model, tmp_path / "bundle", bits=bits)
        tensors = tensors_of(tmp_path / "bundle")
        tied = read_config(any_model).get("tie_word_embeddings", True) is not False
        skip = ("cos", "sin", "embedding.scales3") + (() if tied else ("embedding.qweight", "embedding.weight"))
        read = sum(a.nbytes for n, a in tensors.items() if n not in skip and not n.startswith("constant."))
        assert manifest.weight_bytes_per_token == read


def test_kv_heads_are_concrete_per_layer(tiny_model, tmp_path):
    export_bundle(cut(tiny_model(), tmp_path / "slim", PrunePlan(UNEVEN)), tmp_path / "bundle")
    graph = onnx.load(tmp_path / "bundle/model.onnx", load_external_data=False).graph
    heads = [i.type.tensor_type.shape.dim[1].dim_value for i in graph.input if i.name.endswith(".key")]
    assert heads == [2, 2]
    manifest = read_manifest(tmp_path / "bundle")
    assert [layer.kv_heads for layer in manifest.kv_layers] == heads
    assert manifest.kv_bytes_per_token == 4 * 2 * 16 * sum(heads)
    assert json.loads((tmp_path / "bundle/genai_config.json").read_text())["model"]["decoder"]["num_hidden_layers"] == 2


def test_every_id_that_ends_a_text_is_in_the_bundle(tiny_model, tmp_path):
    manifest = export_bundle(tiny_model(), tmp_path / "bundle")
    assert manifest.eos_token_ids == [2, 0]
    assert manifest.bos_token_id == 1


def test_a_flipped_byte_is_found(tiny_model, tmp_path):
    export_bundle(tiny_model(), tmp_path / "bundle")
    data = bytearray((tmp_path / "bundle/model.onnx.data").read_bytes())
    data[12345] ^= 1
    (tmp_path / "bundle/model.onnx.data").write_bytes(data)
    with pytest.raises(BundleError, match=r"model\.onnx\.data does not match the hash"):
        verify_files(tmp_path / "bundle")


def test_names_outside_the_bundle_are_refused(tiny_model, tmp_path):
    export_bundle(tiny_model(), tmp_path / "bundle")
    manifest = json.loads((tmp_path / "bundle/bundle.json").read_text())
    for name in ("../tiny/config.json", "/etc/hostname", "model\0.onnx"):
        files = {**manifest["files"], name: {"bytes": 1, "sha256": "0"}}
        edited(tmp_path / "bundle/bundle.json", files=files)
        with pytest.raises(BundleError, match="outside the bundle"):
            read_manifest(tmp_path / "bundle")


def test_parity_that_fails_exports_nothing(tiny_model, tmp_path, monkeypatch):
    path, other = tiny_model(seed=1), tiny_model("other", seed=2)
    monkeypatch.setattr(
        "export.write.check_parity", lambda bundle, _, *rest, **options: check_parity(bundle, other, *rest)
    )
    with pytest.raises(UserError, match="parity failed"):
        export_bundle(path, tmp_path / "bundle", ids=IDS)
    assert not (tmp_path / "bundle").exists()


def test_unsupported_input_is_refused(tiny_model, tmp_path):
    dynamic = tiny_model(rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    with pytest.raises(UserError, match="rope type 'dynamic' is not supported"):
        export_bundle(dynamic, tmp_path / "bundle")
    with pytest.raises(UserError, match="not a multiple of the group size 64"):
        export_bundle(tiny_model("again"), tmp_path / "bundle", group_size=64)
    with pytest.raises(UserError, match="3 bits are not supported"):
        export_bundle(tiny_model("again2"), tmp_path / "bundle", bits=3)
    assert not (tmp_path / "bundle").exists()


def test_zero_points_of_their_own_reach_the_kernel(tiny_model, tmp_path):
    tune(tiny_model(), TuneOptions(), output=tmp_path / "tuned", data=IDS.repeat(4, 1))
    file = tmp_path / "tuned/model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.zero_points"
    tensors[name] = torch.full_like(tensors[name], 0x66)
    save_file(tensors, file)
    edited(tmp_path / "tuned/saap.json")
    export_bundle(tmp_path / "tuned", tmp_path / "bundle", ids=IDS)
    counts = {n.name or n.output[0]: len(n.input) for n in nodes_of(tmp_path / "bundle") if n.op_type == "MatMulNBits"}
    assert sorted(counts.values()) == [3] * (len(counts) - 1) + [4]


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
    stepwise = OrtDecoder(tmp_path / "int8", 1, 32)
    rows = [stepwise.prefill(IDS[0, :9].numpy()), *(stepwise.step(int(t)).copy() for t in IDS[0, 9:12])]
    assert np.abs(rows[-1] - found[0, 11]).max() < 1e-3


def test_an_int8_cache_without_text_is_refused(tiny_model, tmp_path):
    with pytest.raises(UserError, match="needs text"):
        export_bundle(tiny_model(), tmp_path / "bundle", kv_bits=8)


@pytest.mark.parametrize("bits", [4, 16])
def test_the_cuda_graph_is_half_precision_and_computes_the_same(tiny_model, tmp_path, bits):
    """ONNX Runtime's CPU kernels run the float16 graph too: what it computes is checked, its speed on a GPU is not."""
    model = cut(tiny_model(), tmp_path / "slim", PrunePlan(UNEVEN))
    manifest = export_bundle(model, tmp_path / "cuda", bits=bits, target="cuda")
    assert (manifest.target, manifest.kv_dtype, manifest.bits) == ("cuda", "float16", bits)
    graph = onnx.load(tmp_path / "cuda/model.onnx", load_external_data=False).graph
    floats = {i.data_type for i in graph.initializer} - {onnx.TensorProto.UINT8, onnx.TensorProto.INT64}
    assert floats == {onnx.TensorProto.FLOAT16}
    reference = export_bundle(model, tmp_path / "cpu", bits=4 if bits == 4 else 32, accuracy_level=0)
    assert reference.kv_dtype == "float32"
    found = BundleScorer(tmp_path / "cuda").logits(IDS.numpy())
    expected = BundleScorer(tmp_path / "cpu").logits(IDS.numpy())
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()


def test_sliding_windows_need_a_newer_runtime(tiny_family, tmp_path):
    path = tiny_family("mistral", sliding_window=8)
    with pytest.raises(UserError, match=r"1\.23 is too old, 1\.24 or newer is needed for sliding windows"):
        export_bundle(path, tmp_path / "bundle", onnxruntime="1.23")
    assert export_bundle(path, tmp_path / "bundle", onnxruntime="1.24").onnxruntime_min == "1.24"
    whole = tiny_family("mistral", name="whole", sliding_window=None)
    assert export_bundle(whole, tmp_path / "wide", onnxruntime="1.23").onnxruntime_min == "1.23"


def test_an_older_runtime_is_refused_when_it_is_loaded(tiny_family, tmp_path, monkeypatch):
    path = tiny_family("mistral", sliding_window=8)
    export_bundle(path, tmp_path / "bundle")
    monkeypatch.setattr("onnxruntime.__version__", "1.23.2")
    said = r"needs ONNX Runtime 1\.24 or newer, and 1\.23\.2 is installed"
    for load in (lambda: BundleScorer(tmp_path / "bundle"), lambda: OrtDecoder(tmp_path / "bundle", 1, 32)):
        with pytest.raises(ValueError, match=said):
            load()
    assert re.search(said, refused("export", path, "-o", tmp_path / "again"))
    assert not (tmp_path / "again").exists()


def test_targets_refuse_what_they_have_no_kernel_for(tiny_model, tmp_path):
    for options, message in (
        ({"bits": 8, "dotprod": False}, "without dot product has no 8-bit kernel"),
        ({"kv_bits": 8, "target": "cuda"}, "cache in float16"),
        ({"kv_bits": 8, "onnxruntime": "1.23"}, "1.23 has no int8 cache"),
        ({"onnxruntime": "1.19"}, "1.19 is too old"),
        ({"onnxruntime": "1.22"}, "1.22 is too old, 1.23 or newer is needed$"),
        ({"onnxruntime": "new"}, "no version of ONNX Runtime"),
        ({"bits": 16}, "16 bits are not supported"),
    ):
        with pytest.raises(UserError, match=message):
            export_bundle(tiny_model(), tmp_path / "bundle", **options)
    manifest = export_bundle(tiny_model(), tmp_path / "old", dotprod=False)
    assert manifest.accuracy_level == 0
