"""What `saap devices check` computes of memory against what was measured, and measured again."""

import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support.fit_models import MB, SMOL, SMOL8, SMOL32, X86

from devices.fit.memory import Model, memory_of
from saap.cli.devices.fit import read_model

WIDE = replace(
    SMOL, weight_bytes_per_token=69_505_024, kv_bytes_per_token=8192, widest_ffn=4096, hidden=1024,
    attention=((16, 4),) * 4,
)  # fmt: skip
GEMMA = replace(
    SMOL, weight_bytes_per_token=167_750_144, kv_bytes_per_token=36_864, widest_ffn=2048, hidden=640, head_dim=256,
    attention=((4, 1),) * 18,
)  # fmt: skip


@pytest.mark.parametrize(
    ("model", "filled", "private"),
    [
        (SMOL, 136, 144.9),
        (SMOL, 1032, 191.4),
        (SMOL, 2008, 236.9),
        (SMOL, 4008, 329.7),
        (replace(SMOL, kv_bytes_per_token=11_520, kv_dtype="int8"), 1032, 155.9),
        (replace(SMOL, accuracy_level=0), 136, 111.2),
        (SMOL8, 136, 212.1),
        (SMOL32, 136, 580.8),
        (WIDE, 2008, 160.2),
        (GEMMA, 136, 254.2),
        (GEMMA, 2008, 321.3),
    ],
)
def test_memory_against_what_was_measured(model: Model, filled: int, private: float) -> None:
    """Private megabytes after a prompt and 8 tokens, and 30 of libraries; x86-64, ONNX Runtime 1.32.0."""
    predicted = memory_of(model, X86, filled).total / MB
    assert 0.98 < predicted / (private + 30) < 1.05


RESIDENT = """
import pathlib, sys, numpy
from bench.measure.memory import resident_split
from export.engine.onnxruntime import OnnxRuntimeEngine
from export.engine.protocol import EngineOptions
import onnxruntime
libraries = resident_split().file
decoder = OnnxRuntimeEngine(pathlib.Path(sys.argv[1]), EngineOptions(1, int(sys.argv[2])))
decoder.prefill(numpy.arange(int(sys.argv[3])) % 1000 + 5)
for _ in range(8):
    decoder.step(7)
print(libraries + resident_split().anonymous)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the constants were measured on x86-64")
@pytest.mark.parametrize(
    ("flags", "prompt"), [([], 128), ([], 2000), (["--bits", "8"], 128), (["--no-dotprod"], 128), (["--kv", "8"], 1000)]
)
def test_memory_of_a_real_bundle(real_model: Path, tmp_path: Path, flags: list[str], prompt: int) -> None:
    """The table of docs/devices.md once more, in a process of its own."""
    export = [
        sys.executable,
        "-m",
        "saap.cli",
        "export",
        str(real_model),
        "-o",
        str(tmp_path / "b"),
        "--parity",
        "none",
    ]
    subprocess.run([*export, *flags], check=True, capture_output=True)
    arguments = [str(tmp_path / "b"), str(prompt + 8), str(prompt)]
    done = subprocess.run([sys.executable, "-c", RESIDENT, *arguments], capture_output=True, text=True, check=True)
    predicted = memory_of(read_model(tmp_path / "b"), X86, prompt + 8).total
    assert 0.95 < predicted / int(done.stdout) < 1.1
