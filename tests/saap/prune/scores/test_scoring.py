"""Scores are kept portion by portion, so that a run that was killed goes on."""

import pytest
import torch

from saap.models.architectures import shape_of
from saap.models.checkpoint import load_model
from saap.models.streaming import load_streamed
from saap.prune.options import AdaptiveOptions, FusionOptions
from saap.prune.scores import scoring
from saap.prune.scores.importance import estimate
from saap.prune.scores.layerwise import rows_at_once
from saap.prune.scores.scoring import scores_of

IDS = torch.randint(0, 300, (5, 24), generator=torch.Generator().manual_seed(3))


def adaptive(element):
    """Options that need this form of the element score."""
    return AdaptiveOptions(FusionOptions("token" if element == "none" else "element"), exact=element == "exact")


def close(ours, theirs):
    for part in ("products", "element", "token"):
        mine, other = getattr(ours, part), getattr(theirs, part)
        assert mine.keys() == other.keys()
        for key, numbers in other.items():
            assert torch.allclose(mine[key], numbers, rtol=1e-4, atol=1e-5 * float(numbers.abs().max())), (part, key)
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-6) and ours.c == theirs.c


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("element", ["none", "streamed", "exact"])
def test_portions_add_up_to_the_whole(element, streaming, tiny_model, monkeypatch):
    path = tiny_model()
    whole = load_model(path)
    shape = shape_of(whole.config)
    monkeypatch.setattr(scoring, "PORTION", 2)
    monkeypatch.setattr("saap.prune.scores.layerwise.STATE_BYTES", 2 * 24 * 4 * shape.hidden * (len(shape.layers) + 1))
    assert rows_at_once(shape, 24) == 2
    said = []
    model = load_streamed(path) if streaming else whole
    found = scores_of(model, shape, IDS, adaptive(element), progress=lambda *report: said.append(report))
    close(found, estimate(whole, shape, IDS, c=24.0, element=element))
    counts = [done for _, done, _ in said]
    assert counts == sorted(counts) and counts[0] == 0 and said[-1][1] == said[-1][2]
    assert len({total for *_, total in said}) == 1


@pytest.mark.parametrize("streaming", [False, True])
def test_a_killed_run_goes_on_at_the_portion_where_it_stopped(streaming, tiny_model, monkeypatch):
    path = tiny_model()
    model = load_streamed(path) if streaming else load_model(path)
    shape = shape_of(model.config)
    monkeypatch.setattr(scoring, "PORTION", 2)
    monkeypatch.setattr("saap.prune.scores.layerwise.STATE_BYTES", 2 * 24 * 4 * shape.hidden * (len(shape.layers) + 1))
    undisturbed = scores_of(model, shape, IDS, adaptive("none"))
    name = "estimate_layerwise" if streaming else "estimate"
    estimator, scored, left = getattr(scoring, name), [], [2]

    def killed(*args, **options):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        scored.append(len(args[2]))
        return estimator(*args, **options)

    monkeypatch.setattr(scoring, name, killed)
    with pytest.raises(KeyboardInterrupt):
        scores_of(model, shape, IDS, adaptive("none"), weights="w")
    left[0] = 9
    said = []
    again = scores_of(model, shape, IDS, adaptive("none"), weights="w", progress=lambda *report: said.append(report))
    assert scored == [2, 2, 1]
    assert said[0][1] / said[0][2] >= 4 / 5  # time left is of what is left
    for key, numbers in undisturbed.products.items():
        assert torch.equal(again.products[key], numbers)
    assert again.loss == undisturbed.loss
