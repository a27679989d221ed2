"""Attention over rows of a few hundred tokens by matrix products, where a CPU multiplies bfloat16 in hardware.

There the products of all heads take a third of the time of torch's blockwise kernel, forward and backward together
(studies/README.md, "Settled"). What it costs is memory: the weights of every pair of tokens are kept, which the
blockwise kernel makes again. In float32 that kernel is the faster one, and longer rows go to it too.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from saap.tune.adapters import Context

NAME = "saap_short"
LONGEST = 512  # tokens


def use_short_attention(model: PreTrainedModel) -> None:
    """Let a model's attention be this one, where it is worth it."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.config._attn_implementation = NAME  # its setter takes classes of transformers' own files only


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **more: Any,  # what else transformers hands to any attention
) -> tuple[torch.Tensor, None]:
    """Attend: heads [batch, heads, tokens, size] -> [batch, tokens, heads, size], as transformers calls it."""
    tokens, kind = query.shape[2], query.device.type
    bf16 = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16
    if kind != "cpu" or not bf16 or not tokens == key.shape[2] <= LONGEST:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **more)
    heads = (x.bfloat16() for x in (query, key, value))
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    return _Attention.apply(*heads, _hidden(query, attention_mask), scale).transpose(1, 2).contiguous(), None


def _hidden(query: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Make the mask that is added to scores, [1 or batch, 1, 1, tokens, tokens] bfloat16.

    Without one, later tokens are hidden.

    ``mask``: [1 or batch, 1, tokens, tokens], of what a token sees, or to be added.
    """
    if mask is None:
        tokens = query.shape[2]
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril()[None, None]
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=torch.bfloat16, device=mask.device).masked_fill_(~mask, -torch.inf)
    return mask.bfloat16().unsqueeze(1)


class _Kept(Context, Protocol):
    scale: float
    shape: torch.Size


class _Attention(torch.autograd.Function):
    """softmax(scale * q k^T + hidden) v, the query heads of a KV group at once."""

    @staticmethod
    def forward(
        ctx: _Kept, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, hidden: torch.Tensor, scale: float
    ) -> torch.Tensor:
        batch, kv, tokens, size = key.shape
        grouped = (batch * kv, -1, size)
        q, k, v = query.reshape(grouped), key.reshape(grouped), value.reshape(grouped)
        with torch.autocast(query.device.type, enabled=False):
            scores = torch.bmm(q, k.transpose(1, 2)).view(batch, kv, -1, tokens, tokens)
            weights = scores.mul_(scale).add_(hidden).softmax(-1).view(batch * kv, -1, tokens)
            out = torch.bmm(weights, v)
        ctx.save_for_backward(q, k, v, weights)
        ctx.scale, ctx.shape = scale, query.shape
        return out.view(query.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Kept, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        grad = grad.reshape(q.shape)
        with torch.autocast(q.device.type, enabled=False):
            for_v = torch.bmm(weights.transpose(1, 2), grad)
            for_weights = torch.bmm(grad, v.transpose(1, 2))
            for_scores = torch._softmax_backward_data(for_weights, weights, -1, weights.dtype).mul_(ctx.scale)
            for_q = torch.bmm(for_scores, k)
            for_k = torch.bmm(for_scores.transpose(1, 2), q)
        batch, _, tokens, size = ctx.shape
        kv = len(k) // batch
        return for_q.view(ctx.shape), *(x.view(batch, kv, tokens, size) for x in (for_k, for_v)), None, None
