from __future__ import annotations

import pytest
import torch

from saap.tune.adapters.matmul import float16_through, group_matmul, whole_through

GENERATOR = torch.Generator().manual_seed(0)
CENTRED = torch.randint(-8, 8, (7, 2, 32), generator=GENERATOR).to(torch.int8)


def numbers(dtype=torch.float64):
    x = torch.randn(2, 5, 64, generator=GENERATOR, dtype=dtype, requires_grad=True)
    scale = (torch.rand(7, 2, generator=GENERATOR, dtype=dtype) + 0.5).requires_grad_()
    shift = torch.randint(-3, 4, (7, 2), generator=GENERATOR).to(dtype).requires_grad_()
    return x, scale, shift


def dense(scale, shift):
    return ((CENTRED + shift.unsqueeze(-1)) * scale.unsqueeze(-1)).flatten(1)


def test_gradients_are_those_of_the_dequantised_matrix():
    x, scale, shift = numbers()
    assert torch.autograd.gradcheck(lambda a, s: group_matmul(a, CENTRED, s), (x, scale))
    assert torch.autograd.gradcheck(lambda a, s, z: group_matmul(a, CENTRED, s, z), (x, scale, shift))
    assert torch.autograd.gradcheck(lambda s: group_matmul(x.detach(), CENTRED, s), (scale,))
    assert torch.autograd.gradcheck(lambda a: group_matmul(a, CENTRED, scale.detach(), shift.detach()), (x,))
    assert torch.allclose(group_matmul(x, CENTRED, scale, shift), x @ dense(scale, shift).T)


def test_nothing_of_the_matrix_size_is_kept_but_the_codes():
    x, scale, shift = numbers(torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        group_matmul(x, CENTRED, scale, shift).sum().backward()
    large = [t for t in kept if t.numel() >= CENTRED.numel() and t.shape != x.shape]
    assert [t.data_ptr() for t in large] == [CENTRED.data_ptr()]


def test_autocast_multiplies_in_bfloat16_and_sums_gradients_in_float32():
    x, scale, shift = numbers(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = group_matmul(x, CENTRED, scale, shift)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, torch.nn.functional.linear(x, dense(scale, shift)))
    y.float().square().sum().backward()  # outside of autocast, as a training loop does
    found = [t.grad for t in (x, scale, shift)]
    for tensor in (x, scale, shift):
        tensor.grad = None
    group_matmul(x, CENTRED, scale, shift).square().sum().backward()
    for low, tensor in zip(found, (x, scale, shift), strict=True):
        assert low.dtype == torch.float32
        assert 0 < (low - tensor.grad).norm() < 0.02 * tensor.grad.norm()


@pytest.mark.parametrize("value", [0.1, 1e5, -1e5, 3e-8, 1e-9])
def test_rounding_is_exact_finite_and_transparent_to_gradients(value):
    exact = torch.full((3,), value, requires_grad=True)
    rounded = float16_through(exact)
    assert torch.equal(rounded, rounded.half().float()) and torch.isfinite(rounded.half()).all()
    assert torch.equal(rounded, exact.detach().half().float().clamp(-65504, 65504))
    (2 * rounded).sum().backward()
    assert torch.equal(exact.grad, torch.full((3,), 2.0))


def test_whole_numbers_stay_in_range_and_pass_gradients_inside():
    exact = torch.tensor([-1.0, 0.0, 0.4, 2.6, 15.0, 15.2], requires_grad=True)
    whole = whole_through(exact, 15)
    assert whole.tolist() == [0, 0, 0, 3, 15, 15]
    whole.sum().backward()
    assert exact.grad.tolist() == [0, 1, 1, 1, 1, 0]
