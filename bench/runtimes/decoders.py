"""The decoder for a provider, and what it really ran on."""

from __future__ import annotations

from pathlib import Path

from bench.runtimes.cuda import DeviceDecoder
from bench.runtimes.providers import ProviderFacts
from export.bundle.decoder import Decoder, OrtDecoder


def make_decoder(
    path: str | Path,
    threads: int,
    max_length: int,
    provider: str = "cpu",
    *,
    cuda_graph: bool = False,
) -> Decoder:
    """A bundle ready to run; its hashes are not checked.

    Args:
        threads: of ONNX Runtime; the caller pins the process.
        max_length: positions of the cache.
        cuda_graph: replay decode steps as a CUDA graph.

    Raises:
        BundleError, DecoderError: as the decoder's class says.
    """
    if provider == "cpu" and not cuda_graph:
        return OrtDecoder(path, threads, max_length, verify=False)
    return DeviceDecoder(path, threads, max_length, provider, cuda_graph=cuda_graph)


def provider_facts(decoder: Decoder) -> ProviderFacts:
    """What the decoder ran on, to be asked after it has run."""
    if isinstance(decoder, DeviceDecoder):
        return decoder.gpu.facts(decoder.provider)
    return ProviderFacts("cpu", "cpu")
