"""What reading a prompt takes beside the weights."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
from support.cuts import cut
from support.exported import export_bundle

from export.bundle.manifest import PREFILL_CHUNK
from saap.prune.plan import LayerPlan, PrunePlan

WIDEST, LAYERS = 2048, 8
TOKENS = 4 * PREFILL_CHUNK
TENSOR = 4 * PREFILL_CHUNK * WIDEST  # bytes of gate or up of the widest layer, of one piece
SCRIPT = """
import pathlib, sys, numpy, psutil
from export.engine.onnxruntime import OnnxRuntimeEngine
from export.engine.protocol import EngineOptions
decoder = OnnxRuntimeEngine(pathlib.Path(sys.argv[1]), EngineOptions(1, int(sys.argv[2]) + 8))
before = psutil.Process().memory_info().rss
for _ in range(3):
    decoder.rewind(0)
    decoder.prefill(numpy.arange(int(sys.argv[2])) % 200)
    decoder.step(1)
print(psutil.Process().memory_info().rss - before)
"""


@pytest.fixture
def tapered(tiny_model, tmp_path) -> Path:
    """Write a bundle of layers each of its own width, the first the widest."""
    widths = [WIDEST - 64 * n for n in range(LAYERS)]
    plan = PrunePlan(tuple(LayerPlan(tuple(range(6)), (0, 1, 2), tuple(range(width))) for width in widths))
    slim = cut(
        tiny_model(intermediate_size=WIDEST, num_hidden_layers=LAYERS, max_position_embeddings=2048),
        tmp_path / "slim",
        plan,
    )
    export_bundle(slim, tmp_path / "bundle")
    return tmp_path / "bundle"


def growth(bundle: Path) -> float:
    """Resident memory that three prompts add to a process, in tensors of the widest layer."""
    command = [sys.executable, "-c", SCRIPT, str(bundle), str(TOKENS)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) / TENSOR


def test_a_prompt_takes_the_activations_of_one_layer_and_piece(tapered):
    """Gate and up, packed and apart, their product and what the kernels work on: not those of every layer's width."""
    assert 2 < growth(tapered) < 8
