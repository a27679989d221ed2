"""The door to a bundle: what it hands out was checked."""

import os
from pathlib import Path

import pytest
from support.tiny_graphs import tiny_bundle

from export.bundle import Bundle
from export.bundle.manifest import BundleError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tiny_bundle(tmp_path / "bundle")


def flip(path: Path) -> None:
    """Change a byte; size and times stay."""
    status, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_files_are_handed_out(path: Path) -> None:
    bundle = Bundle.open(path)
    assert bundle.graph() == bundle.file("model.onnx") == path / "model.onnx"
    assert bundle.graph_files("scoring.onnx") == [path / "scoring.onnx", path / "model.onnx.data"]
    assert bundle.check() is bundle


def test_a_flipped_byte_is_refused_by_what_reads_it(path: Path) -> None:
    bundle = Bundle.open(path)
    bundle.graph()
    flip(path / "model.onnx.data")
    for attempt in (lambda: bundle.file("model.onnx.data"), bundle.graph, bundle.check):
        with pytest.raises(BundleError, match=r"model\.onnx\.data does not match the hash in bundle\.json"):
            attempt()
    assert bundle.file("scoring.onnx")


def test_what_is_not_listed_or_not_there_is_refused(path: Path) -> None:
    bundle = Bundle.open(path)
    (path / "extra.txt").write_text("x")
    for attempt in (lambda: bundle.file("extra.txt"), bundle.check):
        with pytest.raises(BundleError, match=r"extra\.txt is not listed in bundle\.json"):
            attempt()
    (path / "scoring.onnx").unlink()
    with pytest.raises(BundleError, match=r"scoring\.onnx is missing"):
        bundle.graph("scoring.onnx")
    os.mkfifo(path / "scoring.onnx")
    with pytest.raises(BundleError, match=r"scoring\.onnx is missing"):
        bundle.graph("scoring.onnx")
