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


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "seal.json", "checked.json"])
@pytest.mark.parametrize("place", [0, 0.3, 0.5, 0.9, 1])
def test_a_flipped_byte_of_packed_weights_is_found_and_they_are_made_again(bundle, cache, name, place):
    for _ in range(2):  # the second start notes that it has checked them
        expected = OrtDecoder(bundle, 1, 16, prepacked=True).prefill(IDS).copy()
    assert {path.name for path in next(cache.iterdir()).iterdir()} == {
        "model.onnx", "model.onnx.data", "seal.json", "checked.json",
    }  # fmt: skip
    path = next(cache.iterdir()) / name
    content = bytearray(path.read_bytes())
    content[round(place * (len(content) - 1))] ^= 1
    path.write_bytes(content)
    assert np.array_equal(OrtDecoder(bundle, 1, 16, prepacked=True).prefill(IDS), expected)
    assert len(list(cache.iterdir())) == 1
    assert not path.exists() or path.read_bytes() != content  # what is made again has not been checked again yet


PAIRS = """
import os, sys
import numpy as np
from export.bundle.decoder import OrtDecoder

bundle, cache, pairs, expected = sys.argv[1:]
for pair in range(int(pairs)):
    os.environ["SAAP_CACHE"] = f"{cache}/{pair}"
    reading, writing = os.pipe()
    both = []
    for _ in range(2):
        if not (pid := os.fork()):
            os.close(writing)
            os.read(reading, 1)  # both begin when the other is there, too
            found = OrtDecoder(bundle, 1, 16, prepacked=True).prefill(np.arange(5)).tobytes().hex()
            os._exit(0 if found == expected else 3)
        both.append(pid)
    os.close(reading), os.close(writing)
    print(*(os.waitpid(pid, 0)[1] for pid in both), len(os.listdir(f"{cache}/{pair}/prepacked")))
"""


@pytest.mark.parametrize("pairs", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_pairs_of_first_runs_at_once_answer_right(bundle, tmp_path, pairs):
    expected = OrtDecoder(bundle, 1, 16).prefill(IDS).tobytes().hex()
    words = [sys.executable, "-c", PAIRS, bundle, tmp_path / "caches", pairs, expected]
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run([str(word) for word in words], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["0 0 1"] * pairs, done.stderr
