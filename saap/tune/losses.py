"""The loss of tuning: the divergence from a teacher, and a head that runs on a few places at a time.

KL divergence of a student to a teacher of whom the k likeliest tokens are known, with its gradient in closed form.

The vocabulary is merged into k + 1 buckets: the kept tokens K and one for all others. With the teacher's probabilities
p, the student's q = softmax(z), and their mass outside K, p_r and q_r:

    L = sum_{i in K} p_i log(p_i / q_i) + p_r log(p_r / q_r)

Merging outcomes never raises a divergence (data-processing inequality), so L is a divergence of its own, 0 where the
buckets agree, and a lower bound of the full KL(teacher || student), which it is for k = vocabulary. Its gradient is

    dL/dz_j = q_j - p_j  for j in K,  q_j (1 - p_r / q_r)  for all others.

Logits are the largest numbers of training: 1,024 tokens of a vocabulary of 49,152 take 201 MB in float32, several times
over. In :func:`head_loss` the head therefore runs on a few places at a time, each piece is differentiated at once, and
only the gradient of what enters the head is kept: the order of work of Hsu et al. 2024 (Liger Kernel,
arXiv:2410.10989). Nothing is computed twice, and places that are not learnt (prompts, padding) have no logits at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import cast

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import PreTrainedModel

from saap.models.architectures import Traits, architecture_of, traits_of
from saap.models.layer_walk import finished_logits
from saap.models.modeling_slim import GroupQuantLinear, GroupQuantTable, TiedHead, unpacked_ids
from saap.tune.adapters import Context, Gradient, product_dtype
from saap.tune.loop.processes import is_sharded

SMALLEST_SHARE = 1e-30  # of q_r, so that p_r / q_r is finite
PLACES = 256  # whose logits exist together
ROWS = 4096  # of the vocabulary, that are dequantised together

# Logits [places, vocabulary] and the places' numbers, from and to -> the sum of their losses.
PieceLoss = Callable[[torch.Tensor, int, int], torch.Tensor]


def bucket_shares(logprobs: torch.Tensor, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities [..., k] and the mass outside them [...], summing to 1 however the logarithms were rounded."""
    kept = logprobs.exp()
    whole = kept.sum(-1, keepdim=True)
    if logprobs.shape[-1] == vocabulary:
        return kept / whole, torch.zeros_like(whole[..., 0])
    kept = kept / whole.clamp_min(1)
    return kept, (1 - kept.sum(-1)).clamp_min(0)


class KeptMatrix(dict[torch.dtype, torch.Tensor]):
    """The frozen head's matrix, kept from one pass to the next."""


def head_loss(
    model: PreTrainedModel, ids: torch.Tensor, places: torch.Tensor, loss_of: PieceLoss, kept: KeptMatrix | None = None
) -> torch.Tensor:
    """Sum the losses at some places, bool [rows, tokens], of ids int64 [rows, tokens].

    A head that is sharded over processes, or has more than a matrix, is run as it is on all places. ``loss_of`` is the
    loss of a piece of them; in the order of rows they are numbered from 0. Without ``kept`` a frozen head is made
    ready each time.
    """
    matrix = _head_matrix(model)
    if matrix is None:
        logits = model(input_ids=ids, use_cache=False).logits[places]
        return loss_of(logits, 0, len(logits))
    backbone = model.get_submodule(architecture_of(model.config).layers.rpartition(".")[0])
    # A mask of ones is dropped. Without one transformers 4.57 makes a full mask, and the kernel cannot skip half of it.
    mask = torch.ones_like(ids)
    hidden = backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[places]
    dtype, kept = product_dtype(hidden), KeptMatrix() if kept is None else kept
    traits, words = traits_of(model.config), head_words(model)
    if (table := kept.get(dtype)) is None:
        table = matrix(dtype) if words is None else matrix(dtype)[words.to(hidden.device)]
        if not any(p.requires_grad for p in model.get_submodule(architecture_of(model.config).head).parameters()):
            kept[dtype] = table
    if not torch.is_grad_enabled():
        table = table.detach()
    total: torch.Tensor = _HeadLoss.apply(hidden, table, replace(traits, vocabulary=""), loss_of)
    return total


def head_words(model: PreTrainedModel) -> torch.Tensor | None:
    """Return the tokens, ascending int64, whose rows of the head are all that :func:`head_loss` computes; None: all.

    The logits that a loss is given are then of these alone, in their order.
    """
    if _head_matrix(model) is None:
        return None
    packed = traits_of(model.config).vocabulary
    return unpacked_ids(packed, model.config.vocab_size) if packed else None


def _head_matrix(model: PreTrainedModel) -> Callable[[torch.dtype], torch.Tensor] | None:
    """Return the head's matrix [vocabulary, hidden] on demand, where the head is nothing else."""
    head = model.get_submodule(architecture_of(model.config).head)
    if isinstance(head, TiedHead):
        return lambda dtype: _dequantised(head._table[0], dtype)
    if type(head) is GroupQuantLinear and head.bias is None:
        return lambda dtype: _dequantised(head, dtype)
    weight = getattr(head, "weight", None)
    if type(head) is not nn.Linear or head.bias is not None or is_sharded(weight):
        return None
    return lambda dtype: weight.to(dtype)


def _dequantised(table: GroupQuantTable, dtype: torch.dtype) -> torch.Tensor:
    matrix = torch.empty(table.rows, table.columns, dtype=dtype, device=table.scales.device)
    for rows in torch.arange(table.rows, device=matrix.device).split(ROWS):
        matrix[rows[0] : rows[-1] + 1] = table.dequantize(rows)
    return matrix


def learning_loss(
    logits: torch.Tensor, labels: torch.Tensor, answers: tuple[torch.Tensor, torch.Tensor], share: float
) -> torch.Tensor:
    """(1 - share) NLL + share KL(teacher || student), each summed over the places.

    Both are read off one softmax, and their gradient is formed beside it: three passes over the logits instead of a
    dozen. Beside the logits at most one float32 tensor of their size is alive.

    Args:
        logits: the student's [places, V], any floating type.
        labels: int64 [places].
        answers: the teacher's likeliest tokens, no token twice, and their log-probabilities, both [places, k].
        share: of the teacher, 0 to 1.
    """
    return cast("torch.Tensor", _LearningLoss.apply(logits, labels, *answers, share))


class _LearningLoss(torch.autograd.Function):
    """The gradient is made with the loss, in the memory of its exponentials."""

    @staticmethod
    def forward(
        ctx: Context,
        logits: torch.Tensor,
        labels: torch.Tensor,
        tokens: torch.Tensor,
        logprobs: torch.Tensor,
        share: float,
    ) -> torch.Tensor:
        floats = torch.float64 if logits.dtype == torch.float64 else torch.float32
        p, p_rest = bucket_shares(logprobs.to(floats), logits.shape[-1])
        q = logits.to(floats, copy=True)
        top = q.amax(-1, keepdim=True)
        kept, label = q.gather(-1, tokens) - top, q.gather(-1, labels[:, None]) - top
        q.sub_(top).exp_().scatter_(-1, tokens, 0.0)
        rest = q.sum(-1, keepdim=True)  # summed without the kept: 1 - sum q_i would cancel
        log_total = (kept.exp().sum(-1, keepdim=True) + rest).log()
        log_q = kept - log_total
        q_rest = (rest / log_total.exp()).clamp_min(SMALLEST_SHARE)
        p_rest = p_rest[:, None]
        divergence = (torch.xlogy(p, p) - p * log_q).sum() + (torch.xlogy(p_rest, p_rest) - p_rest * q_rest.log()).sum()
        if ctx.needs_input_grad[0]:
            q.mul_((1 - share * p_rest / q_rest) / log_total.exp())
            q.scatter_(-1, tokens, log_q.exp() - share * p)
            q.scatter_add_(-1, labels[:, None], torch.full_like(log_total, share - 1))
            ctx.save_for_backward(q)
        return (1 - share) * (log_total - label).sum() + share * divergence

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None, None, None, None


class _HeadLoss(torch.autograd.Function):
    """Losses of pieces, summed, and the gradients of what entered the head and of its matrix, where it is trained."""

    @staticmethod
    def forward(
        ctx: Context, hidden: torch.Tensor, matrix: torch.Tensor, traits: Traits, loss_of: PieceLoss
    ) -> torch.Tensor:
        """hidden [places, hidden size], matrix [vocabulary, hidden size] -> a number."""
        trains, whole = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if trains else None
        of_matrix = torch.zeros_like(matrix, dtype=torch.float32) if whole else None
        matrix = matrix.detach().requires_grad_(whole)
        for first in range(0, len(hidden), PLACES):
            piece = hidden[first : first + PLACES].detach().requires_grad_(trains)
            with torch.set_grad_enabled(trains or whole):
                logits = finished_logits(F.linear(piece.to(matrix.dtype), matrix), traits)
                loss = loss_of(logits, first, first + len(piece))
            total += loss.detach()
            inputs = [tensor for tensor in (piece, matrix) if tensor.requires_grad]
            gradients = list(torch.autograd.grad(loss, inputs)) if inputs else []
            if of_matrix is not None:
                of_matrix += gradients.pop()
            if gradient is not None:
                gradient[first : first + PLACES] = gradients.pop()
        ctx.save_for_backward(gradient, of_matrix)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad: torch.Tensor) -> tuple[Gradient, Gradient, None, None]:
        gradient, of_matrix = ctx.saved_tensors
        return _times(gradient, grad), _times(of_matrix, grad), None, None


def _times(gradient: Gradient, factor: torch.Tensor) -> Gradient:
    return None if gradient is None else gradient * factor
