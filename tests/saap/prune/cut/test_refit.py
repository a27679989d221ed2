from dataclasses import replace

import pytest
import torch
from support.compensated import losses_compensated
from support.masking import mean_nll

from saap.models.architectures import FAMILIES, architecture_of, shape_of
from saap.models.checkpoint import load_model, read_config, slim_config, write_slim
from saap.models.layer_walk import layers_of
from saap.models.shape import KINDS
from saap.models.weight_files import tensor_reader
from saap.prune.cut import refit as module
from saap.prune.cut.refit import compensate
from saap.prune.cut.surgery import cut_tensors
from saap.prune.plan import LayerPlan, PrunePlan, whole_layer

IDS = torch.randint(320, (6, 24), generator=torch.Generator().manual_seed(4))


def halved(shape, drop=()):
    """Half the channels and one query head of each group go everywhere; nothing stays of the dropped layers."""
    half = LayerPlan((0, 2, 4), (0, 1, 2), tuple(range(0, 128, 2)))
    return PrunePlan(tuple(LayerPlan((), (), ()) if i in drop else half for i in range(len(shape.layers))))


def hidden_after(model, ids):
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states


def slim_model(path, out, plan, replaced, bias=False):
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


def test_biases_are_the_means_of_what_goes(dense):
    _, model, shape = dense
    plan = halved(shape)
    seen = []
    handle = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(input_ids=IDS)
    handle.remove()
    found = dict(compensate("bias", model, plan, IDS))
    assert sorted(found) == sorted(
        f"model.layers.{i}.{name}.bias" for i in range(3) for name in ("self_attn.o_proj", "mlp.down_proj")
    )
    gone = seen[0].flatten(0, 1)[:, 1::2].mean(0)
    expected = model.model.layers[1].mlp.down_proj.weight[:, 1::2] @ gone
    assert torch.allclose(found["model.layers.1.mlp.down_proj.bias"], expected, atol=1e-6)


def test_a_refit_is_the_ridge_solution_that_held_sequences_choose(dense, monkeypatch):
    """The first block sees the stream of the whole model, so that plain linear algebra must agree."""
    _, model, shape = dense
    monkeypatch.setattr("saap.prune.cut.refit.LAMBDAS", (0.1, 1.0))
    monkeypatch.setattr("saap.prune.cut.refit.ROWS", 1)
    found = dict(compensate("refit", model, halved(shape), IDS))
    layer = model.model.layers[0]
    seen = []
    handle = layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(input_ids=IDS)
    handle.remove()
    stream = model.model.embed_tokens(IDS)
    x = (seen[0] / stream.square().mean(-1, keepdim=True).sqrt()).detach().double()
    columns = torch.cat([torch.arange(16) + 16 * head for head in (0, 2, 4)])
    others = torch.cat([torch.arange(16) + 16 * head for head in (1, 3, 5)])
    weight = layer.self_attn.o_proj.weight.detach().double()
    kept, rest = x[..., columns], x[..., others] @ weight[:, others].t()
    fit_x, fit_r = kept[:5].flatten(0, 1), rest[:5].flatten(0, 1)

    def ridge(x, r, damping):
        squares = x.t() @ x
        return torch.linalg.solve(squares + damping * squares.diagonal().diag(), x.t() @ r).t()

    errors = {d: (rest[5] - kept[5] @ ridge(fit_x, fit_r, d).t()).square().sum().item() for d in (0.1, 1.0)}
    best = min(errors, key=errors.__getitem__)
    assert errors[best] < rest[5].square().sum().item()  # else nothing would be fitted
    everything = ridge(kept.flatten(0, 1), rest.flatten(0, 1), best)
    weights = found["model.layers.0.self_attn.o_proj.weight"].double()
    assert torch.allclose(weights, weight[:, columns] + everything, atol=1e-5)


@pytest.mark.parametrize("kind", ["bias", "refit"])
def test_the_model_is_left_as_it_was_and_dropped_layers_are_renumbered(dense, tmp_path, kind):
    path, model, shape = dense
    plan = halved(shape, drop=(1,))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = dict(compensate(kind, model, plan, IDS))
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
    assert dict(compensate("refit", model, plan, IDS)) == {}
    assert all(not bias.any() for bias in dict(compensate("bias", model, plan, IDS)).values())


def test_a_lost_block_is_not_refitted_and_one_sequence_is_too_little_to_refit_on(dense):
    _, model, shape = dense
    whole = whole_layer(shape.layers[0])
    plan = PrunePlan((LayerPlan((), (), whole.ffn[:64]), whole, whole))
    assert list(dict(compensate("refit", model, plan, IDS))) == ["model.layers.0.mlp.down_proj.weight"]
    (alone,) = dict(compensate("refit", model, plan, IDS[:1])).values()
    assert torch.equal(alone, model.model.layers[0].mlp.down_proj.weight[:, :64])


@pytest.mark.parametrize("kind", ["none", "bias", "refit"])
@pytest.mark.parametrize("drop", [(), (1,)])
def test_the_compensated_loss_is_that_of_the_model_that_would_be_written(dense, tmp_path, kind, drop):
    path, model, shape = dense
    plan = halved(shape, drop)
    unseen = torch.randint(320, (3, 24), generator=torch.Generator().manual_seed(9))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    losses = losses_compensated(kind, model, plan, IDS, unseen)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.model.layers[0].mlp.down_proj.bias is None
    replaced = dict(compensate(kind, model, plan, IDS))
    slim = slim_model(path, tmp_path / "slim", plan, replaced, bias=kind == "bias")
    assert losses.tolist() == pytest.approx([mean_nll(slim, row[None]) for row in unseen], abs=1e-5)
    assert abs(losses.mean() - mean_nll(model, unseen)) > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("blocks", ["both", "ffn"])
def test_what_is_kept_between_runs_changes_no_bit(family, blocks, tiny_family, monkeypatch):
    """Blocks that are settled run once in a model that is in memory, each time where layers are read one by one."""
    model = load_model(tiny_family(family))
    layers = []
    for sizes in shape_of(model.config).layers:
        keep = replace(whole_layer(sizes), ffn=tuple(range(0, sizes.ffn, 2)))
        if blocks == "both" and sizes.query_heads:  # the first query head of each group
            keep = replace(keep, query_heads=keep.query_heads[:: sizes.heads_per_group])
        elif blocks == "both":
            keep = replace(keep, conv=keep.conv[::3], delta=keep.delta[::2])
        layers.append(keep)
    plan = PrunePlan(tuple(layers))
    runs, found = [], []
    for streamed in (False, True):
        monkeypatch.setattr(module, "is_streamed", lambda _, streamed=streamed: streamed)
        architecture = architecture_of(model.config)
        delta = architecture.delta.mixed if architecture.delta else ""
        first = delta or architecture.conv_in or architecture.packed_qkv or architecture.query
        counted = layers_of(model)[0].get_submodule(first)
        handle = counted.register_forward_hook(lambda *_: runs.append(1))
        found.append(dict(compensate("refit", model, plan, IDS)))
        handle.remove()
        runs.append(0)
    assert found[0].keys() == found[1].keys() and len(found[0]) >= len(plan.layers)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    once, again = "".join(map(str, runs)).split("0")[:2]
    assert 0 < len(once) < len(again)


SAME = IDS[:1].repeat(6, 1)  # what is fitted and what chooses lambda are one text


def without(shape, *gone):
    """All whole but for these blocks: a layer, or a layer and ``attention`` or ``ffn``."""
    layers = list(map(whole_layer, shape.layers))
    for index, kind in gone:
        layers[index] = layers[index].with_block(KINDS[kind], LayerPlan())
    return PrunePlan(tuple(layers))


@pytest.mark.parametrize(
    ("gone", "matrix", "before", "after"),
    [
        ([(1, "attention"), (1, "ffn")], "0.mlp.down_proj", 1, 2),
        ([(2, "attention"), (2, "ffn"), (1, "attention"), (1, "ffn")], "0.mlp.down_proj", 1, 3),
        ([(1, "ffn"), (2, "attention"), (2, "ffn")], "1.self_attn.o_proj", None, 3),
    ],
)
def test_the_matrix_before_a_gap_learns_what_the_gap_added(tiny_model, monkeypatch, gone, matrix, before, after):
    """Plain linear algebra on the dense model's own states must agree: nothing before the gap is cut."""
    monkeypatch.setattr("saap.prune.cut.refit.LAMBDAS", (0.1,))
    model = load_model(tiny_model(num_hidden_layers=4))
    found = dict(compensate("refit", model, without(shape_of(model.config), *gone), SAME))
    name = f"model.layers.{matrix}.weight"
    assert list(found) == [name]
    linear = model.get_submodule(f"model.layers.{matrix}")
    seen = {}
    index = int(matrix[0])
    handles = [
        linear.register_forward_pre_hook(lambda _, args: seen.update(x=args[0])),
        model.model.layers[index].post_attention_layernorm.register_forward_pre_hook(
            lambda _, args: seen.update(middle=args[0])
        ),
    ]
    states = hidden_after(model, SAME)
    for handle in handles:
        handle.remove()
    attention = before is None
    stream = states[index] if attention else seen["middle"]
    counts = stream.square().mean(-1, keepdim=True).rsqrt()
    x = (seen["x"] * counts).flatten(0, 1)
    rest = ((_last_states(model, SAME, after) - (seen["middle"] if attention else states[before])) * counts).flatten(
        0, 1
    )
    squares = x.t() @ x
    expected = rest.t() @ x @ torch.linalg.inv(squares + 0.1 * torch.diag(squares.diagonal()))
    assert expected.abs().max() > 1
    assert torch.allclose(found[name] - linear.weight, expected, atol=1e-3)


def test_a_refit_runs_no_layer_more_often_than_it_must(tiny_model):
    """Layer 1 of 5 learns what layer 2 added: the layer that goes runs once, for that, and those behind it never."""
    model = load_model(tiny_model(num_hidden_layers=5))
    runs = [0] * 5
    for index, layer in enumerate(model.model.layers):
        layer.mlp.gate_proj.register_forward_hook(lambda *_, index=index: runs.__setitem__(index, runs[index] + 1))
    plan = without(shape_of(model.config), (2, "attention"), (2, "ffn"))
    said = []
    assert list(dict(compensate("refit", model, plan, IDS, progress=lambda *told: said.append(told[1:]))))
    batches = 2  # one is fitted, one chooses lambda; for each, the first layer runs once more to show what it returns
    assert runs == [batches + 2, batches, batches, 0, 0]
    assert said == [(1, 3), (2, 3), (3, 3)]


def _last_states(model, ids, layer):
    """The stream that leaves ``layer`` layers, before any final norm."""
    seen = []
    handle = model.model.layers[layer - 1].register_forward_hook(
        lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    hidden_after(model, ids)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize(
    "family", ["granite", "granitemoehybrid", "lfm2", "qwen3_5_text", "phi3", "olmo2", "gemma3_text"]
)
def test_a_gap_of_families_of_another_kind(family, tiny_family, monkeypatch):
    """What a block adds is scaled in some, and an FFN follows more than attention; a norm behind blocks stops it."""
    monkeypatch.setattr("saap.prune.cut.refit.LAMBDAS", (1e-4,))
    scaled = {"residual_multiplier": 0.3} if family.startswith("granite") else {}
    model = load_model(tiny_family(family, **scaled))
    shape = shape_of(model.config)
    mixer = shape.layers[1].mixer.name
    plan = without(shape, (1, mixer), (1, "ffn"))
    found = dict(compensate("refit", model, plan, SAME))
    if family in ("olmo2", "gemma3_text"):
        assert not found
        return
    ((name, weight),) = found.items()
    whole = _last_states(model, SAME, 2)
    before = (_last_states(model, SAME, 1) - whole).square().mean()
    model.get_parameter(name).data.copy_(weight)
    assert (_last_states(model, SAME, 1) - whole).square().mean() < 1e-3 * before
