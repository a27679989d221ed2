"""The runtime of ``optimum:DIR``: optimum-onnx's ``ORTModelForCausalLM`` with IO binding, greedy, token by token."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from export.bundle.graph_check import check_graph
from export.bundle.manifest import DECODE_GRAPH, MANIFEST
from export.engine.facts import PeerFacts, file_facts
from export.engine.onnxruntime import Decoder
from export.engine.torch import TorchDecoder

PACKAGES = ("optimum.onnxruntime",)


class OptimumDecoder(TorchDecoder):
    """A directory with ``model.onnx`` and ``config.json`` behind the ``Decoder`` protocol.

    Args:
        max_length: positions that will be asked for; optimum grows its cache with every token.
    """

    def __init__(self, path: Path, threads: int, max_length: int) -> None:
        import onnxruntime
        import torch
        from optimum.onnxruntime import ORTModelForCausalLM

        self.files = [path / DECODE_GRAPH, *check_graph(path / DECODE_GRAPH, nested=True)]
        torch.set_num_threads(threads)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        model = ORTModelForCausalLM.from_pretrained(
            path,
            file_name=DECODE_GRAPH,
            session_options=options,
            provider="CPUExecutionProvider",
            use_cache=True,
            use_io_binding=True,
            local_files_only=True,
        )
        super().__init__(model, path, max_length)
        self._mask = torch.ones(1, max_length, dtype=torch.int64)

    def _given(self, length: int) -> dict[str, object]:
        return {"attention_mask": self._mask[:, :length]}


load = OptimumDecoder


def facts(decoder: Decoder) -> PeerFacts:
    """Versions, and sizes in bytes unless the directory is a bundle of ours, whose manifest has them."""
    assert isinstance(decoder, OptimumDecoder)
    versions = {name: metadata.version(name) for name in ("optimum-onnx", "transformers", "torch")}
    ours = (decoder.path / MANIFEST).is_file()
    return PeerFacts(versions, None if ours else file_facts(*decoder.files))
