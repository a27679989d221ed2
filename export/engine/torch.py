"""The runtime of ``torch:DIR``: transformers, fp32, KV cache, greedy, token by token; loads torch in a worker only."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from export.engine.facts import ModelFacts, PeerFacts
from export.engine.onnxruntime import Decoder, Ids, Logits

if TYPE_CHECKING:
    import torch
    from transformers import Cache, PreTrainedModel

PACKAGES = ("torch", "transformers")


class TorchDecoder:
    """A transformers causal model behind the ``Decoder`` protocol."""

    def __init__(self, model: PreTrainedModel, path: Path, max_length: int) -> None:
        self.model, self.path, self.max_length = model, path, max_length
        self.reset()

    def reset(self) -> None:
        self.cache: Cache | None = None
        self.length = 0

    def prefill(self, ids: Ids) -> Logits:
        import torch

        with torch.inference_mode():
            row = torch.from_numpy(np.ascontiguousarray(ids)).view(1, -1)
            out = self.model(input_ids=row, past_key_values=self.cache, **self._given(self.length + len(ids)))
        self.cache = out.past_key_values
        self.length += len(ids)
        logits: Logits = out.logits[0, -1].numpy()
        return logits

    def step(self, token_id: int) -> Logits:
        return self.prefill(np.array([token_id], np.int64))

    def _given(self, length: int) -> dict[str, object]:
        """What the model takes beside ids and cache; ``length`` positions are in use then."""
        return {"use_cache": True, "logits_to_keep": 1}


def facts(decoder: Decoder) -> PeerFacts:
    """Sizes of the tensors in memory; the cache has been used."""
    import torch
    import transformers

    assert isinstance(decoder, TorchDecoder)
    model = decoder.model
    # By address, since two parameters may share one table; buffers too, since quantised layers hold integers there.
    parameters = {p.data_ptr(): p for p in model.parameters() if p.numel()}
    tensors = {**{b.data_ptr(): b for b in model.buffers() if b.numel()}, **parameters}
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    head_shares = {p.data_ptr() for p in head.parameters()} if head is not None else set()
    gathered = sum(_bytes(p) for p in table.parameters() if p.data_ptr() not in head_shares)
    assert decoder.cache is not None
    kept = [getattr(layer, name, None) for layer in decoder.cache.layers for name in ("keys", "values")]
    cached = [tensor for tensor in kept if isinstance(tensor, torch.Tensor)]
    on_disk = sum(p.stat().st_size for p in decoder.path.glob("*.safetensors"))
    sizes = ModelFacts(
        parameters=sum(p.numel() for p in parameters.values()),
        model_bytes=on_disk or None,
        weight_bytes_per_token=sum(map(_bytes, tensors.values())) - gathered,
        kv_bytes_per_token=sum(map(_bytes, cached)) // decoder.length,
        bits=32,
        unknown={} if on_disk else {"model_bytes": "the directory has no safetensors files"},
    )
    return PeerFacts({"torch": torch.__version__, "transformers": transformers.__version__}, sizes)


def _bytes(tensor: torch.Tensor) -> int:
    return int(tensor.numel() * tensor.element_size())


def load(path: Path, threads: int, max_length: int) -> Decoder:
    """The model in fp32; a directory of ours goes through its own loader, integers made ordinary weights."""
    import torch

    from saap.models.checkpoint import built_model, load_model

    torch.set_num_threads(threads)
    if (path / "saap.json").is_file():
        model = load_model(path, materialise=True, verify=False)  # whoever asks for a run has done it
    else:
        model = built_model(path, torch.float32).eval()
    return TorchDecoder(model, path, max_length)
