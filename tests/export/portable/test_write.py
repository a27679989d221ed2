"""The portable graphs: standard operators, checked in ONNX Runtime and in onnx's own reference implementation."""

import numpy as np
import onnx
import onnxruntime
import pytest
from packaging.version import Version
from support.cuts import cut
from support.export_cases import (
    FAMILIES,
    IDS,
    MODELS,
    UNEVEN,
    bytes_read,
    check_standard,
    feed,
    largest_differences,
    logits_of,
    model_of,
)
from support.exported import export_bundle, export_portable
from support.onnx_reference import reference
from support.references import reference_model

from export.bundle.manifest import read_manifest
from export.engine.scoring import empty_past
from saap.base.errors import UserError
from saap.models.checkpoint import load_model
from saap.prune.plan import PrunePlan
from saap.tune import TuneOptions, tune


@pytest.fixture
def uneven(tiny_model, tmp_path):
    return cut(tiny_model(), tmp_path / "slim", PrunePlan(UNEVEN))


@pytest.mark.parametrize("kind", [*MODELS, "uneven"])
def test_every_precision_computes_what_torch_does(kind, tiny_model, tmp_path):
    path, bundle = model_of(kind, tiny_model, tmp_path), tmp_path / "bundle"
    for bits in (32, 4, 8):
        manifest = export_portable(path, bundle, bits=bits, ids=IDS)
        check_standard(bundle)
        model = reference_model(path, bits, 32, bits)
        check_reference(bundle, model)
        if bits == 32:
            assert max(largest_differences(bundle, logits_of(model, IDS))) <= 1e-4
        else:
            assert (manifest.target, manifest.bits, manifest.accuracy_level) == ("portable", bits, 4)
            assert manifest.parity.kl <= 0.05
            check_fused(bundle, tmp_path / "optimised.onnx")
        # A tied table is stored once although it is gathered and multiplied; zero points add nothing.
        cpu = export_bundle(path, tmp_path / "cpu", bits=bits)
        assert manifest.files["model.onnx.data"].bytes <= cpu.files["model.onnx.data"].bytes + 4096
        assert bytes_read(bundle) == manifest.weight_bytes_per_token


def check_reference(bundle, model):
    """onnx's own implementation, independent of ONNX Runtime and without any fusion: a prompt, and a step after it."""
    manifest = read_manifest(bundle)
    found, *present = reference(bundle / "scoring.onnx").run(None, feed(manifest, IDS[:, :6].numpy()))
    expected = logits_of(model, IDS[:, :7])
    assert np.abs(found - expected[:, :6]).max() <= 1e-4
    past = dict(zip(empty_past(manifest, 1), present, strict=True))
    step = feed(manifest, IDS[:, 6:7].numpy(), np.ones((2, 7), np.int64), np.full((2, 1), 6)) | past
    assert np.abs(reference(bundle / "model.onnx").run(["logits"], step)[0] - expected[:, 6:]).max() <= 1e-4


def check_fused(bundle, optimised):
    """ONNX Runtime makes one node of each integer matrix."""
    if Version(onnxruntime.__version__) < Version("1.25"):  # older ones do not
        return
    manifest, options = read_manifest(bundle), onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(optimised)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(bundle / "model.onnx"), options)
    nodes = onnx.load(optimised, load_external_data=False).graph.node
    fused = [n for n in nodes if n.op_type == "MatMulNBits"]
    assert len(fused) == sum(2 * bool(s.query_heads) + 2 * bool(s.ffn) for s in manifest.layers) + 1
    assert {a.i for n in fused for a in n.attribute if a.name == "bits"} == {manifest.bits}
    assert not [n for n in nodes if n.op_type == "DequantizeLinear"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_equals_transformers(family, tiny_family, tmp_path):
    model_type, overrides = FAMILIES[family]
    path = tiny_family(model_type, **overrides)
    manifest = export_portable(path, tmp_path / "bundle")
    check_standard(tmp_path / "bundle")
    expected = logits_of(load_model(path), IDS)
    assert expected.std() > 0.3
    assert max(largest_differences(tmp_path / "bundle", expected)) <= 1e-4
    ids = IDS[:, :12].numpy()
    found = reference(tmp_path / "bundle/scoring.onnx").run(["logits"], feed(manifest, ids))[0]
    assert np.abs(found - expected[:, :12]).max() <= 1e-4


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", ["phi3", "gemma3", "gemma4", "gemma4 untied"])
def test_integers_of_packed_and_offset_families(family, bits, tiny_family, tmp_path):
    model_type, overrides = FAMILIES[family]
    path = tiny_family(model_type, **overrides)
    manifest = export_portable(path, tmp_path / "bundle", bits=bits, ids=IDS)
    ids = IDS[:, :12]
    found = reference(tmp_path / "bundle/scoring.onnx").run(["logits"], feed(manifest, ids.numpy()))[0]
    assert np.abs(found - logits_of(reference_model(path, bits, 32, bits), ids)).max() <= 1e-4


def test_left_padding_changes_nothing(uneven, tmp_path):
    manifest = export_portable(uneven, tmp_path / "bundle")
    session = onnxruntime.InferenceSession(str(tmp_path / "bundle/scoring.onnx"))
    row = IDS[:1, :9].numpy()
    (alone,) = session.run(["logits"], feed(manifest, row))
    padded = np.concatenate([np.full((1, 4), 7), row], axis=1)
    mask = np.concatenate([np.zeros((1, 4), np.int64), np.ones_like(row)], axis=1)
    (shifted,) = session.run(["logits"], feed(manifest, padded, mask, np.maximum(mask.cumsum(1) - 1, 0)))
    assert np.abs(shifted[:, 4:] - alone).max() <= 1e-5
    assert np.isfinite(shifted).all()


def test_tuned_integers_are_taken_as_they_are(uneven, tmp_path):
    tune(uneven, TuneOptions(learning_rate=2e-2), output=tmp_path / "tuned", data=IDS.repeat(4, 1))
    manifest = export_portable(tmp_path / "tuned", tmp_path / "bundle")
    ids = IDS[:, :6]
    found = reference(tmp_path / "bundle/scoring.onnx").run(["logits"], feed(manifest, ids.numpy()))[0]
    assert np.abs(found - logits_of(load_model(tmp_path / "tuned"), ids)).max() <= 1e-4
    assert manifest.bits == 4
    with pytest.raises(UserError, match=r"of --bits 4 and not 32: leave --bits out$"):
        export_portable(tmp_path / "tuned", tmp_path / "bundle", bits=32)


def test_bad_input_is_refused(tiny_model, tmp_path):
    with pytest.raises(UserError, match="3 bits are not supported"):
        export_portable(tiny_model(), tmp_path / "bundle", bits=3)
    with pytest.raises(UserError, match="not a multiple of the group size 64"):
        export_portable(tiny_model("other"), tmp_path / "bundle", bits=4, group_size=64)
    with pytest.raises(UserError, match="321 tokens is odd"):
        export_portable(tiny_model("odd", vocab_size=321), tmp_path / "bundle", bits=4)
    assert not (tmp_path / "bundle").exists()
