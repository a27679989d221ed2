"""Matrices as GGUF blocks: our integers are carried over if the block type can hold them, else rounded again.

Our integers are W = scale * (code - 2^(bits-1)) in groups of 32 or more columns (saap.quantize.groups). A GGUF block
is 32 columns with a float16 ``d`` of its own, so a wider group repeats its scale. What a block type holds:

* Q4_0, W = d (q - 8): every 4-bit group, exactly; Q4_1, W = d q + m, with m = -8 d.
* Q8_0, W = d q with q in -128..127: every group, exactly.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from saap.models.modeling_slim import unpack_codes
from saap.quantize.groups import QuantMatrix

BLOCK = 32  # columns of a Q4_0, Q4_1 or Q8_0 block
KINDS = ("F32", "F16", "Q8_0", "Q4_0", "Q4_1")
ROWS_AT_ONCE = 4096  # bounds the temporary floats of a large vocabulary


@dataclass(frozen=True)
class Encoded:
    """A matrix in a GGUF type."""

    data: np.ndarray  # [N, K] float16 or float32, or [N, bytes per row] uint8
    error: float  # largest |W' - W| of a group of 32 over the largest |W| of that group, worst group
    carried: float  # share of the groups whose integers were taken over as they are; 0 for a float matrix


def take_columns(matrix: QuantMatrix | torch.Tensor, order: torch.Tensor) -> QuantMatrix | torch.Tensor:
    """Reorder the columns of a matrix by ``order`` [K] int64; where that tears groups apart, as floats."""
    if isinstance(matrix, torch.Tensor):
        return matrix[:, order]
    size = matrix.group_size
    if len(order) % size or not torch.equal(
        order.view(-1, size), order[::size, None] // size * size + torch.arange(size)
    ):
        return matrix.dequantize()[:, order]
    groups = order[::size] // size
    return replace(matrix, qweight=matrix.qweight[:, groups], scales=matrix.scales[:, groups])


def encode(matrix: QuantMatrix | torch.Tensor, kind: str) -> Encoded:
    """Encode a matrix [N, K] in a GGUF type; a quantised type needs K % 32 == 0."""
    count = (matrix.qweight if isinstance(matrix, QuantMatrix) else matrix).shape[0]
    pieces, error, carried, groups = [], 0.0, 0, 0
    for start in range(0, count, ROWS_AT_ONCE):
        data, piece_error, fits = _encode_rows(matrix[start : start + ROWS_AT_ONCE], kind)
        pieces.append(data)
        error, carried, groups = max(error, piece_error), carried + int(fits.sum()), groups + fits.size
    return Encoded(np.concatenate(pieces), error, carried / groups if groups else 0.0)


def _encode_rows(matrix: QuantMatrix | torch.Tensor, kind: str) -> tuple[np.ndarray, float, np.ndarray]:
    """Return (data, worst relative error, which groups were carried over)."""
    from gguf import GGMLQuantizationType, quants

    floats = (matrix.dequantize() if isinstance(matrix, QuantMatrix) else matrix.float()).numpy()
    fits = np.zeros(0, bool)
    if kind == "F32":
        return floats, 0.0, fits
    if kind == "F16":
        data = floats.astype(np.float16)
        return data, relative_error(data.astype(np.float32), floats), fits
    data = quants.quantize(floats, GGMLQuantizationType[kind])
    if isinstance(matrix, QuantMatrix) and matrix.group_size % BLOCK == 0:
        blocks, fits = carry(matrix, kind)
        rounded = data.reshape(blocks.shape)
        data = np.where(fits[..., None], blocks, rounded).reshape(data.shape)
    return data, relative_error(quants.dequantize(data, GGMLQuantizationType[kind]), floats), fits


def carry(matrix: QuantMatrix, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Blocks that hold the integers of whole groups as they are, and which of them represent their group.

    Returns blocks [N, K/32, bytes per block] uint8 (meaningless where they do not fit), fits [N, K/32] bool.
    """
    repeat, middle = matrix.group_size // BLOCK, 2 ** (matrix.bits - 1)  # a wider group is several blocks
    packed = unpack_codes(matrix.qweight, matrix.bits, matrix.group_size)
    codes = packed.reshape(packed.shape[0], -1, BLOCK).numpy()
    scales = matrix.scales.float().repeat_interleave(repeat, 1).numpy()
    scale = scales.astype(np.float16)
    if kind == "Q4_1":
        minimum = (-scales * middle).astype(np.float16)
        fits = np.isfinite(minimum) & np.isfinite(scale) & (matrix.bits == 4)
        return np.concatenate([_bytes(scale), _bytes(minimum), _nibbles(codes & 15)], axis=-1), fits
    centred = codes.astype(np.int16) - middle
    low, high = (-8, 7) if kind == "Q4_0" else (-128, 127)
    fits = (centred.min(-1) >= low) & (centred.max(-1) <= high) & np.isfinite(scale)
    clipped = centred.clip(low, high)
    body = _nibbles((clipped + 8).astype(np.uint8)) if kind == "Q4_0" else clipped.astype(np.int8).view(np.uint8)
    return np.concatenate([_bytes(scale), body], axis=-1), fits


def _bytes(numbers: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(numbers)[..., None].view(np.uint8)


def _nibbles(codes: np.ndarray) -> np.ndarray:
    """[..., 32] uint8 in 0..15 -> [..., 16]: the first half of a block in the low nibbles, the second in the high."""
    packed: np.ndarray = codes[..., :16] | (codes[..., 16:] << 4)
    return packed


def relative_error(rounded: np.ndarray, exact: np.ndarray) -> float:
    """Worst group of 32 columns: largest |rounded - exact| over largest |exact|; a group of zeros counts by itself.

    Groups that the columns do not fill are padded with zeros.
    """
    pad = -exact.shape[1] % BLOCK
    difference, size = (
        np.pad(np.abs(a), ((0, 0), (0, pad))).reshape(len(a), -1, BLOCK).max(-1) for a in (rounded - exact, exact)
    )
    return float(np.max(difference / np.where(size > 0, size, 1), initial=0.0))
