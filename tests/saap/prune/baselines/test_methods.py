import pytest
import torch

from saap.base.errors import UserError
from saap.models.architectures import shape_of
from saap.models.checkpoint import load_model
from saap.prune.baselines.methods import BASELINES, published, rank
from saap.prune.baselines.scores import wanda_scores
from saap.prune.options import PruneOptions
from saap.prune.plan import check_plan
from saap.prune.scores.activations import collect

IDS = torch.randint(320, (3, 16), generator=torch.Generator().manual_seed(1))


def shaped(model):
    return shape_of(model.config)


def test_shortgpt_drops_the_layers_that_change_least(tiny_model):
    model = load_model(tiny_model(num_hidden_layers=5))
    shape = shaped(model)
    influence = collect(model, shape, IDS).influence
    ranking = rank(model, shape, IDS, PruneOptions(method="shortgpt", heads=False))
    order = torch.argsort(influence).tolist()
    assert [step.layer for step in ranking.removals] == order[:4]
    for share, gone in ((0.1, 1), (0.2, 1), (0.2001, 2), (0.8, 4)):
        plan = ranking.plan_at(share)
        assert [i for i, layer in enumerate(plan.layers) if not layer.ffn] == sorted(order[:gone])
        check_plan(plan, shape)
    with pytest.raises(UserError, match=r"at most here, not 90\.00%"):
        ranking.plan_at(0.9)
    spared = rank(model, shape, IDS, PruneOptions(method="shortgpt", keep_layers=frozenset({order[0]}), heads=False))
    assert [step.layer for step in spared.removals] == order[1:]


@pytest.mark.parametrize("method", BASELINES)
@pytest.mark.parametrize("heads", [False, True])
def test_every_method_plans_legal_models_and_leaves_the_model_alone(tiny_model, method, heads):
    model = load_model(tiny_model(num_hidden_layers=4))
    shape = shaped(model)
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    calls = []
    ranking = rank(model, shape, IDS, PruneOptions(method=method, heads=heads), lambda *c: calls.append(c))
    plan = ranking.plan_at(0.3)
    check_plan(plan, shape)
    assert 1 - plan.kept_shape(shape).layer_weights / shape.layer_weights >= 0.3
    if method != "shortgpt":
        assert {step.kind for step in ranking.removals} == ({"ffn", "group"} if heads else {"ffn"})
        assert all(layer.ffn and layer.query_heads for layer in plan.layers)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0]) and parameter.requires_grad == before[name][1]
        assert parameter.grad is None
    assert not model.training
    assert calls
    again = rank(model, shape, IDS, PruneOptions(method=method, heads=heads))
    assert again.plan_at(0.3) == plan


def test_the_lowest_scores_go(tiny_model):
    model = load_model(tiny_model())
    scores = wanda_scores(model, shaped(model), collect(model, shaped(model), IDS))
    plan = rank(model, shaped(model), IDS, PruneOptions(method="wanda_sp", heads=True)).plan_at(0.45)
    for layer, keep in enumerate(plan.layers):
        gone = [i for i in range(128) if i not in keep.ffn]
        assert gone and scores.ffn[layer][gone].max() <= scores.ffn[layer][list(keep.ffn)].min()
    lost = [i for i, keep in enumerate(plan.layers) if len(keep.kv_heads) < 3]
    assert lost and all(int(scores.group[i].argmin()) not in plan.layers[i].kv_heads for i in lost)


def test_llm_pruner_keeps_the_ends_unless_told(tiny_model):
    model = load_model(tiny_model(num_hidden_layers=16))
    shape = shaped(model)

    def touched(method, keep_layers):
        ranking = rank(model, shape, IDS, PruneOptions(method=method, keep_layers=keep_layers, heads=True))
        return {step.layer for step in ranking.removals}

    assert touched("vector", frozenset()) == set(range(4, 14))
    assert touched("vector", frozenset({7})) == set(range(16)) - {7}
    assert touched("vector", None) == set(range(16))
    assert touched("wanda_sp", frozenset()) == set(range(16))
    with pytest.raises(UserError, match=r"^there is no layer 16 to keep; the model has layers 0 to 15$"):
        touched("vector", frozenset({16}))


def test_published_settings():
    assert [published(m).sequences for m in BASELINES] == [10, 10, 128, 1024, None]
    assert [published(m).tokens for m in BASELINES] == [64, 64, 128, 128, 256]
    assert published("param_mix").kept(32) == {0, 1, 2, 3, 30, 31}
    assert published("param_mix").kept(30) == {0, 1, 2, 3, 28, 29}
    assert published("param_mix").kept(3) == published("flap").kept(32) == frozenset()
    assert all(published(m).text for m in BASELINES)
    with pytest.raises(UserError, match="method 'wanda' is not known; known: vector, param_mix"):
        published("wanda")


@pytest.mark.parametrize("method", BASELINES)
def test_a_model_that_is_not_finite_is_refused(tiny_model, method):
    model = load_model(tiny_model())
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = float("nan")
    with pytest.raises(UserError, match=r"the loss is nan on calibration sequence 0|layer 1: .* not finite"):
        rank(model, shaped(model), IDS, PruneOptions(method=method, keep_layers=None, heads=True))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
