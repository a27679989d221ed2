"""How large a bundle's weights file will be, before there is one.

The file of the cpu target holds one array after another, each begun at a multiple of 4096 bytes, since ONNX Runtime
maps it in pages. With groups of b columns:

* a matrix [N, K] at 4 or 8 bit: N K bits/8 bytes of integers and 4 N K/b of scales; symmetric, so no zero points
* a matrix [N, K] at 32 bit: 4 N K
* a bias 4 N, a norm 4 times its width, a rotary table twice 4 times positions times half the rotated width

Queries, keys and values are one matrix, gate and up are one, and a tied head is the embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from saap.architectures import traits_of, with_defaults
from saap.errors import SaapError
from saap.structures import LayerSizes, ModelShape

PAGE = 4096  # bytes
FLOAT = 4  # bytes
POSITIONS = 2048  # what transformers takes where a LLaMA config names none


@dataclass(frozen=True)
class BundleSize:
    """Bytes of a bundle's weights at a precision.

    Attributes:
        bits: of all matrices, embedding and head included: 4, 8 or 32.
        block: quantisation group; means nothing at 32 bit.
        rotary_tables: pairs of cos and sin.
        rotary_bytes: of one cos or sin.
    """

    bits: int
    block: int
    rotary_tables: int
    rotary_bytes: int

    def attention(self, shape: ModelShape, sizes: LayerSizes) -> int:
        """Bytes of one attention block with its norms; 0 heads are 0 bytes."""
        if not sizes.query_heads:
            return 0
        queries, both = sizes.query_heads * shape.head_dim, 2 * sizes.kv_heads * shape.head_dim
        arrays = [*self._matrix(queries + both, shape.hidden), *self._matrix(shape.hidden, queries)]
        arrays += [FLOAT * shape.hidden] * shape.norms + [FLOAT * shape.head_dim] * (2 * shape.qk_norm)
        if shape.attention_bias:
            arrays.append(FLOAT * (queries + both))
        if shape.biased_output:
            arrays.append(FLOAT * shape.hidden)
        return sum(map(_paged, arrays))

    def ffn(self, shape: ModelShape, sizes: LayerSizes) -> int:
        """Bytes of one feed-forward block with its norms; width 0 is 0 bytes."""
        if not sizes.ffn:
            return 0
        arrays = [*self._matrix(2 * sizes.ffn, shape.hidden), *self._matrix(shape.hidden, sizes.ffn)]
        arrays += [FLOAT * shape.hidden] * shape.norms
        if shape.mlp_bias:
            arrays.append(FLOAT * 2 * sizes.ffn)
        if shape.biased_down:
            arrays.append(FLOAT * shape.hidden)
        return sum(map(_paged, arrays))

    def outside(self, shape: ModelShape) -> int:
        """Bytes of what is in no layer: embedding, head where it is not tied, last norm, rotary tables."""
        arrays = [FLOAT * shape.hidden, *(1 if shape.tied else 2) * self._matrix(shape.vocab, shape.hidden)]
        arrays += [self.rotary_bytes] * (2 * self.rotary_tables)
        return sum(map(_paged, arrays)) - (_paged(arrays[-1]) - arrays[-1])  # the file ends with its last array

    def total(self, shape: ModelShape) -> int:
        """Bytes of the whole file."""
        layers = sum(self.attention(shape, sizes) + self.ffn(shape, sizes) for sizes in shape.layers)
        return self.outside(shape) + layers

    def check(self, shape: ModelShape) -> None:
        """Refuse a model whose matrices are not whole groups.

        Raises:
            SaapError: names the width.
        """
        widths = [("the hidden size", shape.hidden)]
        for index, sizes in enumerate(shape.layers):
            widths += [(f"attention of layer {index}", sizes.query_heads * shape.head_dim)]
            widths += [(f"the FFN of layer {index}", sizes.ffn)]
        for what, width in widths:
            if self.bits != 32 and width % self.block:
                raise SaapError(
                    f"{what} is {width} wide, which groups of {self.block} do not divide: choose another group size "
                    "with --block (32, 64 or 128), or plan for --bits 32"
                )

    def _matrix(self, rows: int, columns: int) -> list[int]:
        if self.bits == 32:
            return [FLOAT * rows * columns]
        return [rows * columns * self.bits // 8, FLOAT * rows * columns // self.block]


def bundle_size(config: Mapping[str, Any], bits: int, block: int) -> BundleSize:
    """What the bundle of a model with this ``config.json`` takes.

    Raises:
        SaapError: a model that no bundle is made of.
    """
    traits, full = traits_of(dict(config)), with_defaults(dict(config))

    def get(key: str) -> Any:
        return full.get(key) if isinstance(full, dict) else getattr(full, key, None)

    scaling = get("rope_parameters") or get("rope_scaling") or {}
    share = get("partial_rotary_factor") or scaling.get("partial_rotary_factor") or 1.0
    width = get("head_dim") or get("hidden_size") // get("num_attention_heads")
    half = -(-int(width * share) // 2)
    tables = len({layer.rotary for layer in traits.layers if layer.rotary})
    return BundleSize(bits, block, tables, FLOAT * (get("max_position_embeddings") or POSITIONS) * half)


def _paged(size: int) -> int:
    return -(-size // PAGE) * PAGE
