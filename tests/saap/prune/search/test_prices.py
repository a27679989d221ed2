from __future__ import annotations

import pytest
import torch

from saap.models.architectures import shape_of
from saap.models.checkpoint import load_model
from saap.prune.options import AdaptiveOptions, PruneOptions
from saap.prune.plan import LayerPlan, whole_layer
from saap.prune.scores.fusion import fuse
from saap.prune.scores.importance import estimate
from saap.prune.search.masking import masked, mean_nll
from saap.prune.search.prices import Losses, fit_prices
from saap.system.errors import UserError

IDS = torch.randint(320, (4, 16), generator=torch.Generator().manual_seed(2))


def fitted(model, fused, modules=False, prices="silenced", scored=IDS[:2], **how):
    options = PruneOptions(modules=modules, adaptive=AdaptiveOptions(prices=prices))
    return fit_prices(Losses(model, scored, IDS[2:], options, **how), fused, options)


@pytest.fixture
def scored(tiny_model):
    model = load_model(tiny_model())
    shape = shape_of(model.config)
    return model, shape, fuse(estimate(model, shape, IDS[:2]), shape)


def test_mean_nll_is_the_models_own_loss(scored):
    model, _, _ = scored
    assert mean_nll(model, IDS, batch=4) == pytest.approx(model(input_ids=IDS, labels=IDS).loss.item(), rel=1e-5)


def test_module_prices_are_measured_losses(scored):
    model, shape, fused = scored
    prices = fitted(model, fused, modules=True)
    base = mean_nll(model, IDS[2:])
    with masked(model, {1: LayerPlan(ffn=whole_layer(shape.layers[1]).ffn)}):
        increase = mean_nll(model, IDS[2:]) - base
    # Single prices share one factor, at least 1, for what removing several together costs more.
    assert prices.gone["attention"][1] >= max(increase, 1e-4) - 1e-6
    assert all(p is not None and p > 0 for p in prices.gone["attention"] + prices.gone["ffn"])


def test_prices_rank_as_the_scores_do(scored):
    model, _, fused = scored
    prices = fitted(model, fused)
    for kind in ("ffn", "head", "group"):
        for priced, score in zip(prices.structures[kind], fused[kind], strict=True):
            assert (priced.argsort(kind="stable") == score.double().numpy().argsort(kind="stable")).all()
    assert prices.gone["attention"] == [None] * 3
    assert all(alpha >= 0 for alpha in prices.alpha.values())


def test_the_model_is_as_it_was(scored):
    model, _, fused = scored
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fitted(model, fused, modules=True)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_progress_ends_at_its_total(scored):
    model, _, fused = scored
    for modules in (False, True):
        seen = []
        fitted(model, fused, modules=modules, progress=lambda *a, seen=seen: seen.append(a))
        assert [done for _, done, _ in seen] == [*list(range(len(seen) - 1)), seen[-1][2]]
        assert len(seen) == seen[-1][2] + 1


def test_losses_that_are_known_are_not_measured_again(scored, tmp_path, monkeypatch):
    monkeypatch.setenv("SAAP_CACHE", str(tmp_path))
    model, _, fused = scored
    first = fitted(model, fused, weights="weights")
    calls = []
    monkeypatch.setattr("saap.prune.search.prices.mean_nll", lambda *_: calls.append(1) or 1.0)
    again = fitted(model, fused, weights="weights")
    assert not calls
    for kind in ("ffn", "head", "group"):
        assert all((a == b).all() for a, b in zip(first.structures[kind], again.structures[kind], strict=True))
    fitted(model, fused, weights="others")
    count = len(calls)
    assert 3 <= count <= 7
    for path in (tmp_path / "scores").glob("*.json"):
        path.write_text("[torn")
    fitted(model, fused, weights="weights")
    assert len(calls) == 2 * count


def test_what_is_compensated_is_priced_by_the_loss_after_that(scored, tmp_path, monkeypatch):
    """Half of each increase makes half the prices; modules stay at the loss where they are silenced."""
    monkeypatch.setenv("SAAP_CACHE", str(tmp_path))
    model, _, fused = scored
    base, plans = mean_nll(model, IDS[2:]), []

    def priced(factor):
        def losses(kind, model, plan, scored, judged, progress):
            plans.append(plan)
            kept = [(len(layer.query_heads) / 6, len(layer.ffn) / 128) for layer in plan.layers]
            return base + factor * torch.tensor([sum((1 - heads) ** 2 + (1 - ffn) for heads, ffn in kept)]).double()

        monkeypatch.setattr("saap.prune.search.prices.losses_compensated", losses)
        on = IDS[:2] if factor == 1 else IDS[:1]  # known losses are of the text that compensation is fitted on
        return fitted(model, fused, modules=True, prices="compensated", scored=on, weights="weights")

    whole, half, again = priced(1.0), priced(0.5), priced(0.5)
    assert len(plans) == 10, "the second time they are known"
    assert half.gone["ffn"] == fitted(model, fused, modules=True).gone["ffn"]
    for kind in ("ffn", "head", "group"):
        assert half.alpha[kind] == pytest.approx(whole.alpha[kind], rel=1e-3)
        for one, two, third in zip(half.structures[kind], whole.structures[kind], again.structures[kind], strict=True):
            assert two.sum() > 0 and one == pytest.approx(two / 2, rel=1e-3) and (one == third).all()


def test_a_price_is_never_made_of_a_loss_that_is_not_finite(scored, monkeypatch):
    model, _, fused = scored
    monkeypatch.setattr("saap.prune.search.prices.mean_nll", lambda *_: float("nan"))
    with pytest.raises(UserError, match="the loss is nan"):
        fitted(model, fused)
