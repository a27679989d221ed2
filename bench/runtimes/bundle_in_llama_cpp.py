"""The runtime of ``BUNDLE@llama.cpp``: llama.cpp as `saap generate` runs it, with its weights on huge pages."""

from __future__ import annotations

from functools import partial

from bench.runtimes.llama_cpp import PACKAGES, facts
from export.engine.llama_cpp import LlamaCppDecoder

__all__ = ["PACKAGES", "facts", "load"]

load = partial(LlamaCppDecoder, huge_pages=True)
