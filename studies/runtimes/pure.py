"""Q4_0 of everything, the head too: what `llama-quantize --pure` makes of a GGUF file of floats.

saap export smollm2-135m -o dense-F32.gguf --target gguf --bits 32
python studies/runtimes/pure.py dense-F32.gguf dense-Q4_0-pure.gguf    # a Python that has llama-cpp-python
"""

import ctypes
import sys

from llama_cpp import llama_cpp


def main(source: str, out: str) -> None:
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.pure = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, True
    sys.exit(llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(options)))


if __name__ == "__main__":
    main(*sys.argv[1:])
