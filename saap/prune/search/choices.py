"""The options of a block, and the runs of blocks that can be removed in one piece, before any price."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saap.models.shape import ATTENTION, KINDS, BlockKind, LayerSizes, ModelShape
from saap.prune.forms import Place
from saap.prune.plan import LayerPlan, whole_layer, widths_of

MOST_COUNTS = 4  # of KV groups, and of query heads of each, that are tried
RUNS = (1, 2, 3, 4, 6)  # layers that may go in one piece; more go in two with a block between them
Scores = Mapping[str, list[NDArray[np.float64]]]  # by type of structure, per layer [structures]


@dataclass(frozen=True)
class Allowed:
    """The structures that may be removed from a model."""

    heads: bool = True  # query heads and KV groups
    keep: frozenset[str] = frozenset()  # kinds of structures that stay, as in PruneOptions
    keep_layers: frozenset[int] = frozenset()  # layers that stay whole
    group_size: int = 32  # weights per scale, that every width is a multiple of
    one_width: bool = False  # only FFNs lose channels, all of them as many


def choices(shape: ModelShape, allowed: Allowed, scores: Scores | None = None) -> dict[Place, list[LayerPlan]]:
    """Return the options of each block, in the order in which blocks run; the whole block is first.

    ``scores``: structures of least score go first; None where only sizes count.
    """
    if scores is None:
        counted = {type_: size for kind in KINDS.values() for type_, size in zip(kind.types, kind.sizes, strict=True)}
        scores = {type_: [np.zeros(getattr(s, size)) for s in shape.layers] for type_, size in counted.items()}
    plans_of = {}
    for index, sizes in enumerate(shape.layers):
        for kind in sizes.blocks:
            plans = [LayerPlan().with_block(kind, whole_layer(sizes))]
            if index not in allowed.keep_layers:
                if kind is not ATTENTION and kind.name not in allowed.keep:
                    plans += _narrower(shape, allowed, kind, index, scores)
                elif kind is ATTENTION and allowed.heads:
                    plans += _fewer_heads(shape, allowed, index, scores)
            plans_of[index, kind.name] = plans
    return plans_of


def runs_of(shape: ModelShape, allowed: Allowed) -> Iterator[tuple[Place, ...]]:
    """Yield the runs of blocks that can be removed in one piece: single ones, and whole layers, by their ends.

    None starts with the first layer, before which nothing could make up for it.
    """
    if "blocks" in allowed.keep:
        return
    for index, sizes in enumerate(shape.layers):
        for kind in sizes.blocks:
            if _may_go(shape, allowed, index, kind):
                yield ((index, kind.name),)
        for count in () if shape.per_layer else RUNS:
            layers = range(index - count + 1, index + 1)
            run = [(i, kind) for i in layers if i >= 0 for kind in shape.layers[i].blocks]
            if layers[0] > 0 and len(run) > 1 and all(_may_go(shape, allowed, i, kind) for i, kind in run):
                yield tuple((i, kind.name) for i, kind in run)


def _may_go(shape: ModelShape, allowed: Allowed, index: int, kind: BlockKind) -> bool:
    return index not in allowed.keep_layers and not (kind is ATTENTION and shape.is_read(index))


def _narrower(shape: ModelShape, allowed: Allowed, kind: BlockKind, index: int, scores: Scores) -> list[LayerPlan]:
    sizes = shape.layers[index]
    channels = getattr(sizes, kind.sizes[0])
    order = np.argsort(scores[kind.types[0]][index], kind="stable").tolist()
    plans = []
    for width in widths_of(channels, allowed.group_size, shape.width_of(kind.writes, sizes))[:-1]:
        only: dict[str, Any] = {kind.sizes[0]: tuple(sorted(order[channels - width :]))}
        plans.append(LayerPlan(**only))
    return plans


def _fewer_heads(shape: ModelShape, allowed: Allowed, index: int, scores: Scores) -> list[LayerPlan]:
    """Layers that share keys and values lose the same groups."""
    sizes = shape.layers[index]
    together = [i for i in shape.sharing(index) if shape.layers[i].has(ATTENTION)]
    order = np.argsort(np.sum([scores["group"][i] for i in together], axis=0), kind="stable")
    facts: dict[str, Any] = {name: getattr(sizes, name) for name in ATTENTION.facts}
    plans = []
    for groups, per_group in _counts(sizes, shape.head_of(sizes), allowed.group_size):
        kept = sorted(int(g) for g in order[sizes.kv_heads - groups :])
        heads: list[int] = []
        for group in kept:
            members = np.arange(sizes.heads_per_group) + group * sizes.heads_per_group
            ranked = members[np.argsort(scores["head"][index][members], kind="stable")]
            heads += [int(head) for head in ranked[sizes.heads_per_group - per_group :]]
        plans.append(LayerPlan(tuple(sorted(heads)), tuple(kept), **facts))
    return plans


def _counts(sizes: LayerSizes, head_dim: int, group_size: int) -> list[tuple[int, int]]:
    """KV groups and query heads of each that are tried, but for all of them."""
    whole = (sizes.kv_heads, sizes.heads_per_group)
    counts = [(groups, each) for groups in _some(whole[0]) for each in _some(whole[1])]
    return [c for c in counts if c != whole and c[0] * c[1] * head_dim % group_size == 0]


def _some(most: int) -> list[int]:
    """Return counts up to the most, at equal steps if there are many."""
    steps = min(most, MOST_COUNTS)
    return sorted({max(1, round(most * number / steps)) for number in range(1, steps + 1)})
