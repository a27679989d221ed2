"""LoRA that sees its own rounding: fake-quantised in every forward pass, re-rounded to integers at the end.

The reference that group adapters are measured against. Float weights W stay, LoRA moves them, and what is multiplied is
always a matrix of integers on the groups' grid of scales s and zero points z:

    W_q = s' (clip(round((W + B A alpha / r) / s) + z, 0, 2^bits - 1) - z),  s' = s (1 + D)

The gradient passes the rounding straight through (Bengio et al., arXiv 1308.3432) where a code is not clipped; s inside
the rounding stays, so that D, one number per group, only scales. A [r, K], B [N, r] and D are trained.

No PEFT layer: what comes out are integers, and a saved LoRA would load on the float model without a word and leave out
the rounding and D.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import PreTrainedModel

from saap.errors import SaapError
from saap.group_folds import SMALLEST_FACTOR
from saap.group_matmul import float16_through, matrix_gradient, product_dtype
from saap.group_quant import QuantMatrix, pack_codes, pack_zero_points
from saap.modeling_slim import unpack_zero_points


class _RoundedMatMul(torch.autograd.Function):
    """y = x W_q^T; the rounded matrix and the weight gradient are made and freed per matrix."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, grid: _Grid, a: torch.Tensor, b: torch.Tensor, scales: torch.Tensor
    ) -> torch.Tensor:
        ctx.grid = grid
        ctx.save_for_backward(x, a, b, scales)
        with torch.autocast(x.device.type, enabled=False):
            numbers = grid.codes(a, b).sub_(grid.zeros.unsqueeze(-1)).mul_(scales.unsqueeze(-1))
            return F.linear(x, numbers.flatten(1).to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, None, torch.Tensor, torch.Tensor, torch.Tensor]:
        x, a, b, scales = ctx.saved_tensors
        grid: _Grid = ctx.grid
        with torch.autocast(x.device.type, enabled=False):
            unclipped = grid.codes(a, b, clip=False)
            inside = (unclipped >= 0) & (unclipped <= grid.top)
            centred = unclipped.clamp_(0, grid.top).sub_(grid.zeros.unsqueeze(-1))
            grad_x = None
            if ctx.needs_input_grad[0]:
                grad_x = grad @ (centred * scales.unsqueeze(-1)).flatten(1).to(x.dtype)
            weight_grad = matrix_gradient(grad, x, scales.dtype).view(centred.shape)
            grad_scales = (centred.mul_(weight_grad)).sum(-1)
            latent_grad = weight_grad.mul_(inside).mul_((scales / grid.scales).unsqueeze(-1)).flatten(1)
            grad_a = (b.t() @ latent_grad).mul_(grid.scaling)
            grad_b = (latent_grad @ a.t()).mul_(grid.scaling)
        return grad_x, None, grad_a, grad_b, grad_scales


class _Grid(nn.Module):
    """What does not move: the float weights, and the grid that they are rounded to."""

    latent: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor

    def __init__(self, weight: torch.Tensor, start: QuantMatrix, scaling: float) -> None:
        super().__init__()
        self.bits, self.block, self.top, self.scaling = start.bits, start.block, 2**start.bits - 1, scaling
        zeros = unpack_zero_points(start.zero_points, start.bits, start.scales.shape[1])
        # Not saved: the model and its integers bring them.
        self.register_buffer("latent", weight.detach(), persistent=False)
        self.register_buffer("scales", start.scales, persistent=False)
        self.register_buffer("zeros", zeros.to(start.scales.dtype), persistent=False)

    def codes(self, a: torch.Tensor, b: torch.Tensor, clip: bool = True) -> torch.Tensor:
        """The integers [N, groups, block], as floats."""
        moved = torch.addmm(self.latent.to(a.dtype), b, a, alpha=self.scaling)
        moved = moved.view(*self.scales.shape, self.block)
        codes = moved.div_(self.scales.unsqueeze(-1)).round_().add_(self.zeros.unsqueeze(-1))
        return codes.clamp_(0, self.top) if clip else codes


class RoundedLoraLayer(nn.Module):
    """Stands for an ``nn.Linear``: a LoRA whose sum with the weights is rounded in every forward pass."""

    def __init__(
        self, linear: nn.Linear, start: QuantMatrix, rank: int, alpha: float | None = None, train_scales: bool = True
    ) -> None:
        """Take over a linear.

        Args:
            linear: its weight [N, K], float32 or bfloat16, is the latent one.
            start: the grid: scales and zero points; its integers are not looked at.
            alpha: None is ``rank``.
            train_scales: whether D is trained.
        """
        super().__init__()
        self.bias = linear.bias
        self.grid = _Grid(linear.weight, start, (alpha or rank) / rank)
        rows, columns = linear.weight.shape
        place: dict[str, Any] = {"device": linear.weight.device, "dtype": start.scales.dtype}
        self.a = nn.Parameter(torch.empty(rank, columns, **place))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        self.b = nn.Parameter(torch.zeros(rows, rank, **place))
        self.delta = nn.Parameter(torch.zeros_like(start.scales), requires_grad=train_scales)

    def scales(self) -> torch.Tensor:
        """s' [N, groups], of numbers that float16 represents."""
        return float16_through(self.grid.scales * (1 + self.delta).clamp_min(SMALLEST_FACTOR))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        y = _RoundedMatMul.apply(x.to(product_dtype(x)), self.grid, self.a, self.b, self.scales())
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @torch.no_grad()
    def matrix(self) -> QuantMatrix:
        """The integers and scales of the forward pass."""
        grid = self.grid
        codes = pack_codes(grid.codes(self.a, self.b).to(torch.uint8), grid.bits)
        return QuantMatrix(
            codes, self.scales(), pack_zero_points(grid.zeros.to(torch.uint8), grid.bits), grid.bits, grid.block
        )


def attach_rounded(
    model: PreTrainedModel,
    starts: Mapping[str, QuantMatrix],
    rank: int,
    alpha: float | None = None,
    *,
    train_scales: bool = True,
    seed: int = 0,
) -> None:
    """Replace linears by layers that round, in place; all other parameters are frozen.

    Args:
        starts: by module name, the grid of each linear that is replaced.
        seed: of the A matrices, apart from torch's global one.

    Raises:
        SaapError: a name that is no linear, a grid of other sizes, or a rank below 1.
    """
    if rank < 1:
        raise SaapError(f"rank {rank} is not possible for LoRA: give 1 or more")
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    for name, start in starts.items():
        if name not in linears:
            raise SaapError(f"{name} is no floating-point linear of the model: give names of linears")
        rows, columns = linears[name].weight.shape
        if (rows, columns // start.block) != tuple(start.scales.shape) or columns % start.block:
            raise SaapError(f"the groups of {name} are {tuple(start.scales.shape)}, its matrix is {rows} x {columns}")
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, start in starts.items():
            model.set_submodule(name, RoundedLoraLayer(linears[name], start, rank, alpha, train_scales))


def fold_rounded(model: PreTrainedModel) -> dict[str, QuantMatrix]:
    """Put linears back, their weights the numbers of the last forward pass, in place.

    Returns:
        the integers by module name, as :func:`saap.group_quant.quantize_model` takes them.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, RoundedLoraLayer)}
    matrices = {name: layer.matrix() for name, layer in layers.items()}
    for name, layer in layers.items():
        rows, columns = layer.grid.latent.shape
        linear = nn.Linear(columns, rows, bias=layer.bias is not None, device="meta")
        linear.weight = nn.Parameter(matrices[name].dequantize().to(layer.grid.latent.device), requires_grad=False)
        linear.bias = layer.bias
        model.set_submodule(name, linear)
    return matrices
