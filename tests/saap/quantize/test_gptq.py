"""Integers whose errors are compensated, against rounding to nearest."""

import pytest
import torch

from saap.base.errors import UserError
from saap.models.checkpoint import load_model
from saap.models.slim_quant import MatrixForm
from saap.quantize import gptq as module
from saap.quantize.gptq import compensated_matrices, gptq, inverse_factor
from saap.quantize.groups import IntegerForm, quantize, quantize_model

GENERATOR = torch.Generator().manual_seed(3)
# Inputs that depend on one another, as a model's do: without that there is nothing to compensate with.
INPUTS = torch.randn(400, 24, generator=GENERATOR) @ torch.randn(24, 96, generator=GENERATOR)
INPUTS += 0.1 * torch.randn(400, 96, generator=GENERATOR)
WEIGHT = torch.randn(40, 96, generator=GENERATOR)
IDS = torch.randint(320, (20, 40), generator=torch.Generator().manual_seed(5))


def output_error(matrix):
    return (INPUTS @ (matrix.dequantize() - WEIGHT).t()).square().mean().item()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [32, 96])
def test_the_output_error_is_far_below_that_of_rounding(bits, block):
    hessian = INPUTS.t() @ INPUTS
    compensated = gptq(WEIGHT, hessian, bits, block)
    assert output_error(compensated) < 0.5 * output_error(quantize(WEIGHT, bits, block))
    assert (compensated.zero_points == (0x88 if bits == 4 else 0x80)).logical_or(compensated.zero_points == 8).all()


def test_independent_inputs_leave_rounding_as_it_is():
    weight = torch.arange(-8.0, 8).repeat(4, 6)  # on the grid: nothing to compensate
    assert torch.equal(gptq(weight, torch.eye(96), 4, 32).dequantize(), weight)


def test_an_input_that_is_always_zero_does_not_spoil_the_others():
    inputs = INPUTS.clone()
    inputs[:, 5] = 0
    matrix = gptq(WEIGHT, inputs.t() @ inputs, 4, 32)
    assert torch.isfinite(matrix.dequantize()).all()
    error, rounded = (
        (inputs @ (m.dequantize() - WEIGHT).t()).square().mean() for m in (matrix, quantize(WEIGHT, 4, 32))
    )
    assert error < 0.5 * rounded


def test_inputs_that_are_not_finite_are_refused():
    with pytest.raises(UserError, match="not finite"):
        gptq(WEIGHT, torch.full((96, 96), torch.nan), 4, 32)


def test_the_factor_is_that_of_the_inverse():
    hessian = INPUTS.t() @ INPUTS
    damped = hessian.double() + module.DAMPING * hessian.double().diagonal().mean() * torch.eye(96)
    expected = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    found = inverse_factor(hessian)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=2e-5 * float(expected.abs().max()))
    assert torch.equal(found, found.triu()) and torch.equal(hessian, INPUTS.t() @ INPUTS)


@pytest.mark.parametrize(("columns", "block"), [(512, 32), (576, 48), (1024, 512)])
def test_errors_that_travel_in_batches_arrive_as_column_by_column(columns, block):
    weight = torch.randn(8, columns, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    inputs = torch.randn(2000, columns, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    inputs += inputs.roll(1, dims=1)
    hessian = (inputs.t() @ inputs).float()
    matrix = gptq(weight.float(), hessian, 8, block)
    factor, rounded = inverse_factor(hessian).double(), matrix.dequantize().double()
    steps = matrix.scales.double().abs().repeat_interleave(block, 1)
    rest = weight.clone()
    for k in range(columns):
        gap = rest[:, k] - rounded[:, k]
        assert ((gap.abs() <= 0.51 * steps[:, k]) | (rounded[:, k].abs() >= 127 * steps[:, k])).all(), k
        rest[:, k + 1 :] -= gap[:, None] / factor[k, k] * factor[k, k + 1 :]


def test_a_vocabulary_is_rounded_in_pieces(monkeypatch):
    whole = gptq(WEIGHT, INPUTS.t() @ INPUTS, 4, 32)
    monkeypatch.setattr(module, "ROWS", 10)
    pieces = gptq(WEIGHT, INPUTS.t() @ INPUTS, 4, 32)
    assert all(torch.equal(getattr(whole, part), getattr(pieces, part)) for part in whole.PARTS)


def test_linears_that_are_fed_alike_share_one_factor(tiny_model, monkeypatch):
    model = load_model(tiny_model())
    made = []
    monkeypatch.setattr(module, "inverse_factor", lambda h: made.append(h) or inverse_factor(h))
    found = compensated_matrices(model, IDS, IntegerForm(4, 32, 4))
    assert len(made) == 4 * 3 + 1  # q, k and v; o; gate and up; down: of three layers, and the head
    assert len(found) == 7 * 3 + 2


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_is_closer_to_itself_than_after_rounding(tiny_model, tied):
    path = tiny_model(tie_word_embeddings=tied)
    model, nearest = load_model(path), load_model(path)
    with torch.inference_mode():
        expected = load_model(path)(input_ids=IDS).logits
    matrices = compensated_matrices(model, IDS, IntegerForm(4, 32, 4))
    with torch.inference_mode():
        walked = model(input_ids=IDS).logits
    held = load_model(path)
    quantize_model(held, 4, 32, 4, matrices)
    quantize_model(nearest, 4, 32, 4)
    with torch.inference_mode():
        found, rounded = held(input_ids=IDS).logits, nearest(input_ids=IDS).logits
    gain = (found - expected).square().mean() / (rounded - expected).square().mean()
    assert gain < 0.9
    assert len(matrices) == 3 * 7 + 2
    # The walk leaves the same numbers in the layers; the head and the table are replaced at the end only.
    name = "model.layers.2.mlp.down_proj"
    assert torch.equal(model.get_submodule(name).weight, matrices[name].dequantize())
    assert walked.shape == found.shape


def test_a_model_s_matrices_have_their_own_form(tiny_model):
    model = load_model(tiny_model())
    down = "model.layers.1.mlp.down_proj"
    matrices = compensated_matrices(model, IDS[:8], IntegerForm(4, 32, 8, {down: MatrixForm(8, 64)}))
    assert {name: m.bits for name, m in matrices.items() if m.bits == 8} == {
        down: 8, "lm_head": 8, "model.embed_tokens": 8
    }  # fmt: skip
    assert {name for name, m in matrices.items() if m.group_size == 64} == {down}
    assert (matrices["lm_head"].zero_points == 128).all()
