"""Kinds of block, and the sizes of a layer that is made of them: of a model, of a plan and in a bundle's manifest."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Annotated, TypeVar

from msgspec import Meta

Count = Annotated[int, Meta(ge=0, lt=2**31)]
HeadSize = Annotated[int, Meta(ge=1, le=65_536)]


@dataclass(frozen=True)
class BlockKind:
    """A kind of block: what stands between one addition to the residual stream and the next.

    A layer has one block that mixes tokens, such as attention, and a feed-forward block after it.
    """

    name: str
    label: str  # its name in messages
    sizes: tuple[str, ...]  # fields of :class:`LayerSizes` (and of a plan's layers) that are its own, the first leading
    types: tuple[str, ...]  # of the coupled structures that may go from it
    roles: tuple[str, ...]  # of its matrices; the last one writes to the residual stream
    facts: tuple[str, ...] = ()  # further fields that are its own, which no cut changes

    @property
    def writes(self) -> str:
        return self.roles[-1]


ATTENTION = BlockKind(
    "attention", "attention", ("query_heads", "kv_heads"), ("head", "group"),
    ("query", "key", "value", "head_gate", "output"), ("head_dim", "reads"),
)  # fmt: skip
CONV = BlockKind("conv", "the convolution", ("conv",), ("conv",), ("in_gate", "out_gate", "signal", "conv_out"))
DELTA = BlockKind(
    "delta", "the delta net", ("delta",), ("delta",),
    ("delta_query", "delta_key", "delta_value", "delta_gate", "delta_beta", "delta_decay", "delta_out"),
)  # fmt: skip
FFN = BlockKind("ffn", "the FFN", ("ffn",), ("ffn",), ("gate", "up", "down"))
KINDS = {kind.name: kind for kind in (ATTENTION, CONV, DELTA, FFN)}  # in the order in which a layer runs them
MIXERS = (ATTENTION, CONV, DELTA)
RARE = (CONV, DELTA)  # kinds of which a family has at most one, and most have none

Layer = TypeVar("Layer", bound="OfBlocks")


@dataclass(frozen=True)
class OfBlocks:
    """Something about a layer whose fields belong to kinds of block: sizes, or what a plan keeps."""

    def has(self, kind: BlockKind) -> bool:
        """Whether the layer has, or keeps, anything of that block."""
        return bool(getattr(self, kind.sizes[0]))

    def only(self: Layer, kind: BlockKind) -> Layer:
        """Keep the fields of one kind of block; the others get their defaults."""
        return type(self)(**{name: getattr(self, name) for name in (*kind.sizes, *kind.facts)})

    def with_block(self: Layer, kind: BlockKind, other: Layer) -> Layer:
        """Replace the fields of one kind of block by those of ``other``."""
        return replace(self, **{name: getattr(other, name) for name in (*kind.sizes, *kind.facts)})

    @property
    def blocks(self) -> list[BlockKind]:
        """The kinds of block that the layer has."""
        return [kind for kind in KINDS.values() if self.has(kind)]

    def record(self) -> dict[str, object]:
        """Return all fields for a file, without empty ones of kinds of block that only some families have."""
        rare = [*ATTENTION.facts, *(name for kind in RARE for name in kind.sizes)]
        return {name: value for name, value in asdict(self).items() if value or name not in rare}


@dataclass(frozen=True)
class LayerSizes(OfBlocks):
    """Sizes of one decoder layer; 0 of a block's leading size: no such block."""

    query_heads: Count = 0
    kv_heads: Count = 0
    ffn: Count = 0
    conv: Count = 0  # channels of the short convolution
    delta: Count = 0  # key heads of the gated delta net
    head_dim: Count = 0  # elements of a head of attention; 0: as the model's
    reads: bool = False  # whether its keys and values are those of an earlier layer

    @property
    def heads_per_group(self) -> int:
        return self.query_heads // self.kv_heads if self.kv_heads else 0

    @property
    def mixer(self) -> BlockKind:
        """The block that mixes tokens, or did before it was removed."""
        return next((kind for kind in RARE if self.has(kind)), ATTENTION)

    def entry(self, rare: BlockKind | None) -> list[int]:
        """Return the layer's entry in ``slim_layers``; the fourth number is of the family's rare kind of block."""
        fourth = [] if rare is None else [int(getattr(self, rare.sizes[0]))]
        return [self.query_heads, self.kv_heads, self.ffn, *fourth]


@dataclass(frozen=True)
class DeltaHeads:
    """A key head of a gated delta net, with the value heads that it serves."""

    key: HeadSize  # elements of a query, and of a key
    value: HeadSize  # elements of a value
    values: HeadSize  # value heads for each key head

    @property
    def width(self) -> int:
        """Elements of all its values."""
        return self.values * self.value
