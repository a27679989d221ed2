import copy

import pytest
import torch

from saap.base.errors import UserError
from saap.models.architectures import FAMILIES
from saap.models.checkpoint import load_model
from saap.models.modeling_slim import GroupQuantLinear, SlimLlamaConfig, SlimLlamaForCausalLM, unpack_zero_points
from saap.models.slim_quant import MatrixForm
from saap.quantize.groups import fill, quantize, quantize_model
from saap.tune import adapters as module
from saap.tune.adapters import (
    GroupAdapterLayer,
    attach,
    float16_through,
    fold,
    group_matmul,
    keep_matrices,
    layers_of,
    trained_parameters,
)

IDS = torch.randint(320, (2, 12), generator=torch.Generator().manual_seed(1))


def adapted_from(model):
    attach(model)
    return model


@pytest.fixture(params=["llama", "phi3"])
def quantised(request, tiny_model, tiny_family):
    """A function that makes the same quantised model each time: llama, and phi3 with its packed matrices."""
    made = {}

    def make(bits=4, layers=2, **sizes):
        key = (bits, layers, *sizes.items())
        if key not in made:
            fields = {"name": f"model{len(made)}", "num_hidden_layers": layers, **sizes}
            path = tiny_model(**fields) if request.param == "llama" else tiny_family("phi3", **fields)
            model = load_model(path)
            quantize_model(model, bits, 32, bits)
            made[key] = model
        return copy.deepcopy(made[key])

    return make


def holders(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, GroupQuantLinear) and n != "lm_head"}


def spread(model, size=0.05):
    """Give all adapter parameters numbers as training would."""
    generator = torch.Generator().manual_seed(3)
    for parameter in trained_parameters(model):
        parameter.data += size * torch.randn(parameter.shape, generator=generator)


def logits(model):
    with torch.inference_mode():
        return model(input_ids=IDS, use_cache=False).logits


def test_the_folded_model_is_the_adapted_one(quantised):
    model = quantised()
    before = {name: (m.qweight.clone(), m.scales.clone(), m.zero_points.clone()) for name, m in holders(model).items()}
    expected = logits(model)
    attach(model)
    assert torch.allclose(logits(model), expected, atol=1e-5)  # D is 0: nothing is changed yet
    spread(model)
    tuned = logits(model)
    assert (tuned - expected).abs().max() > 0.01
    trained = {name: layer.scales().detach() for name, layer in layers_of(model).items()}
    fold(model)
    assert not layers_of(model)
    assert (logits(model) - tuned).abs().max() <= 1e-6 * max(1, tuned.abs().max())
    for name, holder in holders(model).items():
        codes, scales, zero_points = before[name]
        assert torch.equal(holder.qweight, codes)
        assert torch.equal(holder.zero_points, zero_points)
        assert torch.equal(holder.scales, trained[name]) and not torch.equal(holder.scales, scales)
        assert torch.equal(holder.scales, holder.scales.half().float())


@pytest.mark.parametrize("bits", [4, 8])
def test_the_forward_is_what_its_formula_says(bits):
    """Against an independent computation with plain matrices, bias and 8-bit codes included."""
    generator = torch.Generator().manual_seed(5)
    base = GroupQuantLinear(96, 10, bits, 32, bias=True)
    fill(base, quantize(torch.randn(10, 96, generator=generator) + 1, bits, 32))
    base.bias.data.normal_(generator=generator)
    layer = GroupAdapterLayer(base)
    factor = torch.randn(10, 3, generator=generator) * 0.2
    layer.factor.data.copy_(factor)
    x = torch.randn(4, 96, generator=generator)
    zeros = unpack_zero_points(base.zero_points, bits, 3).float().unsqueeze(-1)
    codes = base.centred().float() + zeros
    scales = (base.scales * (1 + factor).clamp_min(0.05)).half().float()
    weight = (scales.unsqueeze(-1) * (codes - zeros)).flatten(1)
    assert torch.allclose(layer(x), x @ weight.T + base.bias, atol=1e-4)


def test_a_group_keeps_its_sign():
    base = GroupQuantLinear(64, 5, 4, 32)
    fill(base, quantize(torch.randn(5, 64, generator=torch.Generator().manual_seed(7)), 4, 32))
    layer = GroupAdapterLayer(base)
    layer.factor.data.fill_(-30)
    assert torch.equal(layer.scales().sign(), base.scales.sign())


def test_only_adapters_are_trained_and_every_one_learns(quantised):
    adapted = adapted_from(quantised())
    assert {id(p) for p in adapted.parameters() if p.requires_grad} == {id(p) for p in trained_parameters(adapted)}
    layers = layers_of(adapted)
    assert [p.shape for p in trained_parameters(adapted)] == [layer.base.scales.shape for layer in layers.values()]
    spread(adapted, 0.01)
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained_parameters(adapted))


def test_gradient_checkpointing_and_autocast(quantised):
    """Checkpointing gives the same gradients to the bit, autocast to bfloat16 nearly the same, in float32."""

    def gradients(checkpointing=False, autocast=False):
        adapted = adapted_from(quantised())
        spread(adapted, 0.01)
        adapted.train()
        if checkpointing:
            adapted.gradient_checkpointing_enable({"use_reentrant": False})
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = adapted(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        assert all(p.grad.dtype == torch.float32 for p in trained_parameters(adapted))
        return torch.cat([p.grad.flatten() for p in trained_parameters(adapted)])

    for autocast in (False, True):
        assert torch.equal(gradients(True, autocast), gradients(False, autocast))
    exact, low = gradients(), gradients(autocast=True)
    assert 0 < (exact - low).norm() < 0.1 * exact.norm()


def test_no_matrix_is_kept_between_forward_and_backward(quantised):
    adapted = adapted_from(quantised())
    own = {layer.centred.data_ptr() for layer in layers_of(adapted).values()}
    sizes = {layer.centred.numel() for layer in layers_of(adapted).values()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        adapted(input_ids=IDS[:1, :4], labels=IDS[:1, :4], use_cache=False).loss.backward()
    large = [t for t in kept if t.numel() in sizes]
    assert len(large) == len(layers_of(adapted)) and {t.data_ptr() for t in large} == own


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_of_the_decoder_has_our_layer_and_nothing_else(family, tiny_family):
    model = load_model(tiny_family(family))
    linears = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    linears = {name for name in linears if not FAMILIES[family].is_float(name) and "per_layer_model" not in name}
    if not FAMILIES[family].rare and not FAMILIES[family].per_layer:
        assert len(linears) == 3 * sum(map(len, FAMILIES[family].matrices.values()))
    quantize_model(model, 4, 32, 4)
    expected = logits(model)
    attach(model)
    assert layers_of(model).keys() == linears
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {f"{name}.factor" for name in linears}
    assert torch.allclose(logits(model), expected, atol=1e-5)


def test_autocast_does_not_touch_what_is_folded(quantised):
    """bfloat16 would hide steps of D below 1 in 256."""
    adapted = adapted_from(quantised())
    spread(adapted)
    layer = next(iter(layers_of(adapted).values()))
    expected = layer.scales()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scales = layer.scales()
    assert torch.equal(expected, scales) and scales.dtype == torch.float32


def test_a_cut_model_of_4_and_8_bits_is_folded_saved_and_loaded(tmp_path):
    """Layers of their own sizes, one without attention and one without MLP, written as a directory."""
    sizes = {"vocab_size": 320, "hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16}
    layers = [[2, 1, 64], [0, 0, 128], [6, 3, 0]]
    torch.manual_seed(0)
    model = SlimLlamaForCausalLM(SlimLlamaConfig(**sizes, num_hidden_layers=3, slim_layers=layers)).eval()
    quant = quantize_model(model, 4, 32, 8, own={"model.layers.1.mlp.down_proj": MatrixForm(8, 64)})
    attach(model)
    assert len(layers_of(model)) == 7 + 3 + 4
    spread(model)
    tuned = logits(model)
    fold(model)
    model.config.slim_quant = quant
    model.config.tie_word_embeddings = False
    model.save_pretrained(tmp_path / "folded")
    assert torch.allclose(logits(load_model(tmp_path / "folded")), tuned, atol=1e-6)


def test_a_model_without_integers_is_refused(tiny_model):
    with pytest.raises(UserError, match="holds no integers"):
        attach(load_model(tiny_model("dense")))


GENERATOR = torch.Generator().manual_seed(0)
CENTRED = torch.randint(-8, 8, (7, 2, 32), generator=GENERATOR).to(torch.int8)


def numbers(dtype=torch.float64):
    x = torch.randn(2, 5, 64, generator=GENERATOR, dtype=dtype, requires_grad=True)
    scale = (torch.rand(7, 2, generator=GENERATOR, dtype=dtype) + 0.5).requires_grad_()
    return x, scale


def dense(scale):
    return (CENTRED * scale.unsqueeze(-1)).flatten(1)


def test_gradients_are_those_of_the_dequantised_matrix():
    x, scale = numbers()
    assert torch.autograd.gradcheck(lambda a, s: group_matmul(a, CENTRED, s), (x, scale))
    assert torch.autograd.gradcheck(lambda s: group_matmul(x.detach(), CENTRED, s), (scale,))
    assert torch.allclose(group_matmul(x, CENTRED, scale), x @ dense(scale).T)


def test_autocast_multiplies_in_bfloat16_and_sums_gradients_in_float32():
    x, scale = numbers(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = group_matmul(x, CENTRED, scale)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, torch.nn.functional.linear(x, dense(scale)))
    y.float().square().sum().backward()  # outside of autocast, as a training loop does
    rounded = [t.grad for t in (x, scale)]
    for tensor in (x, scale):
        tensor.grad = None
    group_matmul(x, CENTRED, scale).square().sum().backward()
    for low, tensor in zip(rounded, (x, scale), strict=True):
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


def test_a_kept_matrix_is_that_of_the_adapter_as_it_is(quantised):
    """Kept between passes, made anew after each change: the same losses and gradients, to the bit."""

    def three_steps(keeps):
        adapted, losses = adapted_from(quantised()), []
        if keeps:
            keep_matrices(adapted)
        spread(adapted, 0.01)
        optimizer = torch.optim.AdamW(trained_parameters(adapted), lr=0.05)
        for _ in range(3):
            for rows in (IDS[:1], IDS[:1]):  # a second micro-batch meets the same matrix
                loss = adapted(input_ids=rows, labels=rows, use_cache=False).loss
                loss.backward()
            losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
        fold(adapted)
        return losses, logits(adapted)

    (losses, folded), (expected, theirs) = three_steps(True), three_steps(False)
    assert losses == expected and len(set(losses)) == 3
    assert torch.equal(folded, theirs)


def test_a_matrix_is_made_once_for_the_passes_of_a_step(quantised, monkeypatch):
    made = []
    dequantized = module.dequantized
    monkeypatch.setattr(module, "dequantized", lambda *given: made.append(1) or dequantized(*given))
    adapted = adapted_from(quantised())
    keep_matrices(adapted)
    for _ in range(2):
        adapted(input_ids=IDS[:1], labels=IDS[:1], use_cache=False).loss.backward()
    assert len(made) == len(layers_of(adapted))
