"""Apply a plan: cut the weights of a dense model, tensor by tensor, so that nothing is held twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch

from saap.models.architectures import Architecture
from saap.models.matrices import placed_roles
from saap.models.shape import KINDS, BlockKind, ModelShape
from saap.prune.plan import LayerPlan, PrunePlan, check_plan

Read = Callable[[str], torch.Tensor]


def head_rows(heads: tuple[int, ...], head_dim: int) -> torch.Tensor:
    """Row indices of whole heads: (1, 3) with head_dim 2 -> [2, 3, 6, 7]."""
    starts = torch.tensor(heads, dtype=torch.long) * head_dim
    return (starts.unsqueeze(1) + torch.arange(head_dim)).flatten()


def kept_columns(kind: BlockKind, keep: LayerPlan, shape: ModelShape) -> torch.Tensor:
    """Return the kept columns of the matrix by which a block writes to the residual stream."""
    return kept_of_role(kind.writes, kind, keep, shape)


def kept_of_role(role: str, kind: BlockKind, keep: LayerPlan, shape: ModelShape) -> torch.Tensor:
    """Return the kept rows of a block's matrix, by its role; the columns of the one that writes."""
    kept = keep.kv_heads if role in ("key", "value") else getattr(keep, kind.sizes[0])
    return head_rows(kept, shape.width_of(role, keep))


def cut_tensors(
    names: list[str],
    read: Read,
    plan: PrunePlan,
    shape: ModelShape,
    architecture: Architecture,
    replaced: Mapping[str, torch.Tensor] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the slim model's (name, tensor), reading one tensor of the dense model at a time.

    Args:
        names: tensor names of the dense checkpoint.
        read: gives the tensor of a name.
        plan: what to keep of each layer; layers left with nothing are dropped and the rest renumbered.
        shape: sizes of the dense model.
        replaced: tensors of the slim model, by their names and in their sizes there, that take the place of the cut
            ones, in their type; also biases of what writes to the residual stream that the dense model does not have.

    Raises:
        UserError: the plan does not fit the model.
        ValueError: ``replaced`` names a tensor that the slim model does not have.
    """
    check_plan(plan, shape)
    fresh, left = replaced or {}, set(replaced or ())
    prefix = architecture.layers + "."
    renumbered = {old: new for new, old in enumerate(plan.kept_layers)}
    for name in names:
        slim_name, cut = name, partial(read, name)
        if name.startswith(prefix):
            index_text, rest = name[len(prefix) :].split(".", 1)
            index = int(index_text)
            keep = plan.layers[index]
            kind = architecture.kind_of(rest.rpartition(".")[0] or rest, shape.layers[index])
            if kind is not None and not keep.has(kind):
                continue  # with its module
            slim_name = f"{prefix}{renumbered[index]}.{rest}"
            cut = partial(cut_layer_tensor, rest, cut, keep, index, shape, architecture)
        if slim_name in left:
            left.remove(slim_name)
            yield slim_name, fresh[slim_name].to(read(name).dtype)
        else:
            yield slim_name, cut()
    yield from _added_biases({name: fresh[name] for name in sorted(left)}, plan, architecture)


def cut_layer_tensor(
    name: str,
    read: Callable[[], torch.Tensor],
    keep: LayerPlan,
    index: int,
    shape: ModelShape,
    architecture: Architecture,
) -> torch.Tensor:
    """One tensor of dense layer ``index``, ``name`` relative to it, cut to what the plan keeps; norms stay whole."""
    module, _, kind = name.rpartition(".")
    kept = {
        role: kept_of_role(role, block, keep, shape) for block in KINDS.values() for role in block.roles[:-1]
    }  # fmt: skip
    roles = list(placed_roles(shape.layers[index], shape, architecture))
    placed = [rows.start + kept[role] for role, place, rows in roles if place == module and role in kept]
    if placed:
        return read().index_select(0, torch.cat(placed))
    beside = architecture.beside.get(module) or architecture.beside.get(name)
    if beside:  # rows as its matrices have, from 0 on
        starts, counts = 0, {role: rows.stop - rows.start for role, _, rows in roles}
        for role in beside:
            placed.append(starts + kept[role])
            starts += counts[role]
        return read().index_select(0, torch.cat(placed))
    writing = {architecture.writing(block): block for block in KINDS.values()}
    if module in writing and kind == "weight":
        return read().index_select(1, kept_columns(writing[module], keep, shape))
    return read().clone()


def _added_biases(
    biases: Mapping[str, torch.Tensor], plan: PrunePlan, architecture: Architecture
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the remaining replacements: new biases of modules that the slim model has."""
    allowed = {
        f"{architecture.layers}.{new}.{module}.bias"
        for new, old in enumerate(plan.kept_layers)
        for module in map(architecture.writing, plan.layers[old].blocks)
    }
    if wrong := sorted(set(biases) - allowed):
        raise ValueError(f"{wrong[0]} is no tensor of the slim model")
    yield from biases.items()
