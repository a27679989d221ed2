"""Measure what a removal costs before anything is cut: silence structures in the dense model, forward only.

A structure is silent when its columns of o_proj or down_proj are zero; the loss of the masked model is the loss of the
slim model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from saap.architectures import architecture_of
from saap.structures import LayerPlan
from saap.surgery import head_rows


@contextmanager
def masked(model: PreTrainedModel, plans: dict[int, LayerPlan], head_dim: int) -> Iterator[None]:
    """Silence everything that the plans of the given layers do not keep; weights are restored on leaving."""
    architecture = architecture_of(model.config)
    layers: Any = model.get_submodule(architecture.layers)
    saved: list[tuple[torch.nn.Parameter, Any, torch.Tensor]] = []
    for index, keep in plans.items():
        modules = dict(layers[index].named_modules())
        for name, kept in (
            (architecture.output, head_rows(keep.query_heads, head_dim)),
            (architecture.down, torch.tensor(keep.ffn, dtype=torch.long)),
        ):
            linear = modules.get(name)
            if linear is None or len(kept) == linear.weight.shape[1]:
                continue
            gone = torch.ones(linear.weight.shape[1], dtype=torch.bool)
            gone[kept] = False
            saved.append((linear.weight, gone, linear.weight.detach()[:, gone].clone()))
            linear.weight.data[:, gone] = 0
            if not len(kept) and linear.bias is not None:  # the whole module goes, its bias too
                saved.append((linear.bias, slice(None), linear.bias.detach().clone()))
                linear.bias.data.zero_()
    try:
        yield
    finally:
        for weight, gone, values in saved:
            weight.data[(slice(None), gone) if weight.dim() == 2 else gone] = values


@torch.inference_mode()
def mean_nll(model: PreTrainedModel, ids: torch.Tensor, batch: int = 4) -> float:
    """Mean negative log-likelihood in nats per predicted token, ids [sequences, tokens]."""
    losses = [model(input_ids=rows, labels=rows, use_cache=False).loss.item() * len(rows) for rows in ids.split(batch)]
    return sum(losses) / len(ids)


def without_attention(keep: LayerPlan) -> LayerPlan:
    """Keeps the FFN only."""
    return LayerPlan((), (), keep.ffn)


def without_ffn(keep: LayerPlan) -> LayerPlan:
    """Keeps the attention only."""
    return LayerPlan(keep.query_heads, keep.kv_heads, ())
