"""The group adapter: a linear layer around a matrix of integers, W = s (q - z).

It trains D [N, groups], one number for each output row and group of input columns, 0 at the start. The layer computes
with s' = s (1 + D), kept away from 0 and rounded to what float16 represents, so the deployed kernel stays as it is. (In
the low-rank group form of QA-LoRA, Xu et al., arXiv 2309.14717, D is B A; here it is of full rank.)

All rounding happens in the forward pass, with the gradient going straight through: :func:`fold` writes
what the last forward pass used, to the bit. :func:`attach` puts an adapter on every linear of the decoder layers.
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import PreTrainedModel

from saap.base.errors import UserError
from saap.models.architectures import architecture_of
from saap.models.modeling_slim import GroupQuantLinear

SMALLEST_FACTOR = 0.05  # 1 + D stays positive: a group must not change its sign
LARGEST_FLOAT16 = 65504.0

Gradient = torch.Tensor | None


class GroupAdapterLayer(nn.Module):
    """A GroupQuantLinear with an adapter."""

    centred: torch.Tensor
    keeps_matrix = False  # between the passes of a step, where memory allows: see :func:`keep_matrices`
    _kept: tuple[object, torch.Tensor] | None = None

    def __init__(self, base: GroupQuantLinear) -> None:
        super().__init__()
        self.base = base
        self.factor = nn.Parameter(torch.zeros_like(base.scales))
        centred = base.centred()
        narrow = bool(centred.min() >= -128) and bool(centred.max() <= 127)
        self.register_buffer("centred", centred.to(torch.int8) if narrow else centred, persistent=False)

    def scales(self) -> torch.Tensor:
        """s' [N, groups], float32 under autocast too."""
        return float16_through(self.base.scales * (1 + self.factor).clamp_min(SMALLEST_FACTOR))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features], what the folded matrix gives."""
        y = self.product(x)
        return y if self.base.bias is None else y + self.base.bias.to(y.dtype)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """:func:`group_matmul` with the integers, by the matrix that is kept while the adapter is the same."""
        scales = self.scales()
        if not self.keeps_matrix:
            return group_matmul(x, self.centred, scales)
        dtype = product_dtype(x)
        versions = (dtype, *((id(p), p._version) for p in self.parameters() if p.requires_grad))
        if self._kept is None or self._kept[0] != versions:
            self._kept = None  # the old one goes before the new one is made
            with torch.no_grad():
                self._kept = versions, dequantized(self.centred, scales, dtype)
        return group_matmul(x, self.centred, scales, self._kept[1])


def attach(model: PreTrainedModel) -> None:
    """Put an adapter on every linear of the decoder layers, in place; all other parameters are frozen.

    Raises UserError: linears without integers.
    """
    holders = _holders(model)
    model.requires_grad_(False)
    for name, holder in holders.items():
        model.set_submodule(name, GroupAdapterLayer(holder))


def layers_of(model: nn.Module) -> dict[str, GroupAdapterLayer]:
    """Return the adapted linears by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, GroupAdapterLayer)}


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [layer.factor for layer in layers_of(model).values()]


def keep_matrices(model: nn.Module) -> None:
    """Let each layer keep its dequantised matrix until its adapter changes, instead of making it in each pass."""
    for layer in layers_of(model).values():
        layer.keeps_matrix = True


@torch.no_grad()
def fold(model: PreTrainedModel) -> None:
    """Write the trained scales into the integers' holders and put these back in place of the adapters."""
    for name, layer in layers_of(model).items():
        layer.base.scales = layer.scales()
        model.set_submodule(name, layer.base)


def _holders(model: PreTrainedModel) -> dict[str, GroupQuantLinear]:
    """Return the decoder layers' linears by name, all of integers."""
    architecture = architecture_of(model.config)
    inside = architecture.layers
    linears = {
        f"{inside}.{name}": module
        for name, module in model.get_submodule(inside).named_modules()
        if isinstance(module, nn.Linear | GroupQuantLinear) and not architecture.is_float(name)
    }
    holders = {name: module for name, module in linears.items() if isinstance(module, GroupQuantLinear)}
    if not linears or len(holders) < len(linears):
        plain = next(iter(linears.keys() - holders.keys()), "the model")
        raise UserError(f"{plain} holds no integers, which a group adapter is put on: quantise the model first")
    return holders


class Context(Protocol):
    """The state that torch keeps between the passes of an autograd function."""

    saved_tensors: tuple[torch.Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None:
        """They are :attr:`saved_tensors` in the backward pass."""


class _StraightThrough(torch.autograd.Function):
    """The second number, with the gradient going to the first; to the bit, as first + (second - first) is not."""

    @staticmethod
    def forward(ctx: Context, exact: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
        return rounded.clone()

    @staticmethod
    def backward(ctx: Context, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


def float16_through(exact: torch.Tensor) -> torch.Tensor:
    """Round to what float16 represents, finite; the gradient passes straight through."""
    rounded = exact.detach().clamp(-LARGEST_FLOAT16, LARGEST_FLOAT16).half().to(exact.dtype)
    return cast("torch.Tensor", _StraightThrough.apply(exact, rounded))


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the type of a matrix product with x: its own, or autocast's where that is on and x is eligible."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


def group_matmul(
    x: torch.Tensor, centred: torch.Tensor, scale: torch.Tensor, matrix: torch.Tensor | None = None
) -> torch.Tensor:
    """y = x (scale * centred)^T in :func:`product_dtype`.

    The matrix is dequantised in the scales' type and then rounded to that of the product: rounding the scales instead
    would hide small changes of them. Gradients of the scales are summed in their type.

    Args:
        x: [..., K].
        centred: [N, groups, block] integers.
        scale: [N, groups].
        matrix: what :func:`dequantized` gives for these, where it is known; else each pass makes it.

    Returns:
        [..., N].
    """
    return cast("torch.Tensor", _GroupMatMul.apply(x.to(product_dtype(x)), centred, scale, matrix))


class _GroupMatMul(torch.autograd.Function):
    """A matrix that is not given is made twice instead of being kept."""

    @staticmethod
    def forward(
        ctx: Context, x: torch.Tensor, centred: torch.Tensor, scale: torch.Tensor, matrix: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(x, centred, scale, matrix)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, dequantized(centred, scale, x.dtype) if matrix is None else matrix)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad: torch.Tensor) -> tuple[Gradient, None, Gradient, None]:
        x, centred, scale, matrix = ctx.saved_tensors
        for_x, _, for_scale, _ = ctx.needs_input_grad
        grad_x = grad_scale = None
        with torch.autocast(x.device.type, enabled=False):
            if for_x:
                grad_x = grad @ (dequantized(centred, scale, x.dtype) if matrix is None else matrix)
            if for_scale:
                grad_scale = matrix_gradient(grad, x, scale.dtype).view(centred.shape).mul_(centred).sum(-1)
        return grad_x, None, grad_scale, None


def matrix_gradient(grad: torch.Tensor, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """dL/dW [N, K] of y = x W^T in ``dtype``, from dL/dy [..., N] and x [..., K]."""
    return (grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])).to(dtype)


def dequantized(centred: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """scale * centred as a matrix [N, K]."""
    return centred.to(scale.dtype).mul_(scale.unsqueeze(-1)).flatten(1).to(dtype)
