"""Quality: perplexity, and agreement with the dense model.

Everything here takes a ``score(ids [rows, tokens]) -> logits [rows, tokens, vocab]`` callable, so that torch models
and bundles go through the same arithmetic. What is predicted is for :mod:`saap.text.windows` to say; the
perplexity is exp of the mean NLL.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from saap.base.errors import UserError
from saap.base.progress import Progress, advance

Score = Callable[[torch.Tensor], torch.Tensor]

MOST_NATS = 700.0  # exp of more is no float
BATCH_TOKENS = 1024  # of one forward pass: their logits are 200 MB at a vocabulary of 49152


@dataclass(frozen=True)
class TextScores:
    """Numbers of one model; those against the dense model are None where there is none to compare with."""

    name: str
    nll: float  # nats per token
    kl: float | None  # mean KL(dense || model) in nats per token
    top1: float | None  # share of positions whose most likely token is the dense model's
    window_nll: tuple[float, ...]  # summed over the predictions of each window: what a paired comparison needs

    @property
    def perplexity(self) -> float | None:
        """exp(nll); None where no float holds it."""
        return None if self.nll > MOST_NATS else math.exp(self.nll)


def torch_scorer(model: PreTrainedModel) -> Score:
    @torch.inference_mode()
    def score(ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits
        return logits.float()

    return score


def score_models(
    scorers: Mapping[str, Score],
    ids: torch.Tensor,
    counted: torch.Tensor | None = None,
    *,
    reference: str | None = None,
    batch: int | None = None,
    progress: Progress | None = None,
) -> list[TextScores]:
    """Run all models over the same chunks, side by side, so that the reference's logits are never stored.

    Args:
        scorers: name -> score; all over one vocabulary.
        ids: [chunks, length] int64; losses are computed on their device.
        counted: [chunks, length - 1] bool, which predictions enter the means; None: all.
        reference: name of the dense model that KL and top-1 are against.
        batch: rows at once; None: as many as have about a thousand tokens.

    Raises:
        UserError: vocabularies differ, or a model's loss is no number.
    """
    counted = torch.ones_like(ids[:, 1:], dtype=torch.bool) if counted is None else counted
    batch = batch or max(1, BATCH_TOKENS // ids.shape[1])
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in scorers}
    losses: dict[str, list[float]] = {name: [] for name in scorers}
    for index, (rows, chosen) in enumerate(zip(ids.split(batch), counted.split(batch), strict=True)):
        advance(progress, "evaluating (chunks)", index * batch, len(ids))
        base = None if reference is None else _log_probabilities(scorers[reference], rows, chosen)
        for name, score in scorers.items():
            mine = base if name == reference and base is not None else _log_probabilities(score, rows, chosen)
            batch_losses = F.nll_loss(mine, rows[:, 1:][chosen], reduction="none").double()
            if not torch.isfinite(batch_losses).all():
                raise UserError(f"{name} gives losses that are no numbers (NaN or infinite): its weights are broken")
            losses[name] += [part.sum().item() for part in batch_losses.split(chosen.sum(1).tolist())]
            if base is not None:
                sums[name] += _agreement(name, mine, base)
    advance(progress, "evaluating (chunks)", len(ids), len(ids))
    count = int(counted.sum())
    results = []
    for name, total in sums.items():
        kl, top1 = (None, None) if reference is None else (max(total[0].item(), 0.0) / count, total[1].item() / count)
        results.append(TextScores(name, sum(losses[name]) / count, kl, top1, tuple(losses[name])))
    return results


def _log_probabilities(score: Score, rows: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    return F.log_softmax(score(rows).to(rows.device)[:, :-1][chosen], dim=-1)


def _agreement(name: str, mine: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """Sum KL and agreements over some predictions [n, vocab]."""
    if base.shape != mine.shape:
        raise UserError(
            f"{name} has a vocabulary of {mine.shape[-1]}, the reference {base.shape[-1]}: they do not compare"
        )
    kl = F.kl_div(mine, base, log_target=True, reduction="none").sum(-1).clamp_min(0).sum().item()
    same = (mine.argmax(-1) == base.argmax(-1)).sum().item()
    return torch.tensor([kl, float(same)], dtype=torch.float64)
