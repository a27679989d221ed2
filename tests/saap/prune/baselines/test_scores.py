import pytest
import torch

from saap.models.architectures import shape_of
from saap.models.checkpoint import load_model
from saap.prune.baselines.scores import flap_scores, taylor_scores, wanda_scores
from saap.prune.options import TAYLOR
from saap.prune.scores.activations import collect

IDS = torch.randint(320, (3, 16), generator=torch.Generator().manual_seed(1))


def shaped(model):
    return shape_of(model.config)


def slices_of(model, layer, kind, n):
    """(weight, rows or columns) of a structure; tiny model: head_dim 16, two query heads per group, by column last."""
    attn, mlp = model.model.layers[layer].self_attn, model.model.layers[layer].mlp
    if kind == "ffn":
        return [(mlp.gate_proj.weight, [n], False), (mlp.up_proj.weight, [n], False), (mlp.down_proj.weight, [n], True)]
    own, queries = list(range(16 * n, 16 * n + 16)), list(range(32 * n, 32 * n + 32))
    return [
        (attn.q_proj.weight, queries, False),
        (attn.k_proj.weight, own, False),
        (attn.v_proj.weight, own, False),
        (attn.o_proj.weight, queries, True),
    ]


def gradients(model, ids):
    """Gradient of the mean loss over all sequences in one batch, and each sequence's own."""
    weights = list(model.parameters())
    mean = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, weights)
    each = [torch.autograd.grad(model(input_ids=row[None], labels=row[None]).loss, weights) for row in ids]
    place = {id(w): i for i, w in enumerate(weights)}
    first = {key: mean[i].double() for key, i in place.items()}
    second = {key: torch.stack([g[i].double().square() for g in each]).mean(0) for key, i in place.items()}
    return first, second


def brute_taylor(method, weight, first, second, indices, by_column):
    total = 0.0
    for index in indices:
        pick = (slice(None), index) if by_column else (index,)
        w, g, g2 = weight.detach().double()[pick], first[id(weight)][pick], second[id(weight)][pick]
        total += {
            "vector": (w * g).sum().abs(),
            "param_mix": (w * g - 0.5 * w * w * g2).abs().sum(),
        }[method].item()
    return total


@pytest.mark.parametrize("method", TAYLOR)
def test_llm_pruners_scores_are_those_of_the_formulas(tiny_model, method):
    model = load_model(tiny_model())
    for module in model.model.layers:  # large weights: w^2 g^2 is no longer lost beside w g
        module.mlp.down_proj.weight.data *= 20
    scores = taylor_scores(method, model, shaped(model), IDS)
    first, second = gradients(model, IDS)
    for layer in range(3):
        for kind, values, structures in (
            ("ffn", scores.ffn[layer], (0, 5, 127)),
            ("group", scores.group[layer], (0, 1, 2)),
        ):
            for n in structures:
                expected = sum(
                    brute_taylor(method, w, first, second, indices, by_column)
                    for w, indices, by_column in slices_of(model, layer, kind, n)
                )
                assert values[n].item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("method", TAYLOR)
def test_packed_matrices_score_their_own_rows(tiny_family, method):
    model = load_model(tiny_family("phi3"))
    scores = taylor_scores(method, model, shaped(model), IDS)
    first, second = gradients(model, IDS)
    mlp = model.model.layers[1].mlp
    for n in (0, 77):
        expected = brute_taylor(method, mlp.gate_up_proj.weight, first, second, (n, 128 + n), False)
        expected += brute_taylor(method, mlp.down_proj.weight, first, second, (n,), True)
        assert scores.ffn[1][n].item() == pytest.approx(expected, rel=1e-3)


def test_a_gradient_that_was_there_stays_and_does_not_count(tiny_model):
    model = load_model(tiny_model())
    expected = taylor_scores("vector", model, shaped(model), IDS)
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.grad = torch.ones_like(weight)
    found = taylor_scores("vector", model, shaped(model), IDS)
    assert torch.equal(found.ffn[0], expected.ffn[0])
    assert torch.equal(weight.grad, torch.ones_like(weight))


def inputs_of(linear, model):
    rows = []
    handle = linear.register_forward_pre_hook(lambda module, args: rows.append(args[0].flatten(0, 1).double()))
    with torch.inference_mode():
        model(input_ids=IDS)
    handle.remove()
    return rows[0]


def test_wanda_is_mean_weight_times_input_norm(tiny_model):
    model = load_model(tiny_model())
    scores = wanda_scores(model, shaped(model), collect(model, shaped(model), IDS))
    attn, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
    norm = inputs_of(mlp.down_proj, model).square().mean(0).sqrt()
    expected = mlp.down_proj.weight.detach().double().abs().mean(0) * norm
    torch.testing.assert_close(scores.ffn[1].double(), expected, rtol=1e-4, atol=0)
    columns = attn.o_proj.weight.detach().double().abs().mean(0) * inputs_of(attn.o_proj, model).square().mean(0).sqrt()
    for group in range(3):
        expected_group = columns[32 * group : 32 * group + 32].sum().item()
        assert scores.group[1][group].item() == pytest.approx(expected_group, rel=1e-4)


def test_flap_is_standardised_weighted_fluctuation(tiny_model):
    model = load_model(tiny_model())
    scores = flap_scores(model, shaped(model), collect(model, shaped(model), IDS))
    attn, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
    metric = inputs_of(mlp.down_proj, model).var(0) * mlp.down_proj.weight.detach().double().square().sum(0)
    torch.testing.assert_close(scores.ffn[1].double(), (metric - metric.mean()) / metric.std(), rtol=1e-3, atol=1e-4)
    metric = (inputs_of(attn.o_proj, model).var(0) * attn.o_proj.weight.detach().double().square().sum(0)) ** 2
    standard = ((metric - metric.mean()) / metric.std()).reshape(3, 32).mean(1)
    assert scores.group[1].tolist() == pytest.approx(standard.tolist(), rel=1e-3, abs=1e-4)


def test_flap_of_a_layer_without_any_fluctuation_is_average(tiny_model):
    model = load_model(tiny_model())
    model.model.layers[0].mlp.down_proj.weight.data.zero_()
    scores = flap_scores(model, shaped(model), collect(model, shaped(model), IDS))
    assert scores.ffn[0].tolist() == [0.0] * 128
