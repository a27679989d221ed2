"""Prices that are kept: another budget of the same model is planned without pricing anything again."""

from dataclasses import replace

import pytest
import torch

from saap.models.architectures import shape_of
from saap.models.checkpoint import load_model
from saap.prune.options import PruneOptions
from saap.prune.search.adaptive import adaptive_plan
from saap.prune.search.budget import budget_for
from saap.prune.search.kept_prices import KeptDivergences, keep_library, prices_path, read_library
from saap.prune.search.library import Pricing
from tests.support.search_cases import library

IDS = torch.randint(320, (16, 32), generator=torch.Generator().manual_seed(3))


def plan_of(model, **options):
    options = PruneOptions(**({"ratio": 0.3} | options))
    shape = shape_of(model.config)
    return adaptive_plan(model, IDS, budget_for(options, shape, model.config.to_dict()), options, weights="w")


def test_another_budget_prices_nothing_again(tiny_model, monkeypatch):
    model = load_model(tiny_model())
    first = plan_of(model)

    def refused(*args):
        raise AssertionError("priced again")

    monkeypatch.setattr(Pricing, "library", refused)
    with monkeypatch.context() as also:
        also.setattr(Pricing, "changes", refused)
        assert plan_of(model) == first, "nothing is measured again"
    assert plan_of(model, ratio=0.5) != first
    adaptive = replace(PruneOptions().adaptive, recovered=0.9)
    assert plan_of(model, adaptive=adaptive)
    assert plan_of(model) == first, "what others measured makes no difference"
    for other in (
        {"keep": frozenset({"blocks"})},
        {"compensate": "none"},
        {"group_size": 64},
        {"keep_layers": frozenset({1})},
    ):
        with pytest.raises(AssertionError, match="priced again"):
            plan_of(model, **other)


def test_what_is_kept_is_what_was_priced(tmp_path):
    priced = library()
    choices = {place: [plan for plan, _ in offers] for place, offers in priced.offers.items()}
    path = tmp_path / "prices" / "a.safetensors"
    assert read_library(path, choices) is None
    keep_library(path, priced)
    assert read_library(path, choices) == priced
    keep_library(path, replace(priced, rounding=None))
    assert read_library(path, choices) is None, "a search that chooses integers wants their prices"
    assert read_library(path, choices, rounded=False) == replace(priced, rounding=None)
    keep_library(path, priced)
    assert read_library(path, choices, rounded=False) == priced
    fewer = {place: plans[:1] for place, plans in choices.items()}
    assert read_library(path, fewer) is None
    path.write_bytes(path.read_bytes()[:-8])
    assert read_library(path, choices) is None


def test_a_path_names_all_that_prices_depend_on():
    options = PruneOptions(ratio=0.3)
    ids = torch.zeros(2, 4, dtype=torch.int64)
    first = prices_path("w", ids, options, False)
    assert first == prices_path("w", ids, replace(options, ratio=0.5), False)
    for other in (("v", ids, options, False), ("w", ids + 1, options, False), ("w", ids, options, True)):
        assert prices_path(*other) != first


def test_what_was_measured_is_kept_beside_the_prices(tmp_path):
    path = tmp_path / "prices" / "a.safetensors"
    kept = KeptDivergences(path)
    assert kept.get("3.attention 2/1") is None
    kept.add({"3.attention 2/1": 0.25})
    kept.add({"3.ffn": 0.5})
    again = KeptDivergences(path)
    assert (again.get("3.attention 2/1"), again.get("3.ffn"), again.get("4.ffn")) == (0.25, 0.5, None)
    next(path.parent.iterdir()).write_bytes(b"torn")
    assert KeptDivergences(path).get("3.ffn") is None
    nowhere = KeptDivergences(None)
    nowhere.add({"3.ffn": 0.5})
    assert nowhere.get("3.ffn") == 0.5
