from __future__ import annotations

import pytest
import torch

from saap.architectures import architecture_of, shape_of
from saap.checkpoint import load_model, read_config, slim_config, tensor_reader, write_slim
from saap.compensate import compensate
from saap.masking import masked
from saap.structures import LayerPlan, PrunePlan, whole_layer
from saap.surgery import cut_tensors

IDS = torch.randint(320, (6, 24), generator=torch.Generator().manual_seed(4))


def halved(shape, drop=()):
    """Half the channels and one query head of each group go everywhere; nothing stays of the dropped layers."""
    half = LayerPlan((0, 2, 4), (0, 1, 2), tuple(range(0, 128, 2)))
    return PrunePlan(tuple(LayerPlan((), (), ()) if i in drop else half for i in range(len(shape.layers))))


def hidden_after(model, ids):
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states


def slim_model(path, out, plan, replaced, bias=False):
    from dataclasses import replace

    config = read_config(path)
    shape = shape_of(config)
    names, read = tensor_reader(path)
    tensors = cut_tensors(names, read, plan, shape, architecture_of(config), replaced)
    kept = replace(plan.kept_shape(shape), added_bias=bias)
    write_slim(out, path, slim_config(config, kept, kept=plan.kept_layers), tensors, {"plan": {}})
    return load_model(out)


@pytest.fixture
def dense(tiny_model):
    path = tiny_model()
    model = load_model(path)
    return path, model, shape_of(model.config)


def test_nothing_is_nothing(dense):
    _, model, shape = dense
    assert compensate("none", model, shape, halved(shape), IDS) == {}


def test_biases_are_the_means_of_what_goes(dense):
    _, model, shape = dense
    plan = halved(shape)
    seen = []
    handle = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(input_ids=IDS)
    handle.remove()
    found = compensate("bias", model, shape, plan, IDS)
    assert sorted(found) == sorted(
        f"model.layers.{i}.{name}.bias" for i in range(3) for name in ("self_attn.o_proj", "mlp.down_proj")
    )
    gone = seen[0].flatten(0, 1)[:, 1::2].mean(0)
    expected = model.model.layers[1].mlp.down_proj.weight[:, 1::2] @ gone
    assert torch.allclose(found["model.layers.1.mlp.down_proj.bias"], expected, atol=1e-6)


def test_a_refit_is_the_least_squares_solution_on_the_slim_stream(dense, tmp_path):
    """The first block sees the dense stream itself, so that plain lstsq must agree."""
    path, model, shape = dense
    plan = halved(shape)
    found = compensate("refit", model, shape, plan, IDS, damping=1e-9)
    seen = []
    attention = model.model.layers[0].self_attn.o_proj
    handle = attention.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(input_ids=IDS)
    handle.remove()
    x = seen[0].flatten(0, 1).detach()
    columns = torch.cat([torch.arange(16) + 16 * head for head in (0, 2, 4)])
    solution = torch.linalg.lstsq(x[:, columns].double(), (x @ attention.weight.t()).double()).solution.t().float()
    assert torch.allclose(found["model.layers.0.self_attn.o_proj.weight"], solution, atol=1e-3)


def test_a_refit_brings_the_stream_closer_to_the_dense_one(dense, tmp_path):
    path, model, shape = dense
    plan = halved(shape)
    target = hidden_after(model, IDS)[-2]
    plain = hidden_after(slim_model(path, tmp_path / "plain", plan, {}), IDS)[-2]
    refit = compensate("refit", model, shape, plan, IDS)
    closer = hidden_after(slim_model(path, tmp_path / "refit", plan, refit), IDS)[-2]
    assert (closer - target).square().mean() < 0.8 * (plain - target).square().mean()


@pytest.mark.parametrize("kind", ["bias", "refit"])
def test_the_model_is_left_as_it_was_and_dropped_layers_are_renumbered(dense, tmp_path, kind):
    path, model, shape = dense
    plan = halved(shape, drop=(1,))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = compensate(kind, model, shape, plan, IDS)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.model.layers[0].mlp.down_proj.bias is None
    assert {name.split(".")[2] for name in found} == {"0", "1"}
    slim = slim_model(path, tmp_path / "slim", plan, found, bias=kind == "bias")
    assert torch.isfinite(slim(input_ids=IDS).logits).all()
    own = dict(slim.named_parameters())
    assert all(torch.equal(own[name], tensor) for name, tensor in found.items())


def test_a_whole_model_needs_no_compensation(dense):
    _, model, shape = dense
    plan = PrunePlan(tuple(whole_layer(sizes) for sizes in shape.layers))
    for name, tensor in compensate("refit", model, shape, plan, IDS).items():
        assert torch.allclose(tensor, model.get_parameter(name), atol=1e-4)
    assert all(not bias.any() for bias in compensate("bias", model, shape, plan, IDS).values())


def test_a_lost_block_is_made_up_for_by_the_next(dense):
    """Without attention the feed-forward block aims at what the dense stream has after both."""
    _, model, shape = dense
    whole = whole_layer(shape.layers[0])
    plan = PrunePlan((LayerPlan((), (), whole.ffn), whole, whole))
    found = compensate("refit", model, shape, plan, IDS)
    assert "model.layers.0.self_attn.o_proj.weight" not in found
    target = hidden_after(model, IDS)[1]
    with masked(model, {0: plan.layers[0]}, 16):
        without = hidden_after(model, IDS)[1]
        model.model.layers[0].mlp.down_proj.weight.data.copy_(found["model.layers.0.mlp.down_proj.weight"])
        assert (hidden_after(model, IDS)[1] - target).square().mean() < 0.9 * (without - target).square().mean()
