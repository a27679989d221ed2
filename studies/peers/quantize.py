"""Q4_0 by llama.cpp: run by the Python that has it, as `quantize.py SOURCE TARGET [pure]`; pure: the head too."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path


def quantize(source: Path, target: Path, *how: str) -> None:
    """Write the GGUF file anew."""
    from llama_cpp import llama_cpp

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.allow_requantize = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, True
    options.pure = "pure" in how
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(options)):
        sys.exit(f"llama.cpp could not quantize {source}")


if __name__ == "__main__":
    quantize(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
