"""Text that a model writes itself, where no other text is at hand."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from devices.common.progress import Progress
from saap.system.errors import UserError

if TYPE_CHECKING:
    import torch


def self_written(
    model: Any,
    tokenizer: Any,
    n_sequences: int,
    length: int,
    seed: int,
    *,
    held_out: bool = False,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> torch.Tensor:
    """Let the dense model write its own text: int64 [n_sequences, length].

    Sampled at temperature 1 from the model's whole distribution, beginning with BOS; past an end token it begins
    something new. The same model, seed and batch size give the same text. After data-free calibration, LLM-QAT
    (arXiv 2305.17888).

    Args:
        model: a transformers causal model.
        tokenizer: gives the BOS id, else the EOS id, to begin with.
        held_out: text for evaluation, from a seed that calibration and tuning do not use.

    Raises:
        UserError: no token to begin with, or more positions than the model has.
    """
    import torch

    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if first is None:
        raise UserError("the tokenizer names neither BOS nor EOS, so the model cannot begin a text: give a text file")
    limit = getattr(model.config, "max_position_embeddings", length)
    if length > limit:
        raise UserError(f"rows of {length} tokens do not fit the model's {limit} positions: ask for shorter ones")
    generator = torch.Generator().manual_seed(_derived_seed("held-out" if held_out else "written", seed))
    rows: list[torch.Tensor] = []
    was_training = model.training
    model.eval()
    try:
        for start in range(0, n_sequences, batch_size):
            begin = torch.full((min(batch_size, n_sequences - start), 1), first, dtype=torch.int64)
            report = _scaled(progress, start / n_sequences, len(begin) / n_sequences)
            rows.append(_sample(model, begin, length, generator, report))
    finally:
        model.train(was_training)
    return torch.cat(rows)


def _sample(
    model: Any, begin: torch.Tensor, length: int, generator: torch.Generator, report: Callable[[float], None]
) -> torch.Tensor:
    """Continue ``begin`` [batch, 1] to [batch, length] with a cache, one token at a time."""
    import torch
    from transformers import DynamicCache

    ids = begin
    # transformers 5.24 renames the argument and warns at every call by the old name.
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    cache = {name: DynamicCache(config=model.config)}
    # no_grad, not inference_mode: the ids go into training later.
    with torch.no_grad():
        while ids.shape[1] < length:
            out = model(input_ids=ids[:, -1:].to(model.device), use_cache=True, **cache)
            # Drawn on the CPU, so that a seed means the same on every device.
            probabilities = out.logits[:, -1].float().softmax(-1).cpu()
            ids = torch.cat([ids, torch.multinomial(probabilities, 1, generator=generator)], dim=1)
            report(ids.shape[1] / length)
    return ids


def _derived_seed(purpose: str, seed: int) -> int:
    """32 bits: torch's CPU generator ignores what is above, so an offset there would change nothing."""
    return int.from_bytes(hashlib.sha256(f"{purpose} {seed}".encode()).digest()[:4], "little")


def _scaled(progress: Progress | None, start: float, share: float) -> Callable[[float], None]:
    def report(done: float) -> None:
        if progress:
            progress("writing text with the dense model", start + done * share, 1)

    return report
