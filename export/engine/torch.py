"""The engine of ``torch:DIR``: transformers, fp32, KV cache, greedy, token by token; loads torch in a worker only."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from export.engine.facts import ModelFacts
from export.engine.protocol import Engine, EngineOptions, Ids, Logits

if TYPE_CHECKING:
    import torch
    from transformers import Cache, PreTrainedModel


class TorchEngine(Engine):
    """A transformers causal model; its cache grows with every token."""

    def __init__(self, model: PreTrainedModel, source: Path, options: EngineOptions) -> None:
        self.model, self.path, self.max_length = model, source, options.max_length
        # transformers 5.24 renames the argument and warns at every call by the old name.
        names = inspect.signature(model.forward).parameters
        self._cache_name = "cache" if "cache" in names else "past_key_values"
        self.rewind(0)

    def rewind(self, length: int) -> int:
        """Forget all but the first ``length`` positions."""
        if not length:
            self.cache: Cache | None = None
        elif self.cache is not None:
            self.cache.crop(length)
        self.length = length
        return length

    def prefill(self, ids: Ids) -> Logits:
        import torch

        with torch.inference_mode():
            row = torch.from_numpy(np.ascontiguousarray(ids)).view(1, -1).to(self.model.device)
            cache = {self._cache_name: self.cache}
            out = self.model(input_ids=row, **cache, **self._inputs(self.length + len(ids)))
        self.cache = out.past_key_values
        self.length += len(ids)
        logits: Logits = out.logits[0, -1].cpu().numpy()
        return logits

    def step(self, token_id: int) -> Logits:
        return self.prefill(np.array([token_id], np.int64))

    def _inputs(self, length: int) -> dict[str, object]:
        """Build the inputs beside ids and cache; ``length`` positions are in use then."""
        return {"use_cache": True, "logits_to_keep": 1}

    def logits(self, rows: Ids) -> Logits:
        import torch

        with torch.inference_mode():
            logits: Logits = self.model(input_ids=torch.from_numpy(rows), use_cache=False).logits.float().numpy()
        return logits

    def versions(self) -> dict[str, str]:
        import torch
        import transformers

        return {"torch": torch.__version__, "transformers": transformers.__version__}

    def facts(self) -> ModelFacts | None:
        """Sizes of the tensors in memory, once the cache has been used."""
        import torch

        # By address, since two parameters may share one table; buffers too, since quantised layers hold integers there.
        parameters = {p.data_ptr(): p for p in self.model.parameters() if p.numel()}
        tensors = {**{b.data_ptr(): b for b in self.model.buffers() if b.numel()}, **parameters}
        table, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        head_shares = {p.data_ptr() for p in head.parameters()} if head is not None else set()
        gathered = sum(_bytes(p) for p in table.parameters() if p.data_ptr() not in head_shares)
        assert self.cache is not None
        parts = [getattr(layer, name, None) for layer in self.cache.layers for name in ("keys", "values")]
        cached = [tensor for tensor in parts if isinstance(tensor, torch.Tensor)]
        on_disk = sum(p.stat().st_size for p in self.path.glob("*.safetensors"))
        return ModelFacts(
            parameters=sum(p.numel() for p in parameters.values()),
            model_bytes=on_disk or None,
            weight_bytes_per_token=sum(map(_bytes, tensors.values())) - gathered,
            kv_bytes_per_token=sum(map(_bytes, cached)) // self.length,
            bits=32,
            unknown={} if on_disk else {"model_bytes": "the directory has no safetensors files"},
        )


def _bytes(tensor: torch.Tensor) -> int:
    return int(tensor.numel() * tensor.element_size())


def open(source: Path, options: EngineOptions) -> Engine:
    """Load a model in fp32; a directory of ours goes through its own loader, integers made ordinary weights."""
    import torch

    from saap.models.checkpoint import built_model, load_model

    torch.set_num_threads(options.threads)
    if (source / "saap.json").is_file():
        model = load_model(source, materialise=True, verify=False)  # whoever asks for a run has done it
    else:
        model = built_model(source, torch.float32).eval()
    return TorchEngine(model, source, options)
