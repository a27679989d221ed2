"""Sessions of ONNX Runtime."""

import shutil
from pathlib import Path

import pytest
from support.tiny_graphs import tiny_bundle

from export.bundle.manifest import BundleError
from export.engine.onnxruntime import OnnxRuntimeEngine
from export.engine.protocol import EngineOptions


def test_weights_outside_the_folder_are_refused_before_a_session_is_made(tmp_path):
    bundle = tiny_bundle(tmp_path / "bundle")
    outside = tmp_path / "outside.data"
    data = bundle / "model.onnx.data"
    shutil.move(data, outside)
    Path(data).symlink_to(outside)
    with pytest.raises(BundleError, match="outside"):
        OnnxRuntimeEngine(bundle, EngineOptions(1, 16))
