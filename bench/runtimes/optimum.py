"""The runtime of ``optimum:DIR``: optimum-onnx's ``ORTModelForCausalLM`` with IO binding, greedy, token by token."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import numpy as np

from bench.runtimes.facts import PeerFacts, graph_facts
from export.bundle.decoder import Decoder, Ids, Logits
from export.bundle.graph_check import check_graph
from export.bundle.manifest import DECODE_GRAPH, MANIFEST

PACKAGES = ("optimum.onnxruntime",)


class OptimumDecoder:
    """A directory with ``model.onnx`` and ``config.json`` behind the ``Decoder`` protocol.

    Args:
        max_length: positions that will be asked for; optimum grows its cache with every token.
    """

    def __init__(self, path: Path, threads: int, max_length: int) -> None:
        import onnxruntime
        import torch
        from optimum.onnxruntime import ORTModelForCausalLM

        check_graph(path / DECODE_GRAPH, nested=True)
        torch.set_num_threads(threads)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.path, self.max_length = path, max_length
        self._model = ORTModelForCausalLM.from_pretrained(
            path,
            file_name=DECODE_GRAPH,
            session_options=options,
            provider="CPUExecutionProvider",
            use_cache=True,
            use_io_binding=True,
            local_files_only=True,
        )
        self._mask = torch.ones(1, max_length, dtype=torch.int64)
        self.reset()

    def reset(self) -> None:
        self._cache, self._length = None, 0

    def prefill(self, ids: Ids) -> Logits:
        import torch

        end = self._length + len(ids)
        with torch.inference_mode():
            out = self._model(
                input_ids=torch.from_numpy(np.ascontiguousarray(ids)).view(1, -1),
                attention_mask=self._mask[:, :end],
                past_key_values=self._cache,
            )
        self._cache, self._length = out.past_key_values, end
        logits: Logits = out.logits[0, -1].numpy()
        return logits

    def step(self, token_id: int) -> Logits:
        return self.prefill(np.array([token_id], np.int64))


load = OptimumDecoder


def facts(decoder: Decoder) -> PeerFacts:
    """Versions, and sizes in bytes unless the directory is a bundle of ours, whose manifest has them."""
    assert isinstance(decoder, OptimumDecoder)
    versions = {name: metadata.version(name) for name in ("optimum-onnx", "transformers", "torch")}
    ours = (decoder.path / MANIFEST).is_file()
    return PeerFacts(versions, None if ours else graph_facts(decoder.path / DECODE_GRAPH))
