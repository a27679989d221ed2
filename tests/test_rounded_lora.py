from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from saap.checkpoint import load_model
from saap.errors import SaapError
from saap.group_quant import QuantMatrix, quantize, quantize_model
from saap.modeling_slim import GroupQuantLinear, unpack_codes, unpack_zero_points
from saap.rounded_lora import RoundedLoraLayer, attach_rounded, fold_rounded

GENERATOR = torch.Generator().manual_seed(0)
IDS = torch.randint(320, (2, 12), generator=GENERATOR)


def layer_of(bits=4, symmetric=False, dtype=torch.float32, rank=3, alpha=6, **options):
    linear = torch.nn.Linear(64, 7).to(dtype)
    linear.weight.data = torch.randn(7, 64, generator=GENERATOR).to(dtype)
    layer = RoundedLoraLayer(linear, quantize(linear.weight, bits, 32, symmetric), rank, alpha, **options)
    return linear, layer


def spread(layer, size=0.1):
    for parameter in (layer.a, layer.b, layer.delta):
        parameter.data += size * torch.randn(parameter.shape, generator=GENERATOR, dtype=parameter.dtype)


def by_hand(layer, x, weight):
    """The docstring's formula with detached roundings, for autograd to derive."""
    start, zeros = layer.grid.scales.unsqueeze(-1), layer.grid.zeros.unsqueeze(-1)
    moved = (weight + 2 * layer.b @ layer.a).view(7, 2, 32) / start
    codes = moved + (moved.detach().round() - moved.detach()) + zeros
    # clamp, with the gradient passing at the border in every torch
    codes = torch.where((codes < 0) | (codes > layer.grid.top), codes.detach().clamp(0, layer.grid.top), codes)
    scales = layer.grid.scales * (1 + layer.delta).clamp_min(0.05)
    scales = scales + (scales.detach().half().to(scales.dtype) - scales.detach())
    return x @ ((codes - zeros) * scales.unsqueeze(-1)).flatten(1).T


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_output_and_gradients_are_those_of_the_formula(bits, symmetric):
    linear, layer = layer_of(bits, symmetric)
    layer.double()
    spread(layer)
    x = torch.randn(2, 5, 64, generator=GENERATOR, dtype=torch.float64, requires_grad=True)
    weight = linear.weight.detach().double()
    unclipped = layer.grid.codes(layer.a.detach(), layer.b.detach(), clip=False)
    clipped = (unclipped < 0) | (unclipped > layer.grid.top)
    assert 0 < clipped.sum() < clipped.numel() / 2  # so that both kinds are tested
    inputs = [x, layer.a, layer.b, layer.delta]
    seed = torch.randn(2, 5, 7, generator=GENERATOR, dtype=torch.float64)
    expected = by_hand(layer, x, weight)
    assert torch.allclose(layer(x), expected + linear.bias)
    for ours, theirs in zip(
        torch.autograd.grad(layer(x), inputs, seed), torch.autograd.grad(expected, inputs, seed), strict=True
    ):
        assert torch.allclose(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_starts_at_the_rounded_weights(dtype):
    linear, layer = layer_of(dtype=dtype)
    start = quantize(linear.weight, 4, 32, symmetric=False)
    for part in QuantMatrix.PARTS:
        assert torch.equal(getattr(layer.matrix(), part), getattr(start, part)), part
    x = torch.randn(3, 64, generator=GENERATOR)
    assert torch.allclose(layer(x), F.linear(x, start.dequantize(), linear.bias.float()), atol=1e-6)


def test_scales_can_stay():
    _, layer = layer_of(train_scales=False)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["bias", "a", "b"]
    layer(torch.randn(3, 64, generator=GENERATOR)).sum().backward()
    assert layer.delta.grad is None and layer.b.grad.abs().sum() > 0


def test_no_matrix_is_kept_between_forward_and_backward():
    _, layer = layer_of(rank=1)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(3, 64, generator=GENERATOR)).sum().backward()
    assert kept and max(t.numel() for t in kept) < 7 * 64


@pytest.fixture
def dense(tiny_model, tiny_family, request):
    path = tiny_model() if request.param == "llama" else tiny_family("phi3")
    return load_model(path)


def linears(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}


@pytest.mark.parametrize("dense", ["llama", "phi3"], indirect=True)
def test_the_folded_integers_are_those_of_the_last_forward_pass(dense):
    head = quantize(dense.lm_head.weight, 4, 32)
    table = quantize(dense.model.embed_tokens.weight, 4, 32)
    dense.model.embed_tokens.weight.data = table.dequantize()
    if dense.lm_head.weight is not dense.model.embed_tokens.weight:
        dense.lm_head.weight.data = head.dequantize()
    names = linears(dense).keys()
    starts = {name: quantize(m.weight, 4, 32, symmetric=False) for name, m in linears(dense).items()}
    attach_rounded(dense, starts, rank=2)
    layers = {n: m for n, m in dense.named_modules() if isinstance(m, RoundedLoraLayer)}
    assert layers.keys() == names
    trained = {n.rpartition(".")[2] for n, p in dense.named_parameters() if p.requires_grad}
    assert trained == {"a", "b", "delta"}
    for layer in layers.values():
        spread(layer, 0.05)
    with torch.inference_mode():
        last = dense(input_ids=IDS).logits
        scales = {name: layer.scales() for name, layer in layers.items()}
        codes = {name: layer.grid.codes(layer.a, layer.b) for name, layer in layers.items()}
    matrices = fold_rounded(dense)
    assert matrices.keys() == names == linears(dense).keys()
    changed = 0
    for name, matrix in matrices.items():
        unpacked = unpack_codes(matrix.qweight, 4, 32)
        assert torch.equal(unpacked.float(), codes[name])
        assert torch.equal(matrix.scales, scales[name]) and torch.equal(scales[name], scales[name].half().float())
        assert torch.equal(matrix.zero_points, starts[name].zero_points)
        assert unpack_zero_points(matrix.zero_points, 4, scales[name].shape[1]).unique().numel() > 1
        changed += int((unpacked != unpack_codes(starts[name].qweight, 4, 32)).sum())
    assert changed > 100
    with torch.inference_mode():
        assert torch.equal(dense(input_ids=IDS).logits, last)
        quantize_model(dense, 4, 32, 4, matrices | {"lm_head": head, "model.embed_tokens": table})
        assert isinstance(dense.model.layers[0].mlp.down_proj, GroupQuantLinear)
        assert torch.allclose(dense(input_ids=IDS).logits, last, atol=1e-5)


@pytest.mark.parametrize("dense", ["llama"], indirect=True)
def test_gradient_checkpointing_and_autocast(dense):
    def gradients(checkpointing=False, autocast=False):
        model = copy.deepcopy(dense).train()
        attach_rounded(model, {name: quantize(m.weight, 8, 32) for name, m in linears(model).items()}, rank=2)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        found = [p.grad for n, p in model.named_parameters() if p.requires_grad and not n.endswith(".a")]  # B is 0
        assert all(grad.dtype == torch.float32 and grad.abs().sum() > 0 for grad in found)
        return torch.cat([grad.flatten() for grad in found])

    for autocast in (False, True):
        assert torch.equal(gradients(True, autocast), gradients(False, autocast))
    exact, low = gradients(), gradients(autocast=True)
    assert 0 < (exact - low).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("dense", ["llama"], indirect=True)
def test_bad_input_is_refused(dense):
    name, linear = next(iter(linears(dense).items()))
    good = quantize(linear.weight, 4, 32)
    with pytest.raises(SaapError, match="no floating-point linear"):
        attach_rounded(dense, {name: good, "model.norm": good}, 2)
    with pytest.raises(SaapError, match=r"its matrix is 96 x 96"):
        attach_rounded(dense, {name: quantize(torch.ones(96, 128), 4, 32)}, 2)
    with pytest.raises(SaapError, match="1 or more"):
        attach_rounded(dense, {name: good}, 0)
    assert linears(dense)[name] is linear
