"""Whether attention is cut: only where that is measured to be better than to leave it whole."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from saap.models.architectures import shape_of
from saap.models.checkpoint import load_model
from saap.models.record import read_record
from saap.prune.options import PruneOptions
from saap.prune.plan import Weighed
from saap.prune.pruning import prune
from saap.prune.record import plan_of
from saap.prune.scores.scoring import scores_of
from saap.prune.search.adaptive import adaptive_plan, divided, weighed
from saap.prune.search.budget import budget_for
from saap.prune.search.prices import Losses
from saap.system.errors import UserError

IDS = torch.randint(320, (16, 16), generator=torch.Generator().manual_seed(3))
REFIT = "refit"


@pytest.fixture
def found(tiny_model, monkeypatch):
    """plan(ratio, heads): a tiny model's plan; ``said``: losses of a plan by whether it cuts attention; ``asked``."""
    path = tiny_model()
    model = load_model(path)
    shape = shape_of(model.config)
    asked: list[bool] = []
    said = {True: 0.0, False: 0.0}

    def losses(kind, _model, each, scored, priced, _progress):
        assert (kind, len(scored), len(priced)) == (REFIT, 14, 2)
        asked.append(attention_cut(each, shape))
        return torch.tensor([said[asked[-1]], said[asked[-1]] + 1])

    monkeypatch.setattr("saap.prune.search.prices.losses_compensated", losses)

    def plan(ratio, heads=None):
        asked.clear()
        options = PruneOptions(ratio=ratio, heads=heads)
        budget = budget_for(options, shape, model.config.to_dict())

        scored, priced = divided(IDS)
        scores = scores_of(model, shape, scored, options.adaptive)
        return adaptive_plan(scores, Losses(model, scored, priced, options), budget, options)

    return plan, said, asked, shape


def attention_cut(plan, shape):
    return any(len(keep.query_heads) < sizes.query_heads for keep, sizes in zip(plan.layers, shape.layers, strict=True))


def test_attention_is_cut_only_where_that_is_measured_to_be_better(found):
    plan, said, asked, shape = found
    said.update({True: 3.0, False: 3.5})
    better = plan(0.4)
    assert attention_cut(better, shape) and asked == [True, False]
    assert better.reasons.weighed == (Weighed(0.5, 0.0),)
    said.update({True: 3.0, False: 3.0})
    simpler = plan(0.4)
    assert not attention_cut(simpler, shape) and simpler.reasons.weighed == (Weighed(0.0, 0.0),)
    weights = budget_for(PruneOptions(ratio=0.4), shape, {})
    assert weights.fits(weights.total(simpler.kept_shape(shape)))


def test_whoever_asks_for_heads_gets_what_the_search_finds(found):
    plan, _, asked, shape = found
    assert attention_cut(plan(0.4, heads=True), shape) and not asked
    assert not attention_cut(plan(0.4, heads=False), shape) and not asked


def test_where_the_ffn_alone_cannot_meet_the_budget_nothing_is_compared(found):
    plan, _, asked, shape = found
    with pytest.raises(UserError):
        plan(0.6, heads=False)
    assert attention_cut(plan(0.6), shape) and not asked


@pytest.mark.parametrize(
    ("cut", "whole", "better"),
    [
        ([3.0], [3.1], True),
        ([3.0], [3.0], False),
        ([3.0, 4.0], [3.1, 4.1], True),
        ([3.1, 4.1], [3.0, 4.0], False),
        ([3.0, 3.0, 3.0, 3.0], [3.3, 3.0, 3.3, 3.0], False),  # the mean of 0.15 is 1.7 standard errors
        ([3.0, 3.0, 3.0, 3.0], [3.3, 3.1, 3.3, 3.1], True),  # 0.2 is 3.5 of them
    ],
)
def test_better_by_more_than_two_standard_errors(cut, whole, better):
    found = weighed(torch.tensor(cut, dtype=torch.float64), torch.tensor(whole, dtype=torch.float64))
    assert found.pays is better
    assert found.gain == pytest.approx((sum(whole) - sum(cut)) / len(cut))


def test_losses_that_are_not_finite_decide_nothing():
    with pytest.raises(UserError, match="the loss is nan"):
        weighed(torch.tensor([float("nan"), 1.0]), torch.tensor([1.0, 1.0]))


@pytest.mark.parametrize("stream", [False, True])
def test_the_same_choice_layer_by_layer_and_with_progress(tiny_model, tmp_path, stream):
    labels: list[str] = []

    def record_of(name, options):
        told = {"progress": lambda label, *_: labels.append(label)}
        prune(tiny_model(), options, output=tmp_path / name, calibration=IDS, **told)
        assert labels.count("trying a plan (layers)") == 2 * 3  # of the first pruning
        return read_record(tmp_path / name)

    options = PruneOptions(ratio=0.4, stages=1, stream=stream)
    record = record_of("slim", options)
    assert record["options"]["heads"] is None and len(record["plan"]["reasons"]["weighed"]) == 1
    assert plan_of(record["plan"]).reasons.record() == record["plan"]["reasons"]
    if not stream:
        assert record_of("searched", replace(options, heads=True))["options"]["heads"] is True
