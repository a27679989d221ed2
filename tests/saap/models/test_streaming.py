"""A model whose layers stay in their files says and scores what the same model in memory does."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.family_cuts import CASES
from support.masking import masked, mean_nll

from saap.base.errors import UserError
from saap.models.architectures import shape_of
from saap.models.checkpoint import load_model
from saap.models.layer_walk import layers_of
from saap.models.streaming import is_streamed, load_streamed, present
from saap.prune.cut.refit import compensate
from saap.prune.cut.ridge import Products, Rows, regression
from saap.prune.plan import LayerPlan, PrunePlan
from saap.prune.scores.activations import collect
from saap.prune.scores.importance import estimate
from saap.prune.scores.layerwise import estimate_layerwise


@pytest.fixture
def ids():
    return torch.randint(0, 100, (5, 24), generator=torch.Generator().manual_seed(3))


def nothing_is_left(model):
    return all(parameter.is_meta for layer in layers_of(model) for parameter in layer.parameters())


@pytest.mark.parametrize("case", sorted(CASES))
def test_it_says_and_scores_the_same_and_holds_no_layer(case, tiny_family, ids):
    family, settings = CASES[case]
    if kinds := settings.get("layer_types"):
        settings = {**settings, "num_hidden_layers": len(kinds)}
    path = tiny_family(family, **settings)
    both = whole, streamed = load_model(path), load_streamed(path)
    assert is_streamed(streamed) and not is_streamed(whole)
    assert nothing_is_left(streamed)
    with torch.inference_mode():
        assert torch.equal(streamed(input_ids=ids).logits, whole(input_ids=ids).logits)
    assert nothing_is_left(streamed)
    for element in ("none", "streamed", "exact"):
        check_scores(both, ids, element)
    check_silencing_activations_and_refits(both, ids)


def check_scores(both, ids, element):
    whole, streamed = both
    shape, said = shape_of(whole.config), []
    found = estimate_layerwise(
        streamed, shape, ids, c=24.0, element=element, progress=lambda *report: said.append(report)
    )
    expected = estimate(whole, shape, ids, c=24.0, element=element)
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    for part in ("products", "element", "token"):
        ours, theirs = getattr(found, part), getattr(expected, part)
        assert ours.keys() == theirs.keys()
        for key, numbers in theirs.items():
            # A head that is normed whole cannot change what is read of it: its product is 0, but for rounding.
            least = max(1e-4 * float(numbers.abs().max()), 2e-6 if key[1] in ("query", "key", "value") else 1e-7)
            assert torch.allclose(ours[key], numbers, rtol=1e-3, atol=least), (part, key)
    assert nothing_is_left(streamed)
    counts = [done for _, done, _ in said]
    assert counts == sorted(counts) and said[-1][1] == said[-1][2] == 2 * len(shape.layers)


def check_silencing_activations_and_refits(both, ids):
    whole, streamed = both
    shape = shape_of(whole.config)
    plan = PrunePlan(
        tuple(
            LayerPlan(tuple(range(s.query_heads)), tuple(range(s.kv_heads)), tuple(range(0, s.ffn, 2)))
            for s in shape.layers
        )
    )
    cut = dict(enumerate(plan.layers))
    losses = []
    for model in both:
        with masked(model, cut):
            losses.append(mean_nll(model, ids))
    assert losses[0] == losses[1] != mean_nll(whole, ids)
    for kind in ("bias", "refit"):
        ours, theirs = (dict(compensate(kind, model, plan, ids)) for model in (streamed, whole))
        assert ours.keys() == theirs.keys() and theirs
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    ours, theirs = (collect(model, shape, ids) for model in (streamed, whole))
    assert torch.equal(ours.influence, theirs.influence)
    assert nothing_is_left(streamed)


def test_a_layer_is_let_go_after_an_error_too(tiny_model, ids):
    streamed = load_streamed(tiny_model("llama"))
    layer = layers_of(streamed)[1]

    def fails(*_):
        raise RuntimeError("in the middle")

    handle = layer.mlp.register_forward_hook(fails)
    with pytest.raises(RuntimeError, match="in the middle"):
        streamed(input_ids=ids)
    handle.remove()
    assert nothing_is_left(streamed)
    with present(layer), present(layer):
        pass
    assert nothing_is_left(streamed)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_tensor_of_another_shape_is_named(name, tiny_model, ids):
    path = tiny_model("model")
    tensors = load_file(path / "model.safetensors")
    save_file(tensors | {name: tensors[name][..., 8:].contiguous()}, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"{name} is .*, and its config.json makes it"):
        load_streamed(path)(ids)


def test_both_forms_of_the_regression_agree():
    generator = torch.Generator().manual_seed(0)
    x, r, more = (torch.randn(n, k, generator=generator) for n, k in ((12, 20), (12, 7), (4, 20)))
    assert isinstance(regression(12, 20, 7), Rows) and isinstance(regression(20, 20, 7), Products)
    wide, long = Rows(), Products(20, 7)
    for form in (wide, long):
        form.add(x[:5], r[:5])
        form.add(x[5:], r[5:])
        extra = Rows() if form is wide else Products(20, 7)
        extra.add(more, r[:4])
        form.more = form.plus(extra)
    for damping in (0.1, 3.0):
        ours, theirs = wide.solved(damping), long.solved(damping)
        assert torch.allclose(ours, theirs, atol=1e-5)
        assert wide.error(ours) == pytest.approx(long.error(theirs), rel=1e-4)
        assert torch.allclose(wide.more.solved(damping), long.more.solved(damping), atol=1e-5)
        assert not torch.allclose(wide.more.solved(damping), ours, atol=1e-3)
    squares = x.t() @ x
    expected = torch.linalg.solve(squares + 0.1 * squares.diagonal().diag(), x.t() @ r).t()
    assert torch.allclose(wide.solved(0.1), expected, atol=1e-5)
