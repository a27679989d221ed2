"""What a plan takes, measured in long windows instead of priced."""

from dataclasses import replace

import pytest
import torch
from support.masking import divergence_from

from saap.models.architectures import shape_of
from saap.models.checkpoint import load_model
from saap.models.layer_walk import layers_of
from saap.models.shape import ATTENTION, KINDS
from saap.prune.options import PruneOptions
from saap.prune.plan import LayerPlan, whole_layer
from saap.prune.search.budget import budget_for
from saap.prune.search.choices import Allowed, runs_of
from saap.prune.search.kept_prices import KeptDivergences
from saap.prune.search.library import Pricing
from saap.prune.search.measured import EVERY, Measuring, Windows, long_windows
from saap.prune.search.milp import ATTENTION_COUNTS, GONE_COUNTS, MOST_TIMES, Gap, Library, search
from tests.support.search_cases import library

IDS = torch.randint(320, (12, 32), generator=torch.Generator().manual_seed(3))


def pricing_of(model, **options):
    options = PruneOptions(ratio=0.3, **options)
    shape = shape_of(model.config)
    scores = {type_: [torch.arange(getattr(s, size), dtype=torch.float64) for s in shape.layers]
              for kind in KINDS.values() for type_, size in zip(kind.types, kind.sizes, strict=True)}  # fmt: skip
    return Pricing(model, scores, (IDS[:8], IDS[8:]), Allowed(), refits=options.compensation == "refit")


@pytest.mark.parametrize("family", ["llama", "granite", "gemma3_text", "olmo2", "lfm2", "qwen3_5_text", "gemma4_text"])
def test_what_is_measured_is_the_divergence(tiny_family, family):
    """Of single options and runs without a refit, from the logits of the whole model."""
    model = load_model(tiny_family(family))
    shape, pricing = shape_of(model.config), pricing_of(model, compensate="none")
    measured, divergence = Windows(model, IDS[:2]), divergence_from(model, IDS[:2], EVERY)
    attention = {place: plans[-1] for place, plans in pricing.choices.items() if place[1] == ATTENTION.name}
    options = {place: keep for place, keep in attention.items() if not shape.sources}  # those are of several layers
    runs = list(runs_of(shape, Allowed()))
    whole, seen = list(map(whole_layer, shape.layers)), 0
    for change in pricing.changes(options, runs):
        plans = {}
        for index, name in change.gone or (change.of,):
            keep = LayerPlan() if change.gone else options[change.of]
            plans[index] = plans.get(index, whole[index]).with_block(KINDS[name], keep)
        assert measured.divergence(change) == pytest.approx(divergence(plans), rel=1e-3, abs=1e-6)
        seen += 1
    assert seen == len(options) + len(runs) > 2


def test_the_walk_ends_with_what_is_wanted(tiny_model):
    model = load_model(tiny_model(num_hidden_layers=5))
    pricing, run = pricing_of(model), []
    for index, layer in enumerate(layers_of(model)):
        layer.mlp.register_forward_hook(lambda *_, index=index: run.append(index))
    keep = pricing.choices[1, "attention"][-1]
    changes = list(pricing.changes({(1, "attention"): keep}, [((2, "attention"), (2, "ffn"))]))
    assert [(change.of, change.gone) for change in changes] == [
        ((1, "attention"), ()), ((1, "ffn"), ((2, "attention"), (2, "ffn"))),
    ]  # fmt: skip
    assert max(run) == 2


def test_a_refit_makes_what_goes_cheaper(tiny_model):
    model = load_model(tiny_model())
    measured, runs = Windows(model, IDS[:8]), [((1, "attention"),), ((1, "attention"), (1, "ffn"))]
    found = {
        kind: [measured.divergence(change) for change in pricing_of(model, compensate=kind).changes({}, runs)]
        for kind in ("none", "refit")
    }
    assert all(refitted < plain for plain, refitted in zip(found["none"], found["refit"], strict=True))
    before = [p.clone() for p in model.parameters()]
    assert all(map(torch.equal, before, model.parameters())), "the model is as it was"


def test_windows_in_which_words_come_again_from_far_back():
    fresh = torch.arange(8 * 1024).view(8, 1024)
    ids = fresh.clone()
    ids[4, 600:700] = fresh[4, :100]
    ids[5, 500:520] = fresh[5, :20]
    ids[6, 256:512] = fresh[6, :256]  # from 256 tokens back, which is near
    rows = ids.view(32, 256)
    assert long_windows(rows).tolist() == ids[[4, 5]].tolist()
    assert long_windows(ids).tolist() == ids[[4, 5]].tolist()
    assert long_windows(rows[8:12]).shape == (2, 512), "two, of what there is"
    assert long_windows(rows[:1]).shape == (1, 256)


def test_measured_until_nothing_of_a_plan_is_left(tiny_model):
    model = load_model(tiny_model())
    pricing, budget = (
        pricing_of(model),
        budget_for(PruneOptions(ratio=0.3), shape_of(model.config), model.config.to_dict()),
    )
    found, rounds = pricing.library(), 0
    labels = []
    measuring = Measuring(pricing, IDS, KeptDivergences(None), lambda label, done, total: labels.append(label))
    plan = search(found.counted(), budget)
    while (more := measuring.more(found, plan)) is not None:
        assert more != found
        found, rounds = more, rounds + 1
        plan = search(found.counted(), budget)
    assert 0 < rounds < 20 and labels
    known = {gap.blocks: gap.price for gap in found.gaps if gap.measured}
    taken = [(b.layer, b.kind) for b, option in zip(plan.blocks, plan.chosen, strict=True) if not option.kept]
    assert taken and set(taken) <= {place for blocks in known for place in blocks}
    heads = [
        (block.layer, block.kind)
        for block, option in zip(plan.blocks, plan.chosen, strict=True)
        if block.kind == "attention" and 0 < option.kept < block.whole.kept
    ]
    assert set(heads) <= set(found.times)


def test_what_was_measured_counts_instead_of_the_price():
    place, other = (0, "attention"), (1, "attention")
    found = replace(library(0), times={place: 2.0, other: 100.0})
    run = found.gaps[-1].blocks
    counted = found.measured(found.times, {run: 0.3}).counted()
    for each, times in ((place, 2.0), (other, MOST_TIMES)):
        prices = [price for _, price in found.offers[each]]
        assert [price for _, price in counted.offers[each]] == [ATTENTION_COUNTS * times * price for price in prices]
    assert counted.gaps[-1] == Gap(run, GONE_COUNTS * 0.3, measured=True)
    assert not any(gap.measured for gap in counted.gaps[:-1])
    half = Library({}, counted.gaps[-1:]).counted(0.5)
    assert half.gaps[0].price == pytest.approx(GONE_COUNTS**2 * 0.3 / 2)
