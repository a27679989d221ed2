"""The loss by pieces against all logits at once."""

import pytest
import torch
from torch.nn import functional as F

from saap.models.checkpoint import load_model
from saap.quantize.groups import quantize_model
from saap.tune import losses as module
from saap.tune.losses import head_loss, learning_loss

IDS = torch.randint(320, (3, 40), generator=torch.Generator().manual_seed(0))
PLACES = torch.rand(3, 40, generator=torch.Generator().manual_seed(1)) < 0.6
TARGETS = torch.roll(IDS, -1, dims=1)[PLACES]


def losses(seen):
    def loss_of(logits, first, end):
        seen.append(len(logits))
        return F.cross_entropy(logits.float(), TARGETS[first:end], reduction="sum")

    return loss_of


def by_pieces_and_at_once(model, monkeypatch, autocast=False):
    """Loss and gradients of what is trained, both ways, and how many places had logits together."""
    monkeypatch.setattr(module, "PLACES", 16)
    trained = [p for p in model.parameters() if p.requires_grad]
    seen, found = [], []
    for compute in (
        lambda: head_loss(model, IDS, PLACES, losses(seen)),
        lambda: F.cross_entropy(model(input_ids=IDS).logits[PLACES].float(), TARGETS, reduction="sum"),
    ):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = compute()
        found.append((loss.detach(), torch.autograd.grad(loss, trained)))
    return found, seen


def only_layers_train(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".layers." in name)
    return model


def assert_same(found, tolerance=1e-5):
    (loss, gradients), (expected, theirs) = found
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for mine, other in zip(gradients, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=tolerance * float(other.abs().max()))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("quantised", [True, False])
def test_loss_and_gradients_are_those_of_all_logits(tiny_model, monkeypatch, tied, quantised):
    model = load_model(tiny_model(tie_word_embeddings=tied))
    if quantised:
        quantize_model(model, 4, 32, 8)
    found, seen = by_pieces_and_at_once(only_layers_train(model), monkeypatch)
    assert_same(found)
    assert max(seen) == 16 and sum(seen) == len(TARGETS)  # no place without a loss has logits


def test_in_bfloat16(tiny_model, monkeypatch):
    found, _ = by_pieces_and_at_once(only_layers_train(load_model(tiny_model())), monkeypatch, autocast=True)
    assert_same(found, 1e-2)


def test_a_cap_is_applied(tiny_family, monkeypatch):
    model = load_model(tiny_family("gemma3_text", final_logit_softcapping=3.0))
    found, seen = by_pieces_and_at_once(only_layers_train(model), monkeypatch)
    assert_same(found)
    assert max(seen) == 16


def test_a_head_that_is_trained_gets_its_gradient(tiny_model, monkeypatch):
    model = load_model(tiny_model(tie_word_embeddings=False))
    found, seen = by_pieces_and_at_once(model, monkeypatch)
    assert_same(found)
    assert sum(seen) == len(TARGETS) and len(seen) > 1


@pytest.mark.parametrize("frozen", [True, False])
def test_nothing_to_learn_has_a_gradient_of_zero(tiny_model, frozen):
    model = load_model(tiny_model())
    if frozen:
        only_layers_train(model)
    loss = head_loss(model, IDS, torch.zeros_like(PLACES), lambda logits, *_: logits.sum())
    loss.backward()
    assert loss == 0 and all((p.grad == 0).all() for p in model.parameters() if p.requires_grad)


def test_without_gradients_none_is_computed(tiny_model, monkeypatch):
    model = only_layers_train(load_model(tiny_model()))
    monkeypatch.setattr(torch.autograd, "grad", None)
    with torch.no_grad():
        assert head_loss(model, IDS, PLACES, losses([])).item() > 0


@pytest.mark.parametrize("k", [5, 320])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_one_pass_gives_what_nll_and_divergence_give_apart(k, share):
    generator = torch.Generator().manual_seed(2)
    logits, of_teacher = torch.randn(2, 7, 320, generator=generator) * 3
    labels = torch.randint(320, (7,), generator=generator)
    likeliest = of_teacher.log_softmax(-1).topk(k)
    labels[0] = likeliest.indices[0, 0]  # a label that the teacher kept, too
    answers = likeliest.indices, likeliest.values

    def apart(logits):
        p, q = answers[1].exp(), logits.softmax(-1).gather(-1, answers[0])
        if k < 320:  # one more bucket, of all others
            p, q = (torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], -1) for kept in (p, q))
        divergence = (p * (p / q).log()).sum()
        return (1 - share) * F.cross_entropy(logits, labels, reduction="sum") + share * divergence

    found = []
    for loss_of in (lambda logits: learning_loss(logits, labels, answers, share), apart):
        given = logits.clone().requires_grad_()
        loss = loss_of(given)
        (3 * loss).backward()
        found.append((loss.detach(), [given.grad]))
    assert_same(found)
    if share == 1:  # fewer buckets than tokens are a divergence below the full one
        log_q, log_p = (each.log_softmax(-1) for each in (logits, of_teacher))
        full = F.kl_div(log_q, log_p, log_target=True, reduction="sum").item()
        assert found[0][0].item() == pytest.approx(full, rel=1e-5) if k == 320 else 0 < found[0][0].item() < full
