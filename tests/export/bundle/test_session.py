"""Packed weights in the user's cache."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from support.tiny_graphs import tiny_bundle

from export.bundle.decoder import OrtDecoder
from export.bundle.manifest import BundleError, read_manifest
from export.bundle.session import DecoderError, prepack, prepacked_directory

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
