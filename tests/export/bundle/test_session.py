"""Packed weights in the user's cache."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.tiny_graphs import tiny_bundle

from export.bundle.decoder import OrtDecoder
from export.bundle.manifest import BundleError, read_manifest
from export.bundle.prepacked import prepack, prepacked_directory
from export.bundle.session import DecoderError

IDS = np.arange(5, dtype=np.int64)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SAAP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/prepacked"


@pytest.fixture
def bundle(tmp_path):
    return tiny_bundle(tmp_path / "bundle")


def test_packed_weights_compute_the_same_and_are_made_once(bundle, cache):
    expected = OrtDecoder(bundle, 1, 16).prefill(IDS).copy()
    found = OrtDecoder(bundle, 1, 16, prepacked=True)
    assert found.huge_page_bytes == 0
    assert np.array_equal(found.prefill(IDS), expected)
    (directory,) = cache.iterdir()
    stamp = (directory / "model.onnx").stat().st_mtime_ns
    assert np.array_equal(OrtDecoder(bundle, 1, 16, prepacked=True).prefill(IDS), expected)
    assert (directory / "model.onnx").stat().st_mtime_ns == stamp
    assert [p.name for p in cache.iterdir()] == [directory.name]


def test_another_bundle_or_runtime_has_a_place_of_its_own(bundle, cache, tmp_path, monkeypatch):
    other = tiny_bundle(tmp_path / "other", seed=1)
    first = prepacked_directory(read_manifest(bundle))
    assert prepacked_directory(read_manifest(other)) != first
    monkeypatch.setattr("onnxruntime.__version__", "9.9.9")
    assert prepacked_directory(read_manifest(bundle)) != first


def test_a_graph_that_cannot_be_loaded_leaves_nothing(bundle, cache):
    (bundle / "model.onnx").write_bytes(b"\x0a\x03abc")
    with pytest.raises((DecoderError, BundleError)):
        prepack(bundle / "model.onnx", read_manifest(bundle))
    assert not list(cache.glob("*"))


def test_weights_outside_the_folder_are_refused_before_a_session_is_made(bundle, tmp_path):
    outside = tmp_path / "outside.data"
    data = bundle / "model.onnx.data"
    shutil.move(data, outside)
    Path(data).symlink_to(outside)
    with pytest.raises(BundleError, match="outside"):
        OrtDecoder(bundle, 1, 16, verify=False)


def test_a_flipped_byte_of_packed_weights_is_found_and_they_are_made_again(bundle, cache):
    expected = OrtDecoder(bundle, 1, 16, prepacked=True).prefill(IDS).copy()
    for name in ("model.onnx", "model.onnx.data", "seal.json"):
        path = next(cache.iterdir()) / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        assert np.array_equal(OrtDecoder(bundle, 1, 16, prepacked=True).prefill(IDS), expected)
        assert path.read_bytes() != content and len(list(cache.iterdir())) == 1


def test_first_runs_at_once_keep_each_other_s_folder(bundle, cache):
    """Four processes find nothing there; every one of them computes, and one folder is left."""
    script = (
        "import sys, numpy; from export.bundle.decoder import OrtDecoder; sys.stdin.readline();"
        f"print(OrtDecoder({str(bundle)!r}, 1, 16, prepacked=True).prefill(numpy.arange(5)).argmax())"
    )
    root = Path(__file__).resolve().parents[3]
    runs = [
        subprocess.Popen([sys.executable, "-c", script], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(4)
    ]
    for run in runs:
        run.stdin.write(b"go\n")
        run.stdin.flush()
    said = {run.communicate()[0].strip() for run in runs}
    assert said == {str(OrtDecoder(bundle, 1, 16).prefill(IDS).argmax()).encode()}
    assert [run.returncode for run in runs] == [0] * 4 and len(list(cache.iterdir())) == 1
