"""Products with matrices that are held as integers in groups, differentiable in what their groups share.

A matrix is W = s (c + shift): c [N, groups, block] whole numbers, q - zero_point, that stay; s [N, groups] its scales,
shift [N, groups] what its zero points moved by. Its numbers [N, K] and the gradient of them exist for one product at a
time: between forward and backward nothing of that size is kept but the codes, which the module owns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

LARGEST_FLOAT16 = 65504.0


class _StraightThrough(torch.autograd.Function):
    """The second number, with the gradient going to the first; to the bit, as first + (second - first) is not."""

    @staticmethod
    def forward(ctx: Any, exact: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
        return rounded.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


def float16_through(exact: torch.Tensor) -> torch.Tensor:
    """Rounded to what float16 represents, finite; the gradient passes straight through."""
    rounded = exact.detach().clamp(-LARGEST_FLOAT16, LARGEST_FLOAT16).half().to(exact.dtype)
    return _StraightThrough.apply(exact, rounded)


def whole_through(exact: torch.Tensor, top: int) -> torch.Tensor:
    """Rounded to a whole number of 0 .. top; the gradient passes where the number is inside or on the border."""
    # Not clamp's own gradient, which from torch 2.15 on stops at the border, where zero points start.
    inside = torch.where((exact >= 0) & (exact <= top), exact, exact.detach().clamp(0, top))
    return _StraightThrough.apply(inside, inside.detach().round())


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """What a matrix product with x is computed in: its own type, or autocast's where that is on and x is eligible."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


def group_matmul(
    x: torch.Tensor, centred: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor | None = None
) -> torch.Tensor:
    """y = x (scale * (centred + shift))^T in :func:`product_dtype`.

    The matrix is dequantised in the scales' type and then rounded to that of the product: rounding the scales instead
    would hide small changes of them. Gradients of scale and shift are summed in the scales' type.

    Args:
        x: [..., K].
        centred: [N, groups, block] integers.
        scale: [N, groups].
        shift: [N, groups]; None is 0.

    Returns:
        [..., N].
    """
    return _GroupMatMul.apply(x.to(product_dtype(x)), centred, scale, shift)


class _GroupMatMul(torch.autograd.Function):
    """The dequantised matrix is made twice instead of being kept."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, centred: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(x, centred, scale, shift)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, _dequantize(centred, scale, shift, x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, None, torch.Tensor | None, Any]:
        x, centred, scale, shift = ctx.saved_tensors
        for_x, _, for_scale, for_shift = ctx.needs_input_grad
        grad_x = grad_scale = grad_shift = None
        with torch.autocast(x.device.type, enabled=False):
            if for_x:
                grad_x = grad @ _dequantize(centred, scale, shift, x.dtype)
            if for_scale or for_shift:
                weight_grad = matrix_gradient(grad, x, scale.dtype).view(centred.shape)
                sums = weight_grad.sum(-1) if shift is not None else None
                if for_shift:
                    grad_shift = scale * sums
                if for_scale:
                    grad_scale = weight_grad.mul_(centred).sum(-1)
                    if sums is not None:
                        grad_scale += shift * sums
        return grad_x, None, grad_scale, grad_shift


def matrix_gradient(grad: torch.Tensor, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Of y = x W^T: dL/dW [N, K] in ``dtype``, from dL/dy [..., N] and x [..., K]."""
    return (grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])).to(dtype)


def _dequantize(
    centred: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    numbers = centred.to(scale.dtype)
    if shift is not None:
        numbers += shift.unsqueeze(-1)
    return numbers.mul_(scale.unsqueeze(-1)).flatten(1).to(dtype)
