import math

import pytest
import torch

from saap.base.errors import UserError
from saap.evaluate.perplexity import score_models, torch_scorer
from saap.models.checkpoint import load_model

IDS = torch.randint(320, (5, 12), generator=torch.Generator().manual_seed(4))


def test_nll_is_the_models_own_loss(tiny_model):
    model = load_model(tiny_model())
    (quality,) = score_models({"a": torch_scorer(model)}, IDS, batch=2)
    with torch.inference_mode():
        assert quality.nll == pytest.approx(model(input_ids=IDS, labels=IDS).loss.item(), rel=1e-5)
    assert quality.perplexity == pytest.approx(math.exp(quality.nll))
    assert quality.kl is None and quality.top1 is None


def test_against_a_reference(tiny_model):
    models = {"dense": load_model(tiny_model("dense", seed=1)), "other": load_model(tiny_model("other", seed=2))}
    dense, other = score_models({n: torch_scorer(m) for n, m in models.items()}, IDS, reference="dense", batch=2)
    assert (dense.kl, dense.top1) == (0.0, 1.0)
    with torch.inference_mode():
        p, q = (m(input_ids=IDS).logits[:, :-1].double().log_softmax(-1) for m in models.values())
    assert other.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-3)
    assert other.top1 == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())


def test_hand_calculated():
    def score(ids):
        logits = torch.zeros(*ids.shape, 4)
        logits[..., 2] = math.log(3)  # p(2) = 1/2, the others 1/6
        return logits

    (quality,) = score_models({"a": score}, torch.tensor([[0, 2, 1]]))
    assert quality.nll == pytest.approx((math.log(2) + math.log(6)) / 2)


def test_vocabularies_that_differ_are_refused():
    scorers = {"a": lambda ids: torch.zeros(*ids.shape, 4), "b": lambda ids: torch.zeros(*ids.shape, 5)}
    with pytest.raises(UserError, match="b has a vocabulary of 5, the reference 4"):
        score_models(scorers, torch.zeros(1, 3, dtype=torch.long), reference="a")


def test_only_what_is_counted_counts():
    def score(ids):
        logits = torch.zeros(*ids.shape, 4)
        logits[..., 2] = math.log(3)  # p(2) = 1/2, the others 1/6
        return logits

    counted = torch.tensor([[True, True], [False, True]])
    (quality,) = score_models({"a": score}, torch.tensor([[0, 2, 1], [0, 1, 2]]), counted, batch=1)
    assert quality.nll == pytest.approx((math.log(2) + math.log(6) + math.log(2)) / 3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_that_gives_no_numbers_is_refused(value):
    def score(ids):
        logits = torch.zeros(*ids.shape, 4)
        logits[-1, 0, 1] = value
        return logits

    with pytest.raises(UserError, match="a gives losses that are no numbers"):
        score_models({"a": score}, torch.zeros(3, 4, dtype=torch.long))


def test_a_loss_whose_perplexity_no_float_holds():
    (quality,) = score_models(
        {"a": lambda ids: 800.0 * torch.nn.functional.one_hot(ids + 1, 4)}, torch.zeros(1, 3).long()
    )
    assert quality.nll == pytest.approx(800) and quality.perplexity is None
