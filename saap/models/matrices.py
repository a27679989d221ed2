"""A layer's logical matrices on a loaded model: query, key, value, output, gate, up, down and so on, packed or not.

Worked example, a Phi-3 layer with 3 query heads of 32 on 1 KV head and FFN 128: ``self_attn.qkv_proj`` [160, 96] holds
query in rows 0:96, key in 96:128 and value in 128:160; ``mlp.gate_up_proj`` [256, 96] holds gate in 0:128 and up in
128:256.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from saap.base.errors import UserError
from saap.models.architectures import Architecture, architecture_of
from saap.models.shape import ATTENTION, CONV, DELTA, FFN, KINDS, LayerSizes, ModelShape

ROLES = tuple(role for kind in KINDS.values() for role in kind.roles)


@dataclass(frozen=True)
class Matrix:
    """One logical matrix of one layer."""

    layer: int
    role: str  # one of :data:`ROLES`
    linear: nn.Linear  # the module that holds it; several matrices share a packed one
    rows: slice  # the rows of ``linear.weight`` [rows, columns] (and elements of its bias) that are this matrix


def matrices_of(model: nn.Module, shape: ModelShape) -> list[Matrix]:
    """List the matrices of every layer in order, in a layer in the order of :data:`ROLES`.

    A layer has no matrices of the blocks that it does not have.

    Args:
        model: a transformers causal language model, dense or slim, with floating-point weights.
        shape: its sizes, ``shape_of(model.config)``.

    Raises UserError: the model holds integers, or other sizes than ``shape`` says.
    """
    architecture = architecture_of(model.config)
    layers = list(model.get_submodule(architecture.layers).children())
    if len(layers) != len(shape.layers):
        raise UserError(f"the shape has {len(shape.layers)} layers, the model has {len(layers)}: read it again")
    return [
        Matrix(index, role, _linear(layer, index, name), rows)
        for index, (layer, sizes) in enumerate(zip(layers, shape.layers, strict=True))
        for role, name, rows in placed_roles(sizes, shape, architecture)
    ]


def placed_roles(sizes: LayerSizes, shape: ModelShape, architecture: Architecture) -> Iterator[tuple[str, str, slice]]:
    """Yield (role, module relative to the layer, rows of its weight) of the matrices of a layer of these sizes."""
    if sizes.query_heads:
        queries, keys = (sizes.query_heads * shape.width_of("query", sizes), sizes.kv_heads * shape.head_of(sizes))
        own = 1 if sizes.reads else 3
        attention = (architecture.query, architecture.key, architecture.value)[:own]
        counts = (queries, keys, keys)[:own]
        yield from _stacked(ATTENTION.roles[:own], attention, architecture.packed_qkv, counts)
        if architecture.head_gate:
            yield "head_gate", architecture.head_gate, slice(0, sizes.query_heads)
        yield "output", architecture.output, slice(0, shape.hidden)
    if sizes.conv:
        yield from _stacked(CONV.roles[:3], ("",) * 3, architecture.conv_in, (sizes.conv,) * 3)
        yield "conv_out", architecture.conv_out, slice(0, shape.hidden)
    if sizes.delta and (names := architecture.delta):
        widths = {role: sizes.delta * shape.width_of(role, sizes) for role in DELTA.roles}
        mixed = DELTA.roles[:3]
        yield from _stacked(mixed, ("",) * 3, names.mixed, tuple(widths[role] for role in mixed))
        for role, module in zip(DELTA.roles[3:6], (names.gate, names.beta, names.decay), strict=True):
            yield role, module, slice(0, widths[role])
        yield DELTA.writes, names.output, slice(0, shape.hidden)
    if sizes.ffn:
        feed_forward = (architecture.gate, architecture.up)
        yield from _stacked(FFN.roles[:2], feed_forward, architecture.packed_gate_up, (sizes.ffn,) * 2)
        yield "down", architecture.down, slice(0, shape.hidden)


def _stacked(
    roles: tuple[str, ...], names: tuple[str, ...], packed: str, counts: tuple[int, ...]
) -> Iterator[tuple[str, str, slice]]:
    start = 0
    for role, name, count in zip(roles, names, counts, strict=True):
        yield role, packed or name, slice(start, start + count)
        start += count if packed else 0


def _linear(layer: nn.Module, index: int, name: str) -> nn.Linear:
    module = dict(layer.named_modules()).get(name)
    if not isinstance(module, nn.Linear):
        raise UserError(f"layer {index}: {name} is not a matrix of numbers; take the model before it was tuned")
    return module
