"""The loss of a language model without all of its logits at once.

Logits are the largest numbers of training: 1,024 tokens of a vocabulary of 49,152 take 201 MB in float32, several times
over. Here the head runs on a few places at a time, each piece is differentiated at once, and only the gradient of what
enters the head is kept: the order of work of Hsu et al. 2024 (Liger Kernel, arXiv:2410.10989). Nothing is
computed twice, and places that are not learnt (prompts, padding) have no logits at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import PreTrainedModel

from saap.models.architectures import architecture_of
from saap.models.modeling_slim import GroupQuantLinear, GroupQuantTable, TiedHead
from saap.tune.adapters.matmul import product_dtype
from saap.tune.loop.processes import is_sharded

PLACES = 256  # whose logits exist together
ROWS = 4096  # of the vocabulary, that are dequantised together

# Logits [places, vocabulary] and the places' numbers, from and to -> the sum of their losses.
PieceLoss = Callable[[torch.Tensor, int, int], torch.Tensor]


def head_loss(model: nn.Module, ids: torch.Tensor, places: torch.Tensor, loss_of: PieceLoss) -> torch.Tensor:
    """The sum of the losses at some places.

    A head that is trained itself, or sharded over processes, or has more than a matrix, is run as it is on all places.

    Args:
        model: of the families of :mod:`saap.models.architectures`, or PEFT around one.
        ids: int64 [rows, tokens].
        places: bool [rows, tokens], where there is a loss; in the order of rows they are numbered from 0.
        loss_of: the loss of a piece of them.
    """
    base: Any = getattr(model, "get_base_model", lambda: model)()
    matrix = _frozen_matrix(base) if isinstance(base, PreTrainedModel) else None
    if matrix is None:
        logits = model(input_ids=ids, use_cache=False).logits[places]
        return loss_of(logits, 0, len(logits))
    backbone = base.get_submodule(architecture_of(base.config).layers.rpartition(".")[0])
    hidden = backbone(input_ids=ids, use_cache=False).last_hidden_state[places]
    cap = getattr(base.config, "final_logit_softcapping", None)
    return _HeadLoss.apply(hidden, matrix(product_dtype(hidden)), cap, loss_of)


def _frozen_matrix(model: PreTrainedModel) -> Callable[[torch.dtype], torch.Tensor] | None:
    """The head's matrix [vocabulary, hidden] on demand, where the head is nothing else and is not trained."""
    head: Any = model.get_submodule(architecture_of(model.config).head)
    if isinstance(head, TiedHead):
        return lambda dtype: _dequantised(head._table[0], dtype)
    if type(head) is GroupQuantLinear and head.bias is None:
        return lambda dtype: _dequantised(head, dtype)
    weight: Any = getattr(head, "weight", None)
    if type(head) is not nn.Linear or head.bias is not None or weight.requires_grad or is_sharded(weight):
        return None
    return lambda dtype: weight.to(dtype)


def _dequantised(table: GroupQuantTable, dtype: torch.dtype) -> torch.Tensor:
    found = torch.empty(table.rows, table.columns, dtype=dtype, device=table.scales.device)
    for rows in torch.arange(table.rows, device=found.device).split(ROWS):
        found[rows[0] : rows[-1] + 1] = table.dequantize(rows)
    return found


class _HeadLoss(torch.autograd.Function):
    """Losses of pieces, summed, and the gradient of what entered the head."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, matrix: torch.Tensor, cap: float | None, loss_of: PieceLoss
    ) -> torch.Tensor:
        """hidden [places, hidden size], matrix [vocabulary, hidden size] -> a number."""
        trains = ctx.needs_input_grad[0]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if trains else None
        for first in range(0, len(hidden), PLACES):
            piece = hidden[first : first + PLACES].detach().requires_grad_(trains)
            with torch.set_grad_enabled(trains):
                logits = F.linear(piece.to(matrix.dtype), matrix)
                if cap is not None:
                    logits = cap * torch.tanh(logits / cap)
                loss = loss_of(logits, first, first + len(piece))
            total += loss.detach()
            if gradient is not None:
                (gradient[first : first + PLACES],) = torch.autograd.grad(loss, piece)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """The gradient for ``hidden``."""
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None, None, None
