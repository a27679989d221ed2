"""Text that a model writes itself: no licence, and the model's own language."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING

from saap.base.errors import UserError
from saap.base.progress import Progress
from saap.text.documents import Sequences

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH = 16  # sequences that are written together


def self_written(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sequences: Sequences,
    *,
    held_out: bool = False,
    progress: Progress | None = None,
) -> torch.Tensor:
    """Let the dense model write its own text: int64 [count, length].

    Sampled at temperature 1 from the model's whole distribution, beginning with BOS; past an end token it begins
    something new. The same model and seed give the same text. After data-free calibration, LLM-QAT (arXiv 2305.17888).

    Args:
        tokenizer: gives the BOS id, else the EOS id, to begin with.
        held_out: text for evaluation, from a seed that calibration and tuning do not use.

    Raises UserError: no token to begin with, or more positions than the model has.
    """
    import torch

    count, length = sequences.count, sequences.length
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if first is None:
        raise UserError("the tokenizer names neither BOS nor EOS, so the model cannot begin a text: give a text file")
    limit = getattr(model.config, "max_position_embeddings", length)
    if length > limit:
        raise UserError(f"rows of {length} tokens do not fit the model's {limit} positions: give shorter ones")
    # 32 bits: torch's CPU generator ignores what is above, so an offset there would change nothing.
    purpose = f"{'held-out' if held_out else 'written'} {sequences.seed}"
    seed = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:4], "little")
    generator = torch.Generator().manual_seed(seed)
    rows: list[torch.Tensor] = []
    was_training = model.training
    model.train(False)
    try:
        for begin in torch.split(torch.full((count, 1), first, dtype=torch.int64), BATCH):
            done, ids = BATCH * len(rows) * length, begin
            for ids in _continued(model, begin, length, generator):
                if progress:
                    progress("writing text (tokens), by the dense model", done + ids.numel(), count * length)
            rows.append(ids)
    finally:
        model.train(was_training)
    return torch.cat(rows)


def _continued(
    model: PreTrainedModel, ids: torch.Tensor, length: int, generator: torch.Generator
) -> Iterator[torch.Tensor]:
    """``ids`` [batch, 1] with one more token each time, up to [batch, length]; the model keeps a cache."""
    import torch
    from transformers import DynamicCache

    # transformers 5.24 renames the argument and warns at every call by the old name.
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    cache = {name: DynamicCache(config=model.config)}
    while ids.shape[1] < length:
        with torch.no_grad():  # not inference_mode: the ids go into training later
            out = model(input_ids=ids[:, -1:].to(model.device), use_cache=True, **cache)
        # Drawn on the CPU, so that a seed means the same on every device.
        probabilities = out.logits[:, -1].float().softmax(-1).cpu()
        ids = torch.cat([ids, torch.multinomial(probabilities, 1, generator=generator)], dim=1)
        yield ids
