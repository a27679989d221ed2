"""Apply a plan: cut the weights of a dense model, tensor by tensor, so that nothing is held twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from saap.architectures import Architecture
from saap.structures import LayerPlan, ModelShape, PrunePlan, check_plan

Read = Callable[[str], torch.Tensor]


def head_rows(heads: tuple[int, ...], head_dim: int) -> torch.Tensor:
    """Row indices of whole heads: (1, 3) with head_dim 2 -> [2, 3, 6, 7]."""
    starts = torch.tensor(heads, dtype=torch.long) * head_dim
    return (starts.unsqueeze(1) + torch.arange(head_dim)).flatten()


def cut_tensors(
    names: list[str], read: Read, plan: PrunePlan, shape: ModelShape, architecture: Architecture
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the slim model's (name, tensor), reading one tensor of the dense model at a time.

    Args:
        names: tensor names of the dense checkpoint.
        read: gives the tensor of a name.
        plan: what to keep of each layer; layers left with nothing are dropped and the rest renumbered.
    """
    check_plan(plan, shape)
    prefix = architecture.layers + "."
    kept = [i for i, layer in enumerate(plan.layers) if layer.query_heads or layer.ffn]
    renumbered = {old: new for new, old in enumerate(kept)}
    for name in names:
        if not name.startswith(prefix):
            yield name, read(name)
            continue
        index_text, rest = name[len(prefix) :].split(".", 1)
        index = int(index_text)
        if index in renumbered:
            cut = cut_layer_tensor(rest, partial(read, name), plan.layers[index], shape.head_dim, architecture)
            if cut is not None:
                yield f"{prefix}{renumbered[index]}.{rest}", cut


def cut_layer_tensor(
    name: str, read: Callable[[], torch.Tensor], keep: LayerPlan, head_dim: int, architecture: Architecture
) -> torch.Tensor | None:
    """One tensor of one layer, cut to what the plan keeps; None where its module is gone."""
    module, kind = name.rsplit(".", 1)
    attention = (
        architecture.query,
        architecture.key,
        architecture.value,
        architecture.output,
        architecture.attention_norm,
    )
    if not (keep.query_heads if module in attention else keep.ffn):
        return None
    tensor = read()
    queries, keys = head_rows(keep.query_heads, head_dim), head_rows(keep.kv_heads, head_dim)
    channels = torch.tensor(keep.ffn, dtype=torch.long)
    rows = {architecture.query: queries, architecture.key: keys, architecture.value: keys}
    rows |= {architecture.gate: channels, architecture.up: channels}
    columns = {architecture.output: queries, architecture.down: channels}
    if module in rows:
        return tensor.index_select(0, rows[module])
    if module in columns and kind == "weight":
        return tensor.index_select(1, columns[module])
    return tensor.clone()
