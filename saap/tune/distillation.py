"""KL divergence of a student to a teacher of whom the k likeliest tokens are known, with its gradient in closed form.

The vocabulary is merged into k + 1 buckets: the kept tokens K and one for all others. With the teacher's probabilities
p, the student's q = softmax(z / T), and their mass outside K, p_r and q_r:

    L = sum_{i in K} p_i log(p_i / q_i) + p_r log(p_r / q_r)

Merging outcomes never raises a divergence (data-processing inequality), so L is a divergence of its own, 0 where the
buckets agree, and a lower bound of the full KL(teacher || student), which it is for k = vocabulary. Its gradient is

    dL/dz_j = (q_j - p_j) / T  for j in K,  q_j (1 - p_r / q_r) / T  for all others.

The temperature is that of Hinton et al. 2015 (arXiv:1503.02531): both sides are softened and L is multiplied by T^2, so
that its gradient stays comparable with the language-modelling loss. p at another temperature cannot be told from k
probabilities (the mass outside K changes with it), so the log-probabilities that are given must be those at T.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from saap.system.errors import UserError

SMALLEST_SHARE = 1e-30  # of q_r, so that p_r / q_r is finite


def distillation_loss(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    logprobs: torch.Tensor,
    mask: torch.Tensor,
    temperature: float = 1.0,
    *,
    reduction: str = "mean",
) -> torch.Tensor:
    """KL(teacher || student) over the kept tokens and one bucket for the rest, nats per token, times T^2.

    Beside the logits at most one float32 tensor of their size is alive: a scratch one in the forward pass, which is
    freed, and the gradient itself in the backward pass. Nothing of that size is kept between them.

    Args:
        logits: the student's [b, t, V], any floating type.
        tokens: the teacher's likeliest tokens, int64 [b, t, k], no token twice.
        logprobs: their log-probabilities AT ``temperature`` [b, t, k], as :class:`saap.tune.teacher.TeacherTargets`
        gives.
        mask: bool [b, t], the places that count.
        temperature: T, above 0.
        reduction: ``mean`` over the places that count (0 where there are none), or their ``sum``.

    Raises:
        UserError: a temperature that is not above 0.
    """
    if not temperature > 0:
        raise UserError(f"a temperature of {temperature} is not allowed: give a number above 0")
    if logits.shape[:2] != tokens.shape[:2] or tokens.shape != logprobs.shape or mask.shape != tokens.shape[:2]:
        shapes = [tuple(one.shape) for one in (logits, tokens, logprobs, mask)]
        raise ValueError(f"logits, tokens, logprobs and mask of shapes {shapes} do not belong together")
    total = _BucketDivergence.apply(logits, tokens, logprobs, mask, float(temperature))
    return total if reduction == "sum" else total / mask.sum().clamp_min(1)


def bucket_shares(logprobs: torch.Tensor, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities [..., k] and the mass outside them [...], summing to 1 however the logarithms were rounded."""
    kept = logprobs.exp()
    whole = kept.sum(-1, keepdim=True)
    if logprobs.shape[-1] == vocabulary:
        return kept / whole, torch.zeros_like(whole[..., 0])
    kept = kept / whole.clamp_min(1)
    return kept, (1 - kept.sum(-1)).clamp_min(0)


class _BucketDivergence(torch.autograd.Function):
    """T^2 L summed over the places of the mask."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        tokens: torch.Tensor,
        logprobs: torch.Tensor,
        mask: torch.Tensor,
        temperature: float,
    ) -> torch.Tensor:
        """Shapes as in :func:`distillation_loss`."""
        floats = torch.float64 if logits.dtype == torch.float64 else torch.float32
        p, p_rest = bucket_shares(logprobs.to(floats), logits.shape[-1])
        scaled = logits.to(floats, copy=True).div_(temperature)
        top = scaled.amax(-1, keepdim=True)
        kept = scaled.gather(-1, tokens)
        scaled.sub_(top).exp_().scatter_(-1, tokens, 0.0)
        rest = scaled.sum(-1)  # summed without the kept: 1 - sum q_i would cancel
        del scaled
        log_total = ((kept - top).exp().sum(-1) + rest).log()
        shift = top + log_total.unsqueeze(-1)  # z / T - shift = log q
        log_q = kept - shift
        q_rest = (rest / log_total.exp()).clamp_min(SMALLEST_SHARE)
        divergence = (torch.xlogy(p, p) - p * log_q).sum(-1) + torch.xlogy(p_rest, p_rest) - p_rest * q_rest.log()
        weight = mask.to(floats) * temperature**2
        ctx.save_for_backward(logits, tokens, shift, log_q.exp() - p, 1 - p_rest / q_rest, weight)
        ctx.temperature = temperature
        return (divergence * weight).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        """The gradient for the logits, made from them anew."""
        logits, tokens, shift, of_kept, of_rest, weight = ctx.saved_tensors
        found = logits.to(shift.dtype, copy=True).div_(ctx.temperature).sub_(shift).exp_()
        found.mul_(of_rest.unsqueeze(-1)).scatter_(-1, tokens, of_kept)
        found.mul_((weight * (grad / ctx.temperature)).unsqueeze(-1))
        return found.to(logits.dtype), None, None, None, None
