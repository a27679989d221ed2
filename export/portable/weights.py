"""Weights in the layout that standard operators read: every matrix [K, N], to stand right of a MatMul, as float32 or as
integers for a blockwise DequantizeLinear along axis 0.

ONNX Runtime turns DequantizeLinear + MatMul into its fast MatMulNBits only in this orientation: with the matrix stored
[N, K], behind a Transpose or in a Gemm, it would dequantise the whole matrix at every call. Seen: 4 bit is fused by
1.20.1, 1.23.2 and 1.32.0, 8 bit by 1.32.0 alone; the other two run 8 bit, dequantising at every call.
"""

from __future__ import annotations

import onnx_ir as ir
import torch

from export.graph.weights import WeightFile
from export.source import Precision, WeightSource
from saap.base.errors import UserError
from saap.models.modeling_slim import unpack_codes
from saap.quantize.groups import QuantMatrix


class StandardLayout:
    """The layout of DequantizeLinear and MatMul: matrices [K, N]."""

    norms_last = True

    def __init__(self, file: WeightFile) -> None:
        self.file = file

    def add_matrix(self, name: str, matrix: torch.Tensor | QuantMatrix) -> None:
        """Write a linear [N, K], or its integers as signed ones."""
        if isinstance(matrix, torch.Tensor):
            self.file.add(f"{name}.weight", matrix.t().contiguous())
            return
        bits = matrix.bits
        codes = unpack_codes(matrix.qweight, bits, matrix.group_size).flatten(1).t().contiguous()
        signed = ir.DataType.INT4 if bits == 4 else ir.DataType.INT8
        self._add_packed(f"{name}.codes", codes ^ 2 ** (bits - 1), bits, signed)
        self.file.add(f"{name}.scales", matrix.scales.float().t().contiguous())

    def add_vocabulary(self, source: WeightSource, precision: Precision) -> None:
        """Write the head [hidden, vocab]. A tied embedding is the head's columns; one of its own stands row by row."""
        arch, tied = source.architecture, source.shape.tied
        head = source.table(arch.embedding if tied else arch.head, precision)
        self.add_matrix("head", head)
        if tied:
            if isinstance(head, QuantMatrix):
                self._name_for_gather(source.shape.hidden, source.shape.vocab, head.bits)
            return
        self.add_table("embedding", source.table(arch.embedding, precision))

    def add_table(self, name: str, table: torch.Tensor | QuantMatrix) -> None:
        """Write a table row by row, of which rows are looked up."""
        if isinstance(table, QuantMatrix):
            self.file.add(f"{name}.codes", _rows_of_codes(table))
            self.file.add(f"{name}.scales", table.scales.float())
        else:
            self.file.add(f"{name}.weight", table)

    def _name_for_gather(self, hidden: int, vocab: int, bits: int) -> None:
        """Second names for what the embedding reads: a matrix is fused only if nothing else uses its tensors."""
        if bits == 4 and vocab % 2:
            raise UserError(f"a vocabulary of {vocab} tokens is odd: a 4-bit tied table needs an even one; use 8 bits")
        dtype = ir.DataType.UINT8 if bits == 4 else ir.DataType.INT8
        self.file.alias("gathered.codes", "head.codes", (hidden, vocab * bits // 8), dtype)
        self.file.alias("gathered.scales", "head.scales", self.file.tensors["head.scales"].shape.numpy())

    def _add_packed(self, name: str, codes: torch.Tensor, bits: int, dtype: ir.DataType) -> None:
        """Two 4-bit numbers in a byte, the first one low, across the ends of rows: ONNX's own order."""
        flat = codes.flatten()
        if bits == 4:
            if flat.numel() % 2:
                flat = torch.nn.functional.pad(flat, (0, 1))
            flat = flat[0::2] | (flat[1::2] << 4)
        self.file.add(name, flat)
        self.file.alias(name, name, codes.shape, dtype)


def _rows_of_codes(table: QuantMatrix) -> torch.Tensor:
    """Signed codes, row by row: [V, K] int8, or [V, K/2] uint8 with columns j and j + K/2 in one byte."""
    codes = unpack_codes(table.qweight, table.bits, table.group_size).flatten(1)
    if table.bits == 8:
        return (codes ^ 0x80).view(torch.int8)
    left, right = (codes ^ 8).chunk(2, dim=1)
    return left | (right << 4)
