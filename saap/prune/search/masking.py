"""Measure what a removal costs before anything is cut: silence structures in the dense model, forward only.

A structure is silent when what it puts into o_proj or down_proj is zero; the loss of the masked model is the loss of
the slim model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from saap.models.architectures import architecture_of
from saap.models.structures import LayerPlan
from saap.prune.cut.surgery import head_rows
from saap.prune.shares import shares


@contextmanager
def masked(model: PreTrainedModel, plans: dict[int, LayerPlan], head_dim: int) -> Iterator[None]:
    """Silence everything that the plans of the given layers do not keep, inside the block; no weight is written."""
    architecture = architecture_of(model.config)
    layers: Any = model.get_submodule(architecture.layers)
    handles: list[Any] = []
    for index, keep in plans.items():
        modules = dict(layers[index].named_modules())
        for name, kept in (
            (architecture.output, head_rows(keep.query_heads, head_dim)),
            (architecture.down, torch.tensor(keep.ffn, dtype=torch.long)),
        ):
            linear = modules.get(name)
            if linear is None or len(kept) == linear.in_features:
                continue
            mask = torch.zeros(linear.in_features)
            mask[kept] = 1
            handles.append(linear.register_forward_pre_hook(partial(_silence, mask)))
            if not len(kept):  # the whole module goes, its bias too
                handles.append(linear.register_forward_hook(lambda _, __, output: torch.zeros_like(output)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _silence(mask: torch.Tensor, _: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
    return (args[0] * mask.to(args[0]),)


@torch.inference_mode()
def mean_nll(model: PreTrainedModel, ids: torch.Tensor, batch: int = 4) -> float:
    """Mean negative log-likelihood in nats per predicted token, ids [sequences, tokens]."""

    def loss_of(rows: torch.Tensor) -> float:
        rows = rows.to(model.device)
        return float(model(input_ids=rows, labels=rows, use_cache=False).loss.item()) * len(rows)

    return sum(shares().each(ids.split(batch), loss_of)) / len(ids)


def without_attention(keep: LayerPlan) -> LayerPlan:
    """Keeps the FFN only."""
    return LayerPlan((), (), keep.ffn)


def without_ffn(keep: LayerPlan) -> LayerPlan:
    """Keeps the attention only."""
    return LayerPlan(keep.query_heads, keep.kv_heads, ())
