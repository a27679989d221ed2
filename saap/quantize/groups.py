"""Group-wise integers in the layout of com.microsoft.MatMulNBits: W = scale * (q - zero_point).

A group is ``group_size`` consecutive input columns. Scales are rounded to numbers that float16 represents before the
integers are chosen, so that float32 and float16 runtimes hold one number. Codes and zero points are unsigned; zero is
always representable, as the unsigned zero point demands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from saap.base.errors import UserError
from saap.models.architectures import architecture_of
from saap.models.layer_walk import layers_of
from saap.models.modeling_slim import GroupQuantTable, TiedHead, quantize_modules
from saap.models.shape import ModelShape
from saap.models.slim_quant import MatrixForm, SlimQuant, check_matrices, module_form
from saap.models.streaming import present
from saap.quantize.bundle_size import other_groups

SMALLEST_SCALE = 6e-8  # the smallest positive float16; a group of zeros must not divide by zero
CHUNK, ROWS = 1 << 18, 1 << 16  # elements of a piece on a CPU, rows of one on a GPU
# How far the codes reach past the largest value, relative to it; below 1 clips it, a negative one flips the side that
# has the extra code. Clipping pays at 4 bit and not at 8.
RANGES = {4: (1.0, 1.06, 0.96, 0.92, 0.87, 0.82, -1.14, -1.05, -0.97, -0.9), 8: (1.0, 1.008)}


@dataclass(frozen=True)
class QuantMatrix:
    """Packed integers of a matrix [N, K].

    ``qweight`` [N, K/group_size, group_size*bits/8] uint8, low nibble first; ``scales`` [N, K/group_size] float32;
    ``zero_points`` [N, ceil(K/group_size*bits/8)] uint8.
    """

    qweight: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor
    bits: int
    group_size: int

    @property
    def form(self) -> MatrixForm:
        return MatrixForm(self.bits, self.group_size)

    PARTS: ClassVar[tuple[str, ...]] = ("qweight", "scales", "zero_points")

    @classmethod
    def stacked(cls, parts: Sequence[QuantMatrix]) -> QuantMatrix:
        """Matrices over the same input columns, one below the other."""
        qweight, scales, zero_points = (torch.cat([getattr(part, name) for part in parts]) for name in cls.PARTS)
        return cls(qweight, scales, zero_points, parts[0].bits, parts[0].group_size)

    def __getitem__(self, rows: slice | torch.Tensor) -> QuantMatrix:
        return replace(self, qweight=self.qweight[rows], scales=self.scales[rows], zero_points=self.zero_points[rows])

    def dequantize(self) -> torch.Tensor:
        """Return the numbers [N, K] float32 that the integers stand for."""
        rows, groups = self.scales.shape
        holder = GroupQuantTable(rows, groups * self.group_size, self.bits, self.group_size)
        fill(holder, self)
        return holder.dequantize()


@dataclass(frozen=True)
class IntegerForm:
    """Bits and group sizes of a model's matrices."""

    bits: int  # of the decoder layers' linears
    group_size: int
    head_bits: int
    own: Mapping[str, MatrixForm] = field(default_factory=dict)  # of the matrices that differ, by module name

    def linear(self, name: str) -> MatrixForm:
        return self.own.get(name, MatrixForm(self.bits, self.group_size))

    def vocabulary(self, name: str) -> MatrixForm:
        """Return the form of the embedding or the head."""
        return self.own.get(name, MatrixForm(self.head_bits, self.group_size))


def check_groups(columns: int, group_size: int, what: str) -> None:
    """Raise UserError when ``columns`` is not whole groups."""
    if columns % group_size:
        raise UserError(
            f"{what} has {columns} input columns, not a multiple of the group size {group_size}: "
            f"{other_groups(columns)}"
        )


def check_widths(shape: ModelShape, group_size: int) -> None:
    """Raise UserError when a matrix of the model does not have whole groups."""
    check_groups(shape.hidden, group_size, "the hidden size")
    for index, sizes in enumerate(shape.layers):
        for kind in sizes.blocks:
            name = {"attention": "o_proj", "ffn": "down_proj"}.get(kind.name, f"out_proj of {kind.label}")
            check_groups(shape.inner_width(kind, sizes), group_size, f"{name} of layer {index}")


def quantize(weight: torch.Tensor, bits: int, group_size: int) -> QuantMatrix:
    """Quantise a matrix [N, K] without data: in each group, the scale with the least squared error."""
    check_groups(weight.shape[1], group_size, "a matrix")
    groups = weight.detach().float().view(weight.shape[0], -1, group_size)
    scale, half = best_scales(groups, bits), 2 ** (bits - 1)
    codes = torch.round(groups / scale.unsqueeze(-1)).add_(half).clamp_(0, 2 * half - 1).to(torch.uint8)
    return QuantMatrix(pack_codes(codes, bits), scale, middle_zero_points(scale, bits), bits, group_size)


def best_scales(groups: torch.Tensor, bits: int, importance: torch.Tensor | None = None) -> torch.Tensor:
    """Choose the scale of each group, float16-representable: the best of a small grid of ranges.

    A range has one code more below zero than above: the scale's sign puts it where the group's largest value is, or on
    the other side where that leaves less error.

    Args:
        groups: [N, groups, group_size].
        importance: [group_size] weight of each column's squared error; None weighs all the same.

    Returns scales [N, groups], float32.
    """
    rows = max(1, CHUNK // groups[0].numel()) if groups.device.type == "cpu" else ROWS  # pieces that stay in the cache
    return torch.cat([_best_scales(piece, bits, importance) for piece in groups.split(rows)])


def _best_scales(groups: torch.Tensor, bits: int, importance: torch.Tensor | None) -> torch.Tensor:
    half = 2 ** (bits - 1)
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)
    best = groups.new_full(groups.shape[:-1], torch.inf)
    scales = torch.ones_like(best)
    for range_ in RANGES[bits]:
        scale = _float16(largest / (-half * range_))
        exact = groups / scale.unsqueeze(-1)
        error = exact.round().clamp_(-half, half - 1).sub_(exact).square_()  # of the codes
        total = error.sum(-1) if importance is None else error.flatten(0, -2).mv(importance).view(best.shape)
        total *= scale.square()
        better = total < best
        best, scales = torch.where(better, total, best), torch.where(better, scale, scales)
    return scales


def middle_zero_points(scales: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack zero points of 2^(bits-1) for scales [N, groups]; kernels need not read them."""
    return pack_zero_points(torch.full_like(scales, 2 ** (bits - 1), dtype=torch.uint8), bits)


def _float16(scale: torch.Tensor) -> torch.Tensor:
    """Round to what float16 holds; never 0, so that a group of zeros divides."""
    size = scale.abs().clamp_min(SMALLEST_SCALE).half().float()
    return torch.where(scale < 0, -size, size)


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """[N, groups, group_size] uint8 codes -> [N, groups, group_size*bits/8] uint8, low nibble first."""
    return codes.contiguous() if bits == 8 else codes[..., 0::2] | (codes[..., 1::2] << 4)


def pack_zero_points(zero: torch.Tensor, bits: int) -> torch.Tensor:
    """[N, groups] uint8 -> [N, ceil(groups*bits/8)] uint8, low nibble first; an odd last nibble is padded with 0."""
    if bits == 8:
        return zero.contiguous()
    if zero.shape[1] % 2:
        zero = torch.nn.functional.pad(zero, (0, 1))
    return zero[:, 0::2] | (zero[:, 1::2] << 4)


def nearest_matrices(model: PreTrainedModel, form: IntegerForm) -> dict[str, QuantMatrix]:
    """Integers of every linear, the embedding and the head, each by itself; module name -> integers."""
    architecture = architecture_of(model.config)
    matrices: dict[str, QuantMatrix] = {}
    for index, layer in enumerate(layers_of(model)):
        with present(layer):
            for name, linear in layer.named_modules():
                if isinstance(linear, nn.Linear) and not architecture.is_float(name):
                    full = f"{architecture.layers}.{index}.{name}"
                    matrices[full] = quantize(linear.weight, *form.linear(full))
    for name in architecture.tables:
        matrices[name] = quantize(model.get_parameter(f"{name}.weight"), *form.vocabulary(name))
    return matrices


def quantize_model(
    model: PreTrainedModel,
    bits: int,
    group_size: int,
    embedding_bits: int,
    matrices: Mapping[str, QuantMatrix] | None = None,
    own: Mapping[str, MatrixForm] | None = None,
) -> SlimQuant:
    """Replace linears, embedding and head by holders of integers, in place.

    Args:
        matrices: integers by module name; those that are not named are chosen without data.
        own: by module name, the form of matrices that hold other than ``bits`` and ``group_size``; those in
            ``matrices`` hold what is there.

    Returns the ``slim_quant`` entry of the config (:mod:`saap.models.slim_quant`).

    Raises:
        UserError: widths that are not whole groups, or forms that one matrix of a graph cannot hold.
        ValueError: a matrix of other bits or groups than its module is to hold.
    """
    architecture = architecture_of(model.config)
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    originals = {name: linear for name, linear in linears.items() if not architecture.is_float(name)}
    table, head = (model.get_submodule(name) for name in (architecture.embedding, architecture.head))
    quant: SlimQuant = {
        "bits": bits, "block": group_size, "embedding_bits": embedding_bits, "tied": head.weight is table.weight,
    }  # fmt: skip
    tables: dict[str, nn.Module] = {name: model.get_submodule(name) for name in architecture.tables}
    tables.pop(architecture.head)
    inside = {name for name in originals if name.startswith(architecture.layers)}
    forms = {name: matrix.form for name, matrix in sorted((matrices or {}).items())} | dict(own or {})
    in_vocabulary = architecture.tables
    if own_bits := {name: form.bits for name, form in forms.items() if form.bits != bits and name not in in_vocabulary}:
        quant["matrices"] = own_bits
    if blocks := {name: form.group_size for name, form in forms.items() if form.group_size != group_size}:
        quant["blocks"] = blocks
    check_matrices(quant, architecture, inside)
    for name, linear in originals.items():
        check_groups(linear.in_features, module_form(quant, architecture, name).group_size, name)
    quantize_modules(model, quant)
    for name, holder in model.named_modules():
        if isinstance(holder, TiedHead) or not isinstance(holder, GroupQuantTable):
            continue
        source: nn.Module = tables.get(name) or originals[name]
        known = (matrices or {}).get(name)
        fill(holder, quantize(source.get_parameter("weight"), holder.bits, holder.block) if known is None else known)
        if getattr(source, "bias", None) is not None:
            holder.bias = source.bias
    return quant


def fill(holder: GroupQuantTable, matrix: QuantMatrix) -> None:
    """Put integers into a module."""
    if (holder.bits, holder.block) != (matrix.bits, matrix.group_size):
        raise ValueError(
            f"integers of {matrix.bits} bits in groups of {matrix.group_size} are given to a module of {holder.bits} "
            f"bits in groups of {holder.block}"
        )
    holder.qweight, holder.scales, holder.zero_points = matrix.qweight, matrix.scales, matrix.zero_points
