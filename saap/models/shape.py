"""The coupled structure: weight slices that must be removed together or not at all.

Worked example, a LLaMA layer with hidden 576, 9 query heads of 64 in 3 KV groups and FFN 1536:

* FFN channel 7: row 7 of gate_proj and up_proj [1536, 576], column 7 of down_proj [576, 1536]: 3 * 576 weights.
* query head 4 (KV group 1): rows 256:320 of q_proj [576, 576], columns 256:320 of o_proj: 2 * 64 * 576 weights; in
  LFM3 also row 4 of g_proj, which makes its gate. Qwen3.5 keeps a gate of 64 behind each query: rows 512:640 of q_proj.
* KV group 1: rows 64:128 of k_proj and v_proj [192, 576] and its query heads 3, 4, 5. Where later layers read the keys
  and values of an earlier one, as in Gemma 4, their query heads of that group, too.
* module: a whole attention or a whole FFN with the norm before it; layer: both.

In LFM2 most layers mix tokens by a short convolution instead of attention, with hidden 1024 and as many channels:

* channel 7 of a short convolution: rows 7, 1031 and 2055 of in_proj [3072, 1024], which make its input gate, its output
  gate and its signal, row 7 of the kernels [1024, 1, 3], column 7 of out_proj [1024, 1024]: 4 * 1024 + 3 weights.

In Qwen3.5 three of four layers mix by a gated delta net, whose 16 key heads of 128 serve one value head of 128 each:

* key head 4 of a delta net: rows 512:640 of the queries, of the keys and of the values in in_proj_qkv [6144, 1024] and
  the same rows of the kernels, rows 512:640 of in_proj_z, row 4 of in_proj_a, in_proj_b, A_log and dt_bias, columns
  512:640 of out_proj. Where a key head serves r value heads, all of them: r times as many of the others.

GQA maps query head i to KV head i // (query_heads / kv_heads), so inside a layer every KV group keeps the same number
of query heads. Layers may differ from one another.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from saap.base.blocks import ATTENTION as ATTENTION
from saap.base.blocks import CONV as CONV
from saap.base.blocks import DELTA as DELTA
from saap.base.blocks import FFN as FFN
from saap.base.blocks import KINDS as KINDS
from saap.base.blocks import MIXERS as MIXERS
from saap.base.blocks import RARE as RARE
from saap.base.blocks import BlockKind as BlockKind
from saap.base.blocks import DeltaHeads as DeltaHeads
from saap.base.blocks import LayerSizes as LayerSizes
from saap.base.blocks import OfBlocks as OfBlocks

QueryNorm = Literal["none", "head", "all"]


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
    conv_kernel: int = 0  # tokens that a convolution sees, a short one or a delta net's; 0: the family has none
    conv_bias: bool = False  # whether its matrices and kernels have biases
    gate_width: int = 0  # elements of the gate of each query head; 0: there is none
    gated_queries: bool = False  # whether the rows of a head's gate stand behind those of its query
    delta: DeltaHeads | None = None  # of its gated delta nets
    sources: tuple[int, ...] = ()  # of each layer, the one whose keys and values it reads; empty: all have their own
    per_layer: int = 0  # elements of a token's embedding for each layer; 0: there is none. With it no layer goes whole
    head_tokens: int = 0  # tokens that a trimmed head predicts; 0: all

    @property
    def head_rows(self) -> int:
        """Tokens that the head predicts."""
        return self.head_tokens or self.vocab

    @property
    def separable_heads(self) -> bool:
        """Whether heads may go one by one: not where a norm spans all of them."""
        return self.qk_norm != "all"

    def sharing(self, index: int) -> list[int]:
        """List the layers that use the keys and values of layer ``index`` or of the one it reads, in order."""
        if not self.sources:
            return [index]
        return [other for other, source in enumerate(self.sources) if source == self.sources[index]]

    def is_read(self, index: int) -> bool:
        """Whether later layers read the keys and values of layer ``index``."""
        return bool(self.sources) and self.sources.count(index) > 1

    def head_of(self, layer: OfBlocks) -> int:
        """Elements of a head of attention in a layer, by its sizes or its plan."""
        return int(getattr(layer, "head_dim", 0)) or self.head_dim

    @property
    def biased_output(self) -> bool:
        return self.added_bias or (self.attention_bias and self.output_bias)

    @property
    def biased_down(self) -> bool:
        return self.added_bias or self.mlp_bias

    @property
    def biased_conv(self) -> bool:
        return self.added_bias or self.conv_bias

    def arrays(self, kind: BlockKind, layer: LayerSizes) -> tuple[dict[str, tuple[int, int]], list[int]]:
        """Return the matrices (rows, columns) of a block by their names in a graph, and the sizes of its other arrays.

        Those are norms, biases, and the kernels of a convolution, one for each token that it sees.
        """
        norms = [self.hidden] * self.norms
        if kind is ATTENTION:
            queries, keys = layer.query_heads * self.head_of(layer), layer.kv_heads * self.head_of(layer)
            rows = queries + (0 if layer.reads else 2 * keys) + layer.query_heads * self.gate_width
            biases = [rows] * self.attention_bias + [self.hidden] * self.biased_output
            return {"qkv": (rows, self.hidden), "o": (self.hidden, queries)}, self.attention_norms(layer) + biases
        if kind is CONV:
            width = layer.conv
            others = [width] * self.conv_kernel + [3 * width, width] * self.conv_bias + [self.hidden] * self.biased_conv
            return {"conv_in": (3 * width, self.hidden), "conv_out": (self.hidden, width)}, norms + others
        if kind is DELTA:
            heads = self.delta
            assert heads is not None, "a family with delta nets has sizes of their heads"
            key, value, rates = (layer.delta * width for width in (heads.key, heads.width, heads.values))
            others = [2 * key + value] * self.conv_kernel + [2 * rates * self.hidden, rates, rates, heads.value]
            matrices = {"delta_in": (2 * key + 2 * value, self.hidden), "delta_out": (self.hidden, value)}
            return matrices, norms + others + [self.hidden] * self.added_bias
        biases = [2 * layer.ffn] * self.mlp_bias + [self.hidden] * self.biased_down
        return {"gate_up": (2 * layer.ffn, self.hidden), "down": (self.hidden, layer.ffn)}, norms + biases

    def weights(self, kind: BlockKind, layer: LayerSizes) -> int:
        """Weights of one block of a layer with its norms; 0 where the layer has no such block."""
        if not layer.has(kind):
            return 0
        matrices, others = self.arrays(kind, layer)
        count = sum(rows * columns for rows, columns in matrices.values()) + sum(others)
        # A gate with a matrix of its own has no biases; the graph's joint array holds zeros for it.
        biased = kind is not ATTENTION or self.gated_queries or not self.attention_bias
        return count - (0 if biased else layer.query_heads * self.gate_width)

    def weights_of(self, layer: LayerSizes) -> int:
        """Weights of one layer."""
        return sum(self.weights(kind, layer) for kind in layer.blocks)

    def inner_width(self, kind: BlockKind, layer: LayerSizes) -> int:
        """Columns of the matrix by which a block writes to the residual stream."""
        return int(getattr(layer, kind.sizes[0])) * self.width_of(kind.writes, layer)

    def writing_share(self, kind: BlockKind, layer: LayerSizes) -> float:
        """Return the share of a block's weights in the matrix by which it writes."""
        return self.inner_width(kind, layer) * self.hidden / self.weights(kind, layer)

    def width_of(self, role: str, layer: OfBlocks) -> int:
        """Count the rows of a coupled structure in the matrix with this role; of a matrix that writes, the columns."""
        if role in ATTENTION.roles:
            gate, dim = self.gate_width if self.gated_queries else 0, self.head_of(layer)
            return {"head_gate": self.gate_width, "query": dim + gate}.get(role, dim)
        if role not in DELTA.roles or self.delta is None:
            return 1
        sizes = self.delta
        widths = {"delta_query": sizes.key, "delta_key": sizes.key, "delta_beta": sizes.values}
        return widths.get(role, sizes.values if role == "delta_decay" else sizes.width)

    def attention_norms(self, layer: LayerSizes) -> list[int]:
        """Widths of the norms of one attention block."""
        heads = {"none": (), "head": (1, 1), "all": (layer.query_heads, layer.kv_heads)}[self.qk_norm]
        own = heads[:1] if layer.reads else heads
        return [self.hidden] * self.norms + [count * self.head_of(layer) for count in own]

    @property
    def layer_weights(self) -> int:
        """Weights of all decoder layers: what ``--ratio`` is a share of."""
        return sum(map(self.weights_of, self.layers))

    @property
    def parameters(self) -> int:
        """All weights: layers, embeddings, final norm, and the head where it is not tied."""
        outside = self.vocab * self.hidden * (1 if self.tied else 2) + self.hidden
        return self.layer_weights + outside + self.per_layer_weights

    @property
    def resident_outside(self) -> int:
        """Weights outside the layers, in memory where layers are streamed; without tables that stay in their file."""
        return self.parameters - self.layer_weights - self.vocab * len(self.layers) * self.per_layer

    @property
    def per_layer_weights(self) -> int:
        """Weights of the embeddings for each layer, and of what brings them there."""
        if not self.per_layer:
            return 0
        table = (self.vocab + self.hidden) * len(self.layers) * self.per_layer + self.per_layer
        return table + len(self.layers) * (2 * self.per_layer * self.hidden + self.hidden)

    def with_layers(self, layers: tuple[LayerSizes, ...]) -> ModelShape:
        return replace(self, layers=layers)
