"""The engine of ``optimum:DIR``: optimum-onnx's ``ORTModelForCausalLM`` with IO binding, greedy, token by token."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from export.bundle import foreign_graph
from export.bundle.manifest import DECODE_GRAPH, MANIFEST
from export.engine.facts import ModelFacts, file_facts
from export.engine.protocol import EngineOptions
from export.engine.torch import TorchEngine


class OptimumEngine(TorchEngine):
    """A directory with ``model.onnx`` and ``config.json``; optimum grows its cache with every token."""

    def __init__(self, source: Path, options: EngineOptions) -> None:
        import onnxruntime
        import torch
        from optimum.onnxruntime import ORTModelForCausalLM

        self.files = foreign_graph(source / DECODE_GRAPH)
        torch.set_num_threads(options.threads)
        session = onnxruntime.SessionOptions()
        session.intra_op_num_threads = options.threads
        model = ORTModelForCausalLM.from_pretrained(
            source,
            file_name=DECODE_GRAPH,
            session_options=session,
            provider="CPUExecutionProvider",
            use_cache=True,
            use_io_binding=True,
            local_files_only=True,
        )
        super().__init__(model, source, options)
        self._mask = torch.ones(1, options.max_length, dtype=torch.int64)

    def _inputs(self, length: int) -> dict[str, object]:
        return {"attention_mask": self._mask[:, :length]}

    def versions(self) -> dict[str, str]:
        return {name: metadata.version(name) for name in ("optimum-onnx", "transformers", "torch")}

    def facts(self) -> ModelFacts | None:
        return None if (self.path / MANIFEST).is_file() else file_facts(*self.files)


open = OptimumEngine
