"""The coupled structure: weight slices that must be removed together or not at all.

Worked example, a LLaMA layer with hidden 576, 9 query heads of 64 in 3 KV groups and FFN 1536:

* FFN channel 7: row 7 of gate_proj and up_proj [1536, 576], column 7 of down_proj [576, 1536]: 3 * 576 weights.
* query head 4 (KV group 1): rows 256:320 of q_proj [576, 576], columns 256:320 of o_proj: 2 * 64 * 576 weights.
* KV group 1: rows 64:128 of k_proj and v_proj [192, 576] and its query heads 3, 4, 5.
* module: a whole attention or a whole FFN with the norm before it; layer: both.

GQA maps query head i to KV head i // (query_heads / kv_heads), so inside a layer every KV group keeps the same number
of query heads. Layers may differ from one another.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

QueryNorm = Literal["none", "head", "all"]


@dataclass(frozen=True)
class LayerSizes:
    """What is left of one decoder layer; 0 query heads: no attention, 0 ffn: no feed-forward block."""

    query_heads: int
    kv_heads: int
    ffn: int

    @property
    def heads_per_group(self) -> int:
        return self.query_heads // self.kv_heads if self.kv_heads else 0


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
    added_bias: bool = False  # whether pruning gave output and down projections biases that their family lacks

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

    def attention_weights(self, layer: LayerSizes) -> int:
        """Weights of one attention block with its norms."""
        if not layer.query_heads:
            return 0
        rows = (layer.query_heads + 2 * layer.kv_heads) * self.head_dim
        biases = rows * self.attention_bias + self.hidden * self.biased_output
        norms = sum(self.attention_norms(layer))
        return rows * self.hidden + layer.query_heads * self.head_dim * self.hidden + norms + biases

    def attention_norms(self, layer: LayerSizes) -> list[int]:
        """Widths of the norms of one attention block."""
        heads = {"none": (), "head": (1, 1), "all": (layer.query_heads, layer.kv_heads)}[self.qk_norm]
        return [self.hidden] * self.norms + [count * self.head_dim for count in heads]

    def ffn_weights(self, layer: LayerSizes) -> int:
        """Weights of one feed-forward block with its norms."""
        if not layer.ffn:
            return 0
        biases = 2 * layer.ffn * self.mlp_bias + self.hidden * self.biased_down
        return 3 * layer.ffn * self.hidden + self.norms * self.hidden + biases

    @property
    def layer_weights(self) -> int:
        """Weights of all decoder layers: what ``--ratio`` is a share of."""
        return sum(self.attention_weights(layer) + self.ffn_weights(layer) for layer in self.layers)

    @property
    def parameters(self) -> int:
        """All weights: layers, embedding, final norm, and the head where it is not tied."""
        return self.layer_weights + self.vocab * self.hidden * (1 if self.tied else 2) + self.hidden

    def with_layers(self, layers: tuple[LayerSizes, ...]) -> ModelShape:
        return replace(self, layers=layers)
