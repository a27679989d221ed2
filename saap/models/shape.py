"""The coupled structure: weight slices that must be removed together or not at all.

Worked example, a LLaMA layer with hidden 576, 9 query heads of 64 in 3 KV groups and FFN 1536:

* FFN channel 7: row 7 of gate_proj and up_proj [1536, 576], column 7 of down_proj [576, 1536]: 3 * 576 weights.
* query head 4 (KV group 1): rows 256:320 of q_proj [576, 576], columns 256:320 of o_proj: 2 * 64 * 576 weights; in
  LFM3 also row 4 of g_proj, which makes its gate.
* KV group 1: rows 64:128 of k_proj and v_proj [192, 576] and its query heads 3, 4, 5.
* module: a whole attention or a whole FFN with the norm before it; layer: both.

In LFM2 most layers mix tokens by a short convolution instead of attention, with hidden 1024 and as many channels:

* channel 7 of a short convolution: rows 7, 1031 and 2055 of in_proj [3072, 1024], which make its input gate, its output
  gate and its signal, row 7 of the kernels [1024, 1, 3], column 7 of out_proj [1024, 1024]: 4 * 1024 + 3 weights.

GQA maps query head i to KV head i // (query_heads / kv_heads), so inside a layer every KV group keeps the same number
of query heads. Layers may differ from one another.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Literal, TypeVar

QueryNorm = Literal["none", "head", "all"]


@dataclass(frozen=True)
class BlockKind:
    """A kind of block: what stands between one addition to the residual stream and the next.

    A layer has one block that mixes tokens, attention or a short convolution, and a feed-forward block after it.
    """

    name: str
    said: str  # how a person is told of it
    sizes: tuple[str, ...]  # fields of :class:`LayerSizes` (and of a plan's layers) that are its own, the first leading
    types: tuple[str, ...]  # of the coupled structures that may go from it
    roles: tuple[str, ...]  # of its matrices; the last one writes to the residual stream

    @property
    def writes(self) -> str:
        return self.roles[-1]


ATTENTION = BlockKind(
    "attention", "attention", ("query_heads", "kv_heads"), ("head", "group"),
    ("query", "key", "value", "head_gate", "output"),
)  # fmt: skip
CONV = BlockKind("conv", "the convolution", ("conv",), ("conv",), ("in_gate", "out_gate", "signal", "conv_out"))
FFN = BlockKind("ffn", "the FFN", ("ffn",), ("ffn",), ("gate", "up", "down"))
KINDS = {kind.name: kind for kind in (ATTENTION, CONV, FFN)}  # in the order in which a layer runs them
MIXERS = (ATTENTION, CONV)

Layer = TypeVar("Layer", bound="OfBlocks")


@dataclass(frozen=True)
class OfBlocks:
    """Something about a layer whose fields belong to kinds of block: sizes, or what a plan keeps."""

    def has(self, kind: BlockKind) -> bool:
        """Whether anything is said, or left, of that block."""
        return bool(getattr(self, kind.sizes[0]))

    def only(self: Layer, kind: BlockKind) -> Layer:
        """The fields of one kind of block; the others are as they are by default."""
        return type(self)(**{name: getattr(self, name) for name in kind.sizes})

    def with_block(self: Layer, kind: BlockKind, other: Layer) -> Layer:
        """This, but for one kind of block, of which it says what ``other`` says."""
        return replace(self, **{name: getattr(other, name) for name in kind.sizes})

    @property
    def blocks(self) -> list[BlockKind]:
        """The kinds of block that the layer has."""
        return [kind for kind in KINDS.values() if self.has(kind)]

    def told(self) -> dict[str, object]:
        """For a file: all fields but those of kinds of block that only some families have, where they are empty."""
        return {name: value for name, value in asdict(self).items() if value or name not in CONV.sizes}


@dataclass(frozen=True)
class LayerSizes(OfBlocks):
    """What is left of one decoder layer; 0 of a block's leading size: no such block."""

    query_heads: int = 0
    kv_heads: int = 0
    ffn: int = 0
    conv: int = 0  # channels of the short convolution

    @property
    def heads_per_group(self) -> int:
        return self.query_heads // self.kv_heads if self.kv_heads else 0

    @property
    def mixer(self) -> BlockKind:
        """How the layer mixes tokens, or did before that went."""
        return CONV if self.conv else ATTENTION

    def entry(self, convolves: bool) -> list[int]:
        """The layer's entry in ``slim_layers``; the fourth number where the family has short convolutions."""
        return [self.query_heads, self.kv_heads, self.ffn, *([self.conv] if convolves else [])]


@dataclass(frozen=True)
class ModelShape:
    """Sizes that pruning reads and changes, and what else a block owns."""

    hidden: int
    head_dim: int
    vocab: int
    tied: bool
    layers: tuple[LayerSizes, ...]
    attention_bias: bool = False  # whether the linears of attention have biases
    mlp_bias: bool = False
    output_bias: bool = True  # whether the output projection has one too where attention has biases
    qk_norm: QueryNorm = "none"  # norms of queries and of keys: none, one of each head, or one over all heads
    norms: int = 1  # norms of the hidden width that each block owns
    added_bias: bool = False  # whether pruning gave the matrices that write biases that their family lacks
    conv_kernel: int = 0  # tokens that a short convolution sees; 0: the family has none
    conv_bias: bool = False  # whether its matrices and kernels have biases
    head_gates: bool = False  # whether a gate is computed for each query head

    @property
    def separable_heads(self) -> bool:
        """Whether what a head computes is the same without the others: not where a norm spans all of them."""
        return self.qk_norm != "all"

    @property
    def biased_output(self) -> bool:
        return self.added_bias or (self.attention_bias and self.output_bias)

    @property
    def biased_down(self) -> bool:
        return self.added_bias or self.mlp_bias

    @property
    def biased_conv(self) -> bool:
        return self.added_bias or self.conv_bias

    def weights(self, kind: BlockKind, layer: LayerSizes) -> int:
        """Weights of one block of a layer with its norms; 0 where the layer has no such block."""
        if not layer.has(kind):
            return 0
        if kind is ATTENTION:
            rows = (layer.query_heads + 2 * layer.kv_heads) * self.head_dim
            biases = rows * self.attention_bias + self.hidden * self.biased_output
            norms = sum(self.attention_norms(layer))
            matrices = rows + layer.query_heads * (self.head_dim + self.head_gates)
            return matrices * self.hidden + norms + biases
        norms = self.norms * self.hidden
        if kind is CONV:
            biases = 4 * layer.conv * self.conv_bias + self.hidden * self.biased_conv
            return 4 * layer.conv * self.hidden + layer.conv * self.conv_kernel + norms + biases
        biases = 2 * layer.ffn * self.mlp_bias + self.hidden * self.biased_down
        return 3 * layer.ffn * self.hidden + norms + biases

    def weights_of(self, layer: LayerSizes) -> int:
        """Weights of one layer."""
        return sum(self.weights(kind, layer) for kind in layer.blocks)

    def inner_width(self, kind: BlockKind, layer: LayerSizes) -> int:
        """Columns of the matrix by which a block writes to the residual stream."""
        return layer.query_heads * self.head_dim if kind is ATTENTION else int(getattr(layer, kind.sizes[0]))

    def attention_norms(self, layer: LayerSizes) -> list[int]:
        """Widths of the norms of one attention block."""
        heads = {"none": (), "head": (1, 1), "all": (layer.query_heads, layer.kv_heads)}[self.qk_norm]
        return [self.hidden] * self.norms + [count * self.head_dim for count in heads]

    @property
    def layer_weights(self) -> int:
        """Weights of all decoder layers: what ``--ratio`` is a share of."""
        return sum(map(self.weights_of, self.layers))

    @property
    def parameters(self) -> int:
        """All weights: layers, embedding, final norm, and the head where it is not tied."""
        return self.layer_weights + self.vocab * self.hidden * (1 if self.tied else 2) + self.hidden

    def with_layers(self, layers: tuple[LayerSizes, ...]) -> ModelShape:
        return replace(self, layers=layers)
