"""Weights of a model directory in the layout that standard operators read: every matrix [K, N], to stand right of a
MatMul, as float32 or as integers for a blockwise DequantizeLinear along axis 0.

ONNX Runtime turns DequantizeLinear + MatMul into its fast MatMulNBits only in this orientation: with the matrix stored
[N, K], behind a Transpose or in a Gemm, it would dequantise the whole matrix at every call. Seen: 4 bit is fused by
1.20.1, 1.23.2 and 1.32.0, 8 bit by 1.32.0 alone; the other two run 8 bit, dequantising at every call.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from devices.common.progress import Progress
from export.graph.weights import ATTENTION_NORMS, FFN_NORMS, WeightFile, write_bias
from export.source import ModelSource, Precision, stack_linears
from saap.models.modeling_slim import unpack_codes, unpack_zero_points
from saap.quantize.groups import QuantMatrix, quantize
from saap.system.errors import UserError


def write_standard_weights(
    source: ModelSource, precision: Precision, file: WeightFile, progress: Progress | None = None
) -> None:
    """Write all tensors of the portable graph, one layer at a time."""
    arch, count = source.architecture, len(source.shape.layers)
    for index, sizes in enumerate(source.shape.layers):
        if progress:
            progress("writing weights", index, count)
        name, prefix = f"layers.{index}", f"{arch.layers}.{index}."
        parts: tuple[str, ...] = ()
        norms: tuple[str, ...] = ()
        if sizes.query_heads:
            parts += ("qkv", "o")
            norms += ATTENTION_NORMS
        if sizes.ffn:
            parts += ("gate_up", "down")
            norms += FFN_NORMS
        for part in parts:
            _write_linear(source, precision, file, index, part)
        for norm in norms:
            if module := getattr(arch, norm):
                file.add(f"{name}.{norm}", source.norm(prefix + module))
    file.add("norm", source.norm(arch.final_norm))
    _write_vocabulary(source, precision, file)
    if progress:
        progress("writing weights", count, count)


def _write_linear(source: ModelSource, precision: Precision, file: WeightFile, layer: int, part: str) -> None:
    name, linear = f"layers.{layer}.{part}", stack_linears(source, precision, layer, part)
    if isinstance(linear.matrix, QuantMatrix):
        _write_integers(file, name, linear.matrix)
    else:
        _write_float(file, name, linear.matrix)
    write_bias(file, name, linear)


def _write_vocabulary(source: ModelSource, precision: Precision, file: WeightFile) -> None:
    """The head [hidden, vocab]. A tied embedding is the head's columns; one of its own stands row by row."""
    arch, tied = source.architecture, source.shape.tied
    head = _vocabulary_matrix(source, precision, arch.embedding if tied else arch.head)
    if isinstance(head, QuantMatrix):
        _write_integers(file, "head", head)
        if tied:
            _name_for_gather(file, source.shape.hidden, source.shape.vocab, head.bits)
    else:
        _write_float(file, "head", head)
    if tied:
        return
    table = _vocabulary_matrix(source, precision, arch.embedding)
    if isinstance(table, QuantMatrix):
        file.add("embedding.codes", _rows_of_codes(table))
        file.add("embedding.scales", table.scales.float().numpy())
    else:
        file.add("embedding.weight", table.numpy())


def _vocabulary_matrix(source: ModelSource, precision: Precision, module: str) -> torch.Tensor | QuantMatrix:
    """Head or embedding [N, K], its integers without zero points: the embedding's nodes know of none."""
    bits, block = precision.head_bits, precision.block
    if not source.quant:
        weight = source.tensor(f"{module}.weight").float()
        return weight if bits == 32 else quantize(weight, bits, block, symmetric=True)
    table = source.matrix(module, precision)
    if isinstance(table, QuantMatrix) and not is_symmetric(table):
        raise UserError(f"{module} has zero points other than {2 ** (bits - 1)}: quantise it symmetrically")
    return table


def _name_for_gather(file: WeightFile, hidden: int, vocab: int, bits: int) -> None:
    """Second names for what the embedding reads: ONNX Runtime fuses a matrix only if nothing else uses its tensors."""
    if bits == 4 and vocab % 2:
        raise UserError(f"a vocabulary of {vocab} tokens is odd: a 4-bit tied table needs an even one; use 8 bits")
    dtype = ir.DataType.UINT8 if bits == 4 else ir.DataType.INT8
    retype(file, "gathered.codes", "head.codes", dtype, (hidden, vocab * bits // 8))
    retype(file, "gathered.scales", "head.scales", ir.DataType.FLOAT, file.tensors["head.scales"].shape)


def _rows_of_codes(table: QuantMatrix) -> np.ndarray:
    """Signed codes, row by row: [V, K] int8, or [V, K/2] uint8 with columns j and j + K/2 in one byte."""
    codes = unpack_codes(table.qweight, table.bits, table.block).flatten(1)
    if table.bits == 8:
        return (codes ^ 0x80).numpy().view(np.int8)
    left, right = (codes ^ 8).chunk(2, dim=1)
    return (left | (right << 4)).numpy()


def _write_float(file: WeightFile, name: str, matrix: torch.Tensor) -> None:
    file.add(f"{name}.weight", matrix.t().contiguous().numpy())


def _write_integers(file: WeightFile, name: str, matrix: QuantMatrix) -> None:
    """Codes [K, N], scales [K / block, N], and zero points of that shape unless they are all the middle."""
    bits = matrix.bits
    groups = matrix.scales.shape[1]
    codes = unpack_codes(matrix.qweight, bits, matrix.block).flatten(1).t().contiguous()
    if is_symmetric(matrix):
        signed = ir.DataType.INT4 if bits == 4 else ir.DataType.INT8
        _add_packed(file, f"{name}.codes", codes ^ 2 ** (bits - 1), bits, signed)
    else:
        unsigned = ir.DataType.UINT4 if bits == 4 else ir.DataType.UINT8
        _add_packed(file, f"{name}.codes", codes, bits, unsigned)
        zero_points = unpack_zero_points(matrix.zero_points, bits, groups).t().contiguous()
        _add_packed(file, f"{name}.zero_points", zero_points, bits, unsigned)
    file.add(f"{name}.scales", matrix.scales.float().t().contiguous().numpy())


def _add_packed(file: WeightFile, name: str, codes: torch.Tensor, bits: int, dtype: ir.DataType) -> None:
    """Two 4-bit numbers in a byte, the first one low, across the ends of rows: ONNX's own order."""
    flat = codes.flatten()
    if bits == 4:
        if flat.numel() % 2:
            flat = torch.nn.functional.pad(flat, (0, 1))
        flat = flat[0::2] | (flat[1::2] << 4)
    file.add(name, flat.numpy())
    retype(file, name, name, dtype, tuple(codes.shape))


def retype(file: WeightFile, name: str, of: str, dtype: ir.DataType, shape: Any) -> None:
    """Let ``name`` be the bytes of ``of`` read as another type and shape."""
    old = file.tensors[of]
    file.tensors[name] = ir.ExternalTensor(
        old.location, old.offset, old.length, dtype, shape=ir.Shape(shape), name=name, base_dir=str(file.directory)
    )


def is_symmetric(matrix: QuantMatrix) -> bool:
    """Whether every zero point is the middle, 2^(bits-1)."""
    zero_points = unpack_zero_points(matrix.zero_points, matrix.bits, matrix.scales.shape[1])
    return bool((zero_points == 2 ** (matrix.bits - 1)).all())
