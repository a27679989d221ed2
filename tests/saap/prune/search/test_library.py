"""Prices of what may go: the KL divergence that a removal costs, to second order, after compensation."""

import pytest
import torch
from support.masking import divergence_from

from saap.base.errors import UserError
from saap.models.architectures import shape_of
from saap.models.checkpoint import load_model
from saap.models.shape import KINDS
from saap.models.streaming import load_streamed
from saap.prune.options import PruneOptions
from saap.prune.plan import LayerPlan, whole_layer
from saap.prune.pruning import prune
from saap.prune.scores.fusion import fuse
from saap.prune.scores.scoring import scores_of
from saap.prune.search.choices import Allowed
from saap.prune.search.library import Pricing, between

FIT = torch.randint(320, (8, 32), generator=torch.Generator().manual_seed(3))
HELD = torch.randint(320, (24, 32), generator=torch.Generator().manual_seed(4))


def allowed(options):
    return Allowed(keep=options.keep, keep_layers=options.kept_layers)


def library_of(model, **options):
    options = PruneOptions(ratio=0.3, **options)
    shape = shape_of(model.config)
    ranked = fuse(scores_of(model, shape, FIT, options.adaptive), shape, options.adaptive.fusion)
    return Pricing(model, ranked, (FIT, HELD), allowed(options), refits=options.compensation == "refit").library()


@pytest.mark.parametrize("family", ["llama", "granite", "gemma3_text", "olmo2", "lfm2", "qwen3_5_text", "gemma4_text"])
def test_without_compensation_a_price_is_the_divergence(tiny_family, family):
    """Of all small changes on offer, with one label drawn for each of 768 tokens; large ones leave the second order."""
    scaled = {"residual_multiplier": 0.3} if family == "granite" else {}
    model = load_model(tiny_family(family, **scaled))
    shape = shape_of(model.config)
    found = library_of(model, compensate="none")
    whole = list(map(whole_layer, shape.layers))
    asked = [
        (((index, name),), keep, price)
        for (index, name), offers in found.offers.items()
        for keep, price in offers[1:]
        if not (shape.sources and name == "attention")
    ]  # those are of several layers
    asked += [(gap.blocks, LayerPlan(), gap.price) for gap in found.gaps]
    ratios, gaps, divergence = [], 0, divergence_from(model, HELD)
    for places, keep, price in asked:
        plans = {}
        for index, name in places:
            plans[index] = plans.get(index, whole[index]).with_block(KINDS[name], keep)
        if (measured := divergence(plans)) < 0.13:
            ratios.append(price / measured)
            gaps += keep == LayerPlan()
    assert len(ratios) > 5 and gaps
    assert all(0.6 < ratio < 1.4 for ratio in ratios)
    assert 0.8 < sorted(ratios)[len(ratios) // 2] < 1.2


def test_compensation_makes_everything_cheaper(tiny_model):
    """On the text that it is fitted to: random models leave nothing to learn that holds elsewhere."""
    model = load_model(tiny_model())
    shape = shape_of(model.config)
    options = {kind: PruneOptions(ratio=0.3, compensate=kind) for kind in ("none", "refit")}
    ranked = fuse(scores_of(model, shape, FIT, options["none"].adaptive), shape)
    found = {
        kind: Pricing(model, ranked, (FIT, FIT), allowed(each), refits=kind == "refit").library()
        for kind, each in options.items()
    }
    for place, offers in found["none"].offers.items():
        for number, (keep, price) in enumerate(offers[1:], 1):
            assert found["refit"].offers[place][number][0] == keep
            assert found["refit"].offers[place][number][1] < price
    for plain, refitted in zip(found["none"].gaps, found["refit"].gaps, strict=True):
        first = plain.blocks == ((0, "attention"),)  # nothing before it could make up for it
        assert refitted.price == plain.price if first else refitted.price < plain.price


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "lfm2"])
def test_the_same_prices_layer_by_layer(tiny_family, family):
    path = tiny_family(family)
    whole, streamed = library_of(load_model(path)), library_of(load_streamed(path))
    assert whole.offers.keys() == streamed.offers.keys()
    assert len(whole.gaps) >= len(streamed.gaps) > 0
    prices = {gap.blocks: gap.price for gap in whole.gaps}
    # Labels are drawn sequence by sequence in both, from logits that differ in the last bits.
    for gap in streamed.gaps:
        assert gap.price == pytest.approx(prices[gap.blocks], rel=0.02)
    for place, offers in streamed.offers.items():
        for (keep, price), (other, expected) in zip(offers, whole.offers[place], strict=True):
            assert keep == other and price == pytest.approx(expected, rel=0.02)


def test_prices_of_widths_between():
    known = {32: 0.4, 64: 0.1, 96: 0.02}
    found = between(known, 128, [16, 32, 48, 64, 80, 96, 112])
    assert found[1:6:2] == pytest.approx([0.4, 0.1, 0.02])
    assert found == sorted(found, reverse=True) and found[0] > 0.4 and found[-1] < 0.02
    assert between({64: 0.1}, 128, [32, 64, 96]) == pytest.approx([0.15, 0.1, 0.05])
    assert between({32: 0.1, 64: 0.2}, 128, [32, 64]) == pytest.approx([0.2, 0.2])  # less costs no more


def test_a_price_that_is_not_finite_is_refused(tiny_model):
    model = load_model(tiny_model())
    shape = shape_of(model.config)
    options = PruneOptions(ratio=0.3)
    ranked = fuse(scores_of(model, shape, FIT, options.adaptive), shape)
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match="a price is not finite on the calibration text"):
        Pricing(model, ranked, (FIT, HELD), allowed(options), refits=options.compensation == "refit").library()


def test_a_token_without_an_embedding_counts_nothing(tiny_model, tmp_path):
    """A new model whose padding is its end token has one of zeros, and packed text is full of it."""
    model = load_model(tiny_model())
    model.model.embed_tokens.weight.data[5] = 0
    model.save_pretrained(tmp_path / "padded")
    ids = torch.cat([FIT, HELD]).index_fill(1, torch.tensor([0, 9]), 5)
    result = prune(tmp_path / "padded", PruneOptions(ratio=0.3), output=tmp_path / "slim", calibration=ids)
    assert result.plan.price < 10
