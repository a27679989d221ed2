"""What reading a prompt takes beside the weights."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("torch")
from test_surgery import cut

from export.export import export_bundle
from saap.structures import LayerPlan, PrunePlan

WIDEST, LAYERS, TOKENS = 2048, 8, 192
GROWTH = """
import sys, numpy, psutil
from bench.runtime import OrtDecoder
decoder = OrtDecoder(sys.argv[1], 1, 256)
before = psutil.Process().memory_info().rss
for _ in range(3):
    decoder.reset()
    decoder.prefill(numpy.arange(int(sys.argv[2])))
    decoder.step(1)
print(psutil.Process().memory_info().rss - before)
"""


def test_a_prompt_takes_the_activations_of_one_layer(tiny_model, tmp_path):
    """Gate and up, packed and apart, their product and what the kernels work on: not those of every layer's width."""
    widths = [WIDEST - 64 * n for n in range(LAYERS)]
    plan = PrunePlan(tuple(LayerPlan(tuple(range(6)), (0, 1, 2), tuple(range(width))) for width in widths))
    slim = cut(tiny_model(intermediate_size=WIDEST, num_hidden_layers=LAYERS), tmp_path / "slim", plan)
    export_bundle(slim, tmp_path / "bundle")
    command = [sys.executable, "-c", GROWTH, str(tmp_path / "bundle"), str(TOKENS)]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    tensor = 4 * TOKENS * WIDEST
    assert 2 * tensor < grown < 8 * tensor, grown / tensor
