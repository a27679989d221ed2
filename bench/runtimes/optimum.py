"""The runtime of ``optimum:DIR``: optimum-onnx's ``ORTModelForCausalLM`` with IO binding, greedy, token by token."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from bench.runtimes.facts import graph_facts
from bench.runtimes.onnxruntime import Decoder, Ids, Logits
from export.bundle.manifest import DECODE_GRAPH, MANIFEST


class OptimumDecoder:
    """A directory with ``model.onnx`` and ``config.json`` behind the ``Decoder`` protocol.

    Args:
        path: the directory.
        threads: intra-op threads of the session.
        max_length: positions that will be asked for; optimum grows its cache with every token.
    """

    def __init__(self, path: Path, threads: int, max_length: int) -> None:
        import onnxruntime
        import torch
        from optimum.onnxruntime import ORTModelForCausalLM

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.path = path
        self.max_length = max_length
        self.model: Any = ORTModelForCausalLM.from_pretrained(
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
        """Forget the sequence."""
        self._cache, self._length = None, 0

    def prefill(self, ids: Ids) -> Logits:
        """Append ``ids`` [n]; the logits [vocab] after the last of them."""
        import torch

        end = self._length + len(ids)
        with torch.inference_mode():
            out = self.model(
                input_ids=torch.from_numpy(np.ascontiguousarray(ids)).view(1, -1),
                attention_mask=self._mask[:, :end],
                past_key_values=self._cache,
            )
        self._cache, self._length = out.past_key_values, end
        logits: Logits = out.logits[0, -1].numpy()
        return logits

    def step(self, token_id: int) -> Logits:
        """Append one token; the logits [vocab] after it."""
        return self.prefill(np.array([token_id], np.int64))


def facts(decoder: Decoder) -> dict[str, Any]:
    """Versions, and sizes in bytes unless the directory is a bundle of ours, whose manifest has them."""
    assert isinstance(decoder, OptimumDecoder)
    versions = {name: metadata.version(name) for name in ("optimum-onnx", "transformers", "torch")}
    if (decoder.path / MANIFEST).is_file():
        return {"versions": versions}
    return {"model": graph_facts(decoder.path / DECODE_GRAPH), "versions": versions}


def load(path: Path, threads: int, max_length: int) -> Decoder:
    """The directory, for a prompt and the generated tokens."""
    import torch

    torch.set_num_threads(threads)
    return OptimumDecoder(path, threads, max_length)


def prepare() -> None:
    """Import what loading needs: starting Python's packages is not loading a model."""
    import optimum.onnxruntime  # noqa: F401
