"""Log-likelihoods of continuations: what the tails of one context share is computed once.

A multiple-choice example asks for log p(tail | context) of a few tails of one context. A torch model reads the context
and all its tails as one row under a block mask, a bundle keeps the context's cache and appends each tail to it. Both
give what reading every (context, tail) pair from its start would give, up to rounding; that is what is done with a
torch model that convolves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from saap.models.architectures import shape_of, traits_of

# Tokens of one forward pass of a torch model. More keeps a GPU busy; on CPUs the attention over the packed row, which
# grows with its square, stays an eighth of a small model's work.
PACKED_TOKENS = 512

Likelihood = tuple[float, bool]  # sum of log p over the tail in nats, and whether greedy decoding would have said it


@dataclass(frozen=True)
class Group:
    """A context and what may follow it: token ids, neither empty."""

    context: tuple[int, ...]
    tails: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> int:
        """Tokens that are read when the context is read once; a tail's last one is only predicted."""
        return len(self.context) + sum(len(tail) - 1 for tail in self.tails)


Scorer = Callable[[Sequence[Group]], Iterator[list[Likelihood]]]  # one list per group, in order, as they are done
Logits = NDArray[np.float32]
Cache = TypeVar("Cache")


class CachedReader(Protocol[Cache]):
    """Anything that keeps a cache, such as :meth:`export.engine.scoring.BundleScorer.read`."""

    def __call__(self, ids: NDArray[np.int64], cache: Cache | None = None, last: bool = False) -> tuple[Logits, Cache]:
        """Logits [1, s, vocab] of ids [1, s], with ``last`` of the last position only, and the cache after them."""


def torch_continuations(model: PreTrainedModel) -> Scorer:
    """Score with a transformers model; several groups are packed into one row.

    The mask is given in full, one for layers of full attention and one for those of sliding windows, so every
    architecture of :mod:`saap.models.architectures` goes through the same lines, but for those with convolutions.
    """
    if shape_of(model.config.to_dict()).conv_kernel:
        return _apart(model)
    windows = {layer.window for layer in traits_of(model.config.to_dict()).layers}

    @torch.inference_mode()
    def read(groups: Sequence[Group]) -> list[list[Likelihood]]:
        row = _packed(groups)
        away = row.positions[:, None] - row.positions[None]
        masks = [
            _additive(row.visible & (away < window) if window else row.visible, model.dtype).to(model.device)
            for window in sorted(windows)
        ]
        mask = dict(zip(("full_attention", "sliding_attention"), masks, strict=True)) if len(masks) == 2 else masks[0]
        logits = model(
            input_ids=row.ids[None].to(model.device),
            attention_mask=mask,
            position_ids=row.positions[None].to(model.device),
            logits_to_keep=row.predicting.to(model.device),
            use_cache=False,
        ).logits[0]
        return _likelihoods(logits.float().cpu().numpy(), [group.tails for group in groups])

    def score(groups: Sequence[Group]) -> Iterator[list[Likelihood]]:
        for batch in _batches(groups, PACKED_TOKENS):
            yield from read(batch)

    return score


def _apart(model: PreTrainedModel) -> Scorer:
    """Every tail behind its own copy of the context: a convolution looks across the borders of a packed row."""

    @torch.inference_mode()
    def read(group: Group) -> list[Likelihood]:
        known, longest = len(group.context), max(map(len, group.tails))
        rows = torch.zeros(len(group.tails), known + longest - 1, dtype=torch.int64)
        for row, tail in zip(rows, group.tails, strict=True):
            row[: known + len(tail) - 1] = torch.tensor((*group.context, *tail[:-1]))
        logits = model(input_ids=rows.to(model.device), logits_to_keep=longest, use_cache=False).logits
        predicting = [row[: len(tail)].float().cpu().numpy() for row, tail in zip(logits, group.tails, strict=True)]
        return _likelihoods(np.concatenate(predicting), [group.tails])[0]

    return lambda groups: map(read, groups)


def cached_continuations(read: CachedReader[Cache], workers: int = 1) -> Scorer:
    """Score with what keeps a cache, ``workers`` groups side by side: a tail is too short for several threads."""

    def weigh(group: Group) -> list[Likelihood]:
        logits, cache = read(np.array([group.context]), last=True)
        first = logits[0]
        rows = []
        for tail in group.tails:
            rows.append(first)
            if len(tail) > 1:
                rows.append(read(np.array([tail[:-1]]), cache)[0][0])
        return _likelihoods(np.concatenate(rows), [group.tails])[0]

    def score(groups: Sequence[Group]) -> Iterator[list[Likelihood]]:
        with ThreadPoolExecutor(workers) as pool:
            yield from pool.map(weigh, groups)  # left early or interrupted it takes back what has not begun

    return score


@dataclass(frozen=True)
class _Row:
    """Groups as a row of s tokens; ``predicting`` lists, tail after tail, the places whose logits predict that tail."""

    ids: torch.Tensor
    positions: torch.Tensor
    visible: torch.Tensor
    predicting: torch.Tensor


def _packed(groups: Sequence[Group]) -> _Row:
    ids: list[int] = []
    positions: list[int] = []
    blocks: list[int] = []  # of each token: the number of its context or tail
    owners: list[int] = []  # of each token: the block of its context
    predicting: list[int] = []
    block = 0
    for group in groups:
        owner, last = block, len(ids) + len(group.context) - 1
        for part, start in ((group.context, 0), *((tail[:-1], len(group.context)) for tail in group.tails)):
            if block > owner:
                predicting += [last, *range(len(ids), len(ids) + len(part))]
            ids += part
            positions += range(start, start + len(part))
            blocks += [block] * len(part)
            owners += [owner] * len(part)
            block += 1
    block_of, owner_of = torch.tensor(blocks), torch.tensor(owners)
    same = block_of[:, None] == block_of[None]
    context = owner_of[:, None] == block_of[None]  # a tail sees the context it belongs to
    return _Row(
        torch.tensor(ids), torch.tensor(positions), (same | context).tril(), torch.tensor(predicting, dtype=torch.int64)
    )


def _additive(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[1, 1, s, s]: zero where a key is visible, the least number elsewhere, which every attention takes."""
    return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)[None, None]


def _batches(groups: Sequence[Group], tokens: int) -> Iterator[list[Group]]:
    """Neighbours of at most ``tokens`` together; a longer group goes alone."""
    batch: list[Group] = []
    for group in groups:
        if batch and sum(g.tokens for g in batch) + group.tokens > tokens:
            yield batch
            batch = []
        batch.append(group)
    if batch:
        yield batch


def _likelihoods(logits: Logits, tails: Sequence[Sequence[Sequence[int]]]) -> list[list[Likelihood]]:
    """Likelihoods of tails per group out of their rows of logits [p, vocab] in one array."""
    targets = np.array([token for group in tails for tail in group for token in tail])
    top = logits.max(axis=-1)
    # Shifted by the largest logit nothing overflows; float64 holds the sum over the vocabulary.
    norm = top + np.log(np.exp(logits - top[:, None]).sum(axis=-1, dtype=np.float64))
    logprobs = np.take_along_axis(logits, targets[:, None], axis=-1)[:, 0].astype(np.float64) - norm
    greedy = logits.argmax(axis=-1) == targets
    pairs: list[list[Likelihood]] = []
    at = 0
    for group in tails:
        pairs.append([])
        for tail in group:
            piece = slice(at, at := at + len(tail))
            pairs[-1].append((float(logprobs[piece].sum()), bool(greedy[piece].all())))
    return pairs
