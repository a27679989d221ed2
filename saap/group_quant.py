"""Group-wise integers in the layout of com.microsoft.MatMulNBits: W = scale * (q - zero_point).

Groups are ``block`` consecutive input columns. Scales are rounded to numbers that float16 represents before the
integers are chosen, so that float32 and float16 runtimes hold one number. Codes and zero points are unsigned; zero is
always representable, as the unsigned zero point demands.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from saap.architectures import architecture_of
from saap.errors import SaapError
from saap.modeling_slim import GroupQuantTable, TiedHead, quantize_modules

SMALLEST_SCALE = 6e-8  # the smallest positive float16; a group of zeros must not divide by zero


@dataclass(frozen=True)
class QuantMatrix:
    """Packed integers of a matrix [N, K].

    ``qweight`` [N, K/block, block*bits/8] uint8, low nibble first; ``scales`` [N, K/block] float32;
    ``zero_points`` [N, ceil(K/block*bits/8)] uint8.
    """

    qweight: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor
    bits: int
    block: int

    PARTS: ClassVar[tuple[str, ...]] = ("qweight", "scales", "zero_points")


def check_blocks(columns: int, block: int, what: str) -> None:
    """Raise SaapError when ``columns`` is not whole groups."""
    if columns % block:
        raise SaapError(
            f"{what} has {columns} input columns, not a multiple of the group size {block}: choose a group "
            f"size that divides it (32, 64 or 128)"
        )


def quantize(weight: torch.Tensor, bits: int, block: int, symmetric: bool = False) -> QuantMatrix:
    """Round-to-nearest quantisation of a matrix [N, K]."""
    check_blocks(weight.shape[1], block, "a matrix")
    groups = weight.detach().float().view(weight.shape[0], -1, block)
    top = 2**bits - 1
    if symmetric:
        scale = groups.abs().amax(-1) / (2 ** (bits - 1) - 1)
        scale = _float16(scale)
        zero = torch.full_like(scale, 2 ** (bits - 1))
    else:
        low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
        scale = _float16((high - low) / top)
        zero = torch.round(-low / scale).clamp_(0, top)
    codes = torch.round(groups / scale.unsqueeze(-1)).add_(zero.unsqueeze(-1)).clamp_(0, top).to(torch.uint8)
    return QuantMatrix(pack_codes(codes, bits), scale, pack_zero_points(zero.to(torch.uint8), bits), bits, block)


def _float16(scale: torch.Tensor) -> torch.Tensor:
    return scale.clamp_min(SMALLEST_SCALE).half().float()


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """[N, groups, block] uint8 codes -> [N, groups, block*bits/8] uint8, low nibble first."""
    return codes.contiguous() if bits == 8 else codes[..., 0::2] | (codes[..., 1::2] << 4)


def pack_zero_points(zero: torch.Tensor, bits: int) -> torch.Tensor:
    """[N, groups] uint8 -> [N, ceil(groups*bits/8)] uint8, low nibble first; an odd last nibble is padded with 0."""
    if bits == 8:
        return zero.contiguous()
    if zero.shape[1] % 2:
        zero = torch.nn.functional.pad(zero, (0, 1))
    return zero[:, 0::2] | (zero[:, 1::2] << 4)


def quantize_model(model: PreTrainedModel, bits: int, block: int, embedding_bits: int) -> dict[str, int | bool]:
    """Replace linears, embedding and head by holders of round-to-nearest integers, in place.

    Returns:
        the ``slim_quant`` entry of the config.
    """
    architecture = architecture_of(model.config)
    originals = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    table: Any = model.get_submodule(architecture.embedding)
    head: Any = model.get_submodule(architecture.head)
    quant = {"bits": bits, "block": block, "embedding_bits": embedding_bits, "tied": head.weight is table.weight}
    for name, linear in originals.items():
        check_blocks(linear.in_features, block, name)
    quantize_modules(model, quant)
    for name, holder in model.named_modules():
        if isinstance(holder, TiedHead) or not isinstance(holder, GroupQuantTable):
            continue
        of_vocabulary = name in (architecture.embedding, architecture.head)
        source: Any = table if name == architecture.embedding else originals[name]
        fill(holder, quantize(source.weight, holder.bits, block, symmetric=of_vocabulary))
        if getattr(source, "bias", None) is not None:
            holder.bias = source.bias
    return quant


def round_model(model: PreTrainedModel, bits: int, block: int, embedding_bits: int) -> None:
    """Give linears, embedding and head the numbers that round-to-nearest integers hold, in place, of any family."""
    architecture = architecture_of(model.config)
    vocabulary = (architecture.embedding, architecture.head)
    for name, module in model.named_modules():
        tied = name == architecture.head and module.weight is model.get_input_embeddings().weight
        if tied or not isinstance(module, nn.Linear | nn.Embedding):
            continue
        own_bits, of_vocabulary = (embedding_bits, True) if name in vocabulary else (bits, False)
        check_blocks(module.weight.shape[1], block, name)
        matrix = quantize(module.weight, own_bits, block, symmetric=of_vocabulary)
        rows, columns = module.weight.shape
        holder = GroupQuantTable(rows, columns, own_bits, block)
        fill(holder, matrix)
        module.weight.data = holder.dequantize()


def fill(holder: GroupQuantTable, matrix: QuantMatrix) -> None:
    """Put integers into a module."""
    holder.qweight, holder.scales, holder.zero_points = matrix.qweight, matrix.scales, matrix.zero_points
