"""One walk over a model's weights, tensor by tensor, into the bundle's external data file.

:func:`write_model` goes over the layers, and a :class:`Layout` says how a matrix stands in the file:
:class:`MicrosoftLayout` for the operators of ONNX Runtime, :class:`export.portable.weights.StandardLayout` for those of
ONNX itself. Every tensor is written once, aligned for memory-mapping; what comes back are references (offset, length,
shape) that several graphs, and several shapes of one tensor, can share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from export.bundle.manifest import WEIGHTS
from export.source import DeltaRates, Precision, WeightSource
from saap.base.progress import Progress, advance
from saap.models.shape import LayerSizes
from saap.quantize.groups import QuantMatrix

# Fields of Architecture, and the names of their tensors; a family has some of them.
WORD_ROWS = "vocabulary.rows"  # of each token, int32, where words are left out of the head: its row in the table
ATTENTION_NORMS = ("attention_norm", "query_norm", "key_norm", "attention_post_norm")
STATE_NORMS = ("attention_norm", "attention_post_norm")
FFN_NORMS = ("ffn_norm", "ffn_post_norm")
NORMS = (*ATTENTION_NORMS, *FFN_NORMS)
ALIGNMENT = 4096  # ONNX Runtime maps external data in pages

Array = torch.Tensor | NDArray[np.generic]


class WeightFile:
    """Appends arrays to the external data file and remembers where each went; floats are stored as ``floats``."""

    def __init__(self, directory: Path, floats: str = "float32") -> None:
        self.directory, self.floats = directory, np.dtype(floats)
        self.tensors: dict[str, ir.ExternalTensor] = {}
        self._file = (directory / WEIGHTS).open("wb")

    def add(self, name: str, values: Array) -> None:
        array = values.numpy() if isinstance(values, torch.Tensor) else values
        self._file.seek(-(-self._file.tell() // ALIGNMENT) * ALIGNMENT)
        offset = self._file.tell()
        array = np.ascontiguousarray(array, dtype=self.floats if array.dtype.kind == "f" else None)
        self._file.write(array.data if array.ndim else array.tobytes())
        self._refer(name, (offset, array.nbytes), ir.DataType.from_numpy(array.dtype), array.shape)

    def alias(self, name: str, of: str, shape: Sequence[int], dtype: ir.DataType | None = None) -> None:
        """Let ``name`` be the bytes of the tensor ``of``, in another shape, and of another type if given."""
        old = self.tensors[of]
        self._refer(name, (old.offset or 0, old.length or 0), dtype or old.dtype, shape)

    def beginning(self, name: str, of: str, share: float) -> None:
        """Let ``name`` be the first rows of the tensor ``of``: this share of them."""
        old = self.tensors[of]
        rows, *rest = old.shape.numpy()
        first = round(rows * share)
        self._refer(name, (old.offset or 0, (old.length or 0) // rows * first), old.dtype, (first, *rest))

    def _refer(self, name: str, place: tuple[int, int], dtype: ir.DataType, shape: Sequence[int]) -> None:
        self.tensors[name] = ir.ExternalTensor(
            WEIGHTS, *place, dtype, shape=ir.Shape(shape), name=name, base_dir=str(self.directory)
        )

    def bytes_per_token(self, head: str) -> int:
        """Bytes of layers, norms and the tensors below ``head``, which every token reads; others are looked up in."""
        each = ("layers.", f"{head}.", "per_layer_")
        read = [t for name, t in self.tensors.items() if name.startswith(each) or name == "norm"]
        return sum({tensor.offset: tensor.nbytes for tensor in read}.values())  # two names of one tensor count once

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class Layout(Protocol):
    """A layout of matrices in the data file.

    ``norms_last``: the norms of a layer stand behind its matrices, not each behind those of its block.
    """

    file: WeightFile
    norms_last: bool

    def add_matrix(self, name: str, matrix: torch.Tensor | QuantMatrix) -> None:
        """Write a linear [N, K]."""

    def add_vocabulary(self, source: WeightSource, precision: Precision) -> None:
        """Write embedding and head."""

    def add_table(self, name: str, table: torch.Tensor | QuantMatrix) -> None:
        """Write a matrix of which rows are looked up."""


def write_model(
    source: WeightSource,
    precision: Precision,
    layout: Layout,
    tables: Mapping[str, Array],
    progress: Progress | None = None,
) -> None:
    """Write all tensors of a decoder, one layer at a time, and then the rotary ``tables``."""
    count, names = len(source.shape.layers), source.architecture.per_layer
    beside = {"layer_norm": f"{names.output_norm}.weight", "layer_scale": names.scale} if names else {}
    for index, sizes in enumerate(source.shape.layers):
        advance(progress, "writing weights (layers)", index, count)
        for piece in _pieces(sizes, layout.norms_last, bool(source.shape.per_layer)):
            name = f"layers.{index}.{piece}"
            if piece == "conv_kernel":
                kernel = source.kernel(index)
                for tap, factors in enumerate(kernel.weight[:, 0].t().contiguous()):
                    layout.file.add(f"{name}.{tap}", factors)
                if kernel.bias is not None:
                    layout.file.add(f"{name}.bias", kernel.bias)
            elif piece in ("layer_norm", "layer_scale"):
                layout.file.add(name, source.numbers(f"{source.architecture.layers}.{index}.{beside[piece]}"))
            elif piece == "rates":
                _add_rates(layout.file, name, source.rates(index))
            elif piece not in NORMS:
                linear = source.linear(index, piece, precision)
                layout.add_matrix(name, linear.matrix)
                if linear.bias is not None:
                    layout.file.add(f"{name}.bias", linear.bias)
            elif getattr(source.architecture, piece) and not (piece == "key_norm" and sizes.reads):
                layout.file.add(name, source.norm(piece, index))
    layout.file.add("norm", source.norm("final_norm"))
    layout.add_vocabulary(source, precision)
    if names is not None:
        layout.add_table("per_layer", source.table(names.table, precision))
        layout.add_matrix("per_layer_in", source.matrix(names.matrix, precision))
        layout.file.add("per_layer_norm", source.numbers(f"{names.norm}.weight"))
    for name, table in tables.items():
        layout.file.add(name, table)
    advance(progress, "writing weights (layers)", count, count)


def _add_rates(file: WeightFile, name: str, rates: DeltaRates) -> None:
    """Write the matrix of a gated delta net's rates as [hidden, 2 * value heads], and its vectors."""
    file.add(f"{name}.weight", rates.matrix.t().contiguous())
    for part in ("scale", "bias", "norm"):
        file.add(f"{name}.{part}", getattr(rates, part))


def _pieces(sizes: LayerSizes, norms_last: bool, per_layer: bool) -> list[str]:
    """Matrices and norms of a layer in the order of the file."""
    pieces = ["qkv", "o", *ATTENTION_NORMS] if sizes.query_heads else []
    pieces += ["conv_in", "conv_kernel", "conv_out", *STATE_NORMS] if sizes.conv else []
    pieces += ["delta_in", "conv_kernel", "rates", "delta_out", *STATE_NORMS] if sizes.delta else []
    pieces += ["gate_up", "down", *FFN_NORMS] if sizes.ffn else []
    pieces += ["layer_gate", "layer_out", "layer_norm", "layer_scale"] if per_layer else []
    return sorted(pieces, key=lambda piece: piece in NORMS) if norms_last else pieces


class MicrosoftLayout:
    """The layout of MatMulNBits and GatherBlockQuantized: integers packed along rows of [N, K], floats as [K, N]."""

    norms_last = False

    def __init__(self, file: WeightFile) -> None:
        self.file = file

    def add_matrix(self, name: str, matrix: torch.Tensor | QuantMatrix) -> None:
        if isinstance(matrix, torch.Tensor):
            self.file.add(f"{name}.weight", matrix.t().contiguous())
            return
        self.file.add(f"{name}.qweight", matrix.qweight)
        self.file.add(f"{name}.scales", matrix.scales.float().flatten())

    def add_vocabulary(self, source: WeightSource, precision: Precision) -> None:
        """Write the embedding, and the head where it is not tied to it.

        Where a tied head has some tokens only, the table begins with their rows, which are the head.
        """
        arch, tied = source.architecture, source.shape.tied
        words, table = source.words, source.table(arch.embedding, precision)
        if words is None:
            self.add_table("embedding", table)
            if not tied:
                self.add_table("head", source.table(arch.head, precision))
            return
        others = torch.ones(source.shape.vocab, dtype=torch.bool)
        others[words] = False
        order = torch.cat([words, others.nonzero().flatten()])
        rows = torch.empty(len(order), dtype=torch.int32)
        rows[order] = torch.arange(len(order), dtype=torch.int32)
        self.file.add(WORD_ROWS, rows)
        self.add_table("embedding", table[order] if tied else table)
        if tied:
            for part in ("weight", "qweight", "scales"):
                if f"embedding.{part}" in self.file.tensors:
                    self.file.beginning(f"head.{part}", f"embedding.{part}", len(words) / len(order))
        else:
            self.add_table("head", source.table(arch.head, precision)[words])

    def add_table(self, name: str, table: torch.Tensor | QuantMatrix) -> None:
        """Write a matrix of which rows are looked up."""
        if isinstance(table, QuantMatrix):
            self.add_matrix(name, table)
            # The gather wants one more axis on the same numbers.
            self.file.alias(f"{name}.scales3", f"{name}.scales", (*table.scales.shape, 1))
        else:
            self.file.add(f"{name}.weight", table)
