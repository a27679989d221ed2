"""Bundles in the oldest ONNX Runtime that they say they need: a real installation of it, in its own environment."""

import json
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest
from support.cuts import cut
from support.export_cases import IDS, UNEVEN
from support.exported import export_bundle

from export.engine.onnxruntime import OnnxRuntimeEngine
from export.engine.protocol import EngineOptions
from export.graph.targets import ONNXRUNTIME_INT8_CACHE, ONNXRUNTIME_MIN, ONNXRUNTIME_WINDOWS
from saap.prune.plan import PrunePlan

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import json, sys
import numpy as np, onnxruntime
from pathlib import Path
from export.engine.onnxruntime import OnnxRuntimeEngine
from export.engine.protocol import EngineOptions
decoder = OnnxRuntimeEngine(Path(sys.argv[1]), EngineOptions(1, 32))
rows = [decoder.prefill(np.array(json.loads(sys.argv[2])))]
rows += [decoder.step(token) for token in (3, 1, 4)]
print(json.dumps({"version": onnxruntime.__version__, "logits": [row.tolist() for row in rows[-1:]]}))
"""


def install(directory: Path, version: str) -> Path:
    if sys.version_info >= (3, 14):
        pytest.skip(f"onnxruntime {version} has no wheel for Python {sys.version_info.major}.{sys.version_info.minor}")
    venv.create(directory, with_pip=True)
    python = directory / "bin/python"
    wanted = [f"onnxruntime=={version}.*", "numpy", "psutil", "msgspec"]
    done = subprocess.run([python, "-m", "pip", "install", "-q", *wanted], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"onnxruntime {version} cannot be installed here: {done.stderr.strip().splitlines()[-1:]}")
    return python


@pytest.mark.slow
@pytest.mark.parametrize(
    ("version", "options"),
    [
        (ONNXRUNTIME_MIN, {"onnxruntime": ONNXRUNTIME_MIN}),
        (ONNXRUNTIME_MIN, {"bits": 8}),
        (ONNXRUNTIME_INT8_CACHE, {"kv_bits": 8, "ids": IDS}),
    ],
    ids=["4 bit", "8 bit", "int8 cache"],
)
def test_the_oldest_runtime_computes_the_same(tiny_model, tmp_path, version, options):
    manifest = export_bundle(cut(tiny_model(), tmp_path / "slim", PrunePlan(UNEVEN)), tmp_path / "bundle", **options)
    compare_with(version, manifest, tmp_path)


@pytest.mark.slow
def test_windows_in_the_oldest_runtime_that_has_them_right(tiny_family, tmp_path):
    manifest = export_bundle(tiny_family("mistral", sliding_window=4), tmp_path / "bundle")
    compare_with(ONNXRUNTIME_WINDOWS, manifest, tmp_path)


def compare_with(version, manifest, tmp_path):
    assert manifest.onnxruntime_min == version
    prompt = IDS[0, :9].tolist()
    decoder = OnnxRuntimeEngine(tmp_path / "bundle", EngineOptions(1, 32))
    decoder.prefill(np.array(prompt))
    for token in (3, 1, 4):
        expected = decoder.step(token)
    command = [install(tmp_path / "venv", version), "-c", SCRIPT, tmp_path / "bundle", json.dumps(prompt)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-600:]
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["version"].startswith(version)
    assert np.abs(np.array(answer["logits"][0]) - expected).max() < 0.05 * np.abs(expected).max()
