"""What onnxruntime-genai writes with a bundle."""

from pathlib import Path

import numpy as np
import pytest
import torch


def greedy(bundle: Path, prompt: torch.Tensor, length: int) -> list[int]:
    """A prompt, [t] int64, and its greedy continuation up to ``length`` tokens or an end; skips without genai."""
    genai = pytest.importorskip("onnxruntime_genai")
    params = genai.GeneratorParams(model := genai.Model(str(bundle)))
    params.set_search_options(max_length=length, do_sample=False)
    generator = genai.Generator(model, params)
    generator.append_tokens(prompt.numpy().astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return list(generator.get_sequence(0))
