"""The decoder of a bundle for a provider of ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

from bench.runtimes.cuda import CudaDecoder
from export.engine.onnxruntime import Decoder, OrtDecoder


def make_decoder(path: str | Path, threads: int, max_length: int, provider: str = "cpu") -> Decoder:
    """A bundle ready to run; its hashes are not checked.

    Args:
        threads: of ONNX Runtime; the caller pins the process.
        max_length: positions of the cache.

    Raises:
        BundleError, DecoderError: as the decoder's class says.
    """
    if provider == "cpu":
        return OrtDecoder(path, threads, max_length, verify=False)
    return CudaDecoder(path, threads, max_length)
