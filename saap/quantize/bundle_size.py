"""The size of a bundle's weights file, before there is one.

The file of the cpu target holds one array after another, each begun at a multiple of 4096 bytes, since ONNX Runtime
maps it in pages. With groups of b columns:

* a matrix [N, K] at 4 or 8 bit: N K bits/8 bytes of integers and 4 N K/b of scales; symmetric, so no zero points
* a matrix [N, K] at 32 bit: 4 N K
* a bias 4 N, a norm 4 times its width, a rotary table twice 4 times positions times half the rotated width
* the kernels of a convolution, for each token that one sees, 4 times its channels
* of a gated delta net besides, in floats, the matrix of its two rates, a scale and a bias of each value head, a norm

Queries, keys and values are one matrix, gate and up are one, and a tied head is the embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from saap.base.errors import UserError
from saap.models.architectures import (
    Architecture,
    architecture_of,
    field_of,
    number_of,
    positions_of,
    rope_of,
    shape_of,
    traits_of,
    with_defaults,
)  # fmt: skip
from saap.models.shape import BlockKind, LayerSizes, ModelShape
from saap.models.slim_quant import MatrixForm, SlimQuant, module_form, quant_of, stacked_form

PAGE = 4096  # bytes
FLOAT = 4  # bytes
VOCABULARY = "vocabulary"  # embedding and head, among the parts of a model


@dataclass(frozen=True)
class BundleSize:
    """Bytes of a bundle's weights at a precision."""

    bits: int  # of all matrices, embedding and head included where ``head_bits`` says nothing else: 4, 8 or 32
    group_size: int  # weights per scale; means nothing at 32 bit
    rotary: tuple[int, ...]  # bytes of a cos, which has a sin beside it, of each pair of tables
    head_bits: int = 0  # of embedding and head; 0 is ``bits``
    quant: SlimQuant | None = None  # of a tuned model, for forms by matrix; only :meth:`total` asks it
    architecture: Architecture | None = None
    parts: Mapping[str, MatrixForm] = field(default_factory=dict)  # of a block, or VOCABULARY, that have other forms

    def block(self, kind: BlockKind, shape: ModelShape, sizes: LayerSizes, layer: int | None = None) -> int:
        """Bytes of one block with its norms, 0 where there is none of the kind. ``layer``: which, of a tuned model."""
        if not sizes.has(kind):
            return 0
        matrices, others = shape.arrays(kind, sizes)
        arrays = [FLOAT * elements for elements in others]
        for part, (rows, columns) in matrices.items():
            arrays += self._linear(rows, columns, layer, part)
        return sum(map(paged, arrays))

    def outside(self, shape: ModelShape) -> int:
        """Bytes of what is in no layer: embedding, head where it is not tied, last norm, rotary tables."""
        arrays = [
            FLOAT * shape.hidden,
            *([] if shape.tied else self._embedding(shape)),
            *self._embedding(shape, head=True),
            *self._per_layer(shape),
            *([FLOAT * shape.vocab] if shape.head_tokens else []),  # where each word's row is
        ]
        arrays += [each for each in self.rotary for _ in range(2)]
        return sum(map(paged, arrays)) - (paged(arrays[-1]) - arrays[-1])  # the file ends with its last array

    def looked_up(self, shape: ModelShape) -> int:
        """Bytes of tables of which a token reads single rows: rotary tables, and an embedding that is not the head."""
        table = [] if shape.tied else self._embedding(shape)
        if shape.head_tokens:
            gone = self._table(shape.vocab - shape.head_tokens, shape.hidden, "embedding") if shape.tied else []
            table = [*table, *gone, FLOAT * shape.vocab]
        width = len(shape.layers) * shape.per_layer
        per_layer = self._table(shape.vocab, width, "per_layer") if width else []
        return sum(table) + sum(per_layer) + 2 * sum(self.rotary)

    def total(self, shape: ModelShape) -> int:
        blocks = (self.block(kind, shape, s, i) for i, s in enumerate(shape.layers) for kind in s.blocks)
        return self.outside(shape) + sum(blocks)

    def check(self, shape: ModelShape) -> None:
        """Refuse a model whose matrices are not whole groups."""
        widths = [("the hidden size", shape.hidden)]
        for index, sizes in enumerate(shape.layers):
            widths += [(f"{kind.label} of layer {index}", shape.inner_width(kind, sizes)) for kind in sizes.blocks]
        for what, width in widths:
            if self.bits != 32 and width % self.group_size:
                raise UserError(
                    f"{what} is {width} wide, which groups of {self.group_size} do not divide: {other_groups(width)}"
                )

    def _linear(self, rows: int, columns: int, layer: int | None, part: str) -> list[int]:
        """Integers and scales of one matrix of a layer, or its floats."""
        if self.quant is None or self.architecture is None or layer is None:
            return matrix_bytes(rows, columns, self.parts.get(part, MatrixForm(self.bits, self.group_size)))
        return matrix_bytes(rows, columns, stacked_form(self.quant, self.architecture, layer, part))

    def _embedding(self, shape: ModelShape, head: bool = False) -> list[int]:
        """Integers and scales of the embedding or the head, or its floats."""
        rows = shape.head_rows if head and not shape.tied else shape.vocab
        return self._table(rows, shape.hidden, "head" if head else "embedding")

    def _table(self, rows: int, columns: int, which: str) -> list[int]:
        form, arch = MatrixForm(self.head_bits or self.bits, self.group_size), self.architecture
        if which != "per_layer":
            form = self.parts.get(VOCABULARY, form)
        if self.quant is not None and arch is not None:
            names = {"head": arch.head, "embedding": arch.embedding}
            module = names.get(which, arch.per_layer.table if arch.per_layer else "")
            form = module_form(self.quant, arch, module)
        return matrix_bytes(rows, columns, form)

    def _per_layer(self, shape: ModelShape) -> list[int]:
        """Bytes of per-layer embeddings: the table, the matrix and norm beside it, and each layer's own part."""
        if not shape.per_layer:
            return []
        count, width = len(shape.layers), len(shape.layers) * shape.per_layer
        arrays = [*self._table(shape.vocab, width, "per_layer"), *self._linear(width, shape.hidden, None, "")]
        each = self._linear(shape.per_layer, shape.hidden, None, "")
        each += [*self._linear(shape.hidden, shape.per_layer, None, ""), FLOAT * shape.hidden, FLOAT]
        return [*arrays, FLOAT * shape.per_layer, *each * count]


def matrix_bytes(rows: int, columns: int, form: MatrixForm) -> list[int]:
    """Bytes of the arrays of a matrix: integers and scales, or floats."""
    if form.bits == 32:
        return [FLOAT * rows * columns]
    return [rows * columns * form.bits // 8, FLOAT * rows * columns // form.group_size]


def bundle_size(config: Mapping[str, object], bits: int, group_size: int) -> BundleSize:
    """Describe the bundle of a model with this ``config.json``."""
    full, partial = with_defaults(dict(config)), "partial_rotary_factor"
    share = next((number_of(place, partial) for place in (full, rope_of(full)) if field_of(place, partial)), 1.0)
    shape, layers = shape_of(full), traits_of(full).layers
    dims = {traits.rotary: shape.head_of(sizes) for traits, sizes in zip(layers, shape.layers, strict=True)}
    halves = [-(-int(dim * share) // 2) for rotary, dim in dims.items() if rotary]
    return BundleSize(bits, group_size, tuple(FLOAT * positions_of(full) * half for half in halves))


def tuned_bundle_size(config: Mapping[str, object], quant: SlimQuant | None = None) -> int:
    """Bytes of the weights file of a model that holds integers, exactly, before or after it is written.

    Args:
        config: its ``config.json``, or that of the model to be quantised.
        quant: its ``slim_quant`` entry (:mod:`saap.models.slim_quant`); None takes the one in ``config``.

    Raises UserError: linears of one matrix that hold different integers, or a model that no bundle is made of.
    """
    quant = quant_of(config) if quant is None else quant
    assert quant is not None, "a model that holds integers says so"
    size = bundle_size(config, quant["bits"], quant["block"])
    size = replace(size, head_bits=quant["embedding_bits"], quant=quant, architecture=architecture_of(dict(config)))
    return size.total(replace(shape_of(dict(config)), tied=bool(quant["tied"])))


def paged(size: int) -> int:
    return -(-size // PAGE) * PAGE


def other_groups(width: int) -> str:
    """Advise on a group size that does not divide a width."""
    dividing = [str(size) for size in (32, 64, 128) if width % size == 0]
    if dividing:
        return f"give --group-size {' or '.join(dividing)}"
    return "none of 32, 64 and 128 does, so only 32 bits are possible"
