import numpy as np
import pytest
import torch

from export.bundle.tokenizer import RunError
from export.generate.sampling import GREEDY, Sampling

LOGITS = np.random.default_rng(4).normal(scale=3, size=200).astype(np.float32)
SEEN = [3, 5, 5, 17, int(LOGITS.argmax())]


def transformers_distribution(sampling):
    """Probabilities as transformers' own processors leave them, in the order that its generate applies them."""
    from transformers import generation as g

    steps = [g.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)]
    steps.append(g.TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k is not None:
        steps.append(g.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(g.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0:
        steps.append(g.MinPLogitsWarper(sampling.min_p))
    scores = torch.tensor(LOGITS, dtype=torch.float64)[None]
    for step in steps:
        scores = step(torch.tensor([SEEN]), scores)
    return scores.softmax(-1)[0].numpy()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.3},
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 500},
        {"top_p": 0.6},
        {"top_p": 1e-6},
        {"min_p": 0.05},
        {"min_p": 1.0},
        {"repetition_penalty": 1.4},
        {"temperature": 2.0, "top_k": 50, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2},
    ],
)
def test_the_distribution_is_that_of_transformers(settings):
    from export.generate.sampling import _penalised

    sampling = Sampling(**{"temperature": 1.0, **settings})
    expected = transformers_distribution(sampling)
    tokens, weights = sampling._distribution(_penalised(LOGITS, SEEN, sampling.repetition_penalty))
    found = np.zeros(len(LOGITS))
    found[tokens] = weights / weights.sum()
    np.testing.assert_allclose(found, expected, atol=1e-9)
    assert set(tokens.tolist()) == set(np.flatnonzero(expected).tolist())


def test_draws_follow_the_distribution_and_the_seed():
    sampling = Sampling(temperature=2.0, top_k=4)
    tokens, weights = sampling._distribution(LOGITS.astype(np.float64))
    draw, again, other = sampling.sampler(), sampling.sampler(), Sampling(temperature=2.0, top_k=4, seed=1).sampler()
    drawn = [draw(LOGITS, []) for _ in range(4000)]
    share = np.bincount(drawn, minlength=len(LOGITS)) / len(drawn)
    np.testing.assert_allclose(share[tokens], weights / weights.sum(), atol=0.033)  # 4 standard errors
    assert set(drawn) == set(tokens.tolist())
    assert drawn[:50] == [again(LOGITS, []) for _ in range(50)] != [other(LOGITS, []) for _ in range(50)]


def test_greedy_takes_the_likeliest_that_the_penalty_leaves():
    best, second = np.argsort(-LOGITS)[:2]
    assert GREEDY.sampler()(LOGITS, SEEN) == best
    before = LOGITS.copy()
    assert Sampling(repetition_penalty=3.0).sampler()(LOGITS, SEEN) == second
    assert np.array_equal(before, LOGITS), "the decoder's buffer was written into"
    negative = np.array([-1.0, -2.0, -3.0], np.float32)
    assert Sampling(repetition_penalty=2.5).sampler()(negative, [0, 0]) == 1  # -1 becomes -2.5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [[0, np.nan, 9], [np.inf, 0, 1], [-np.inf] * 3])
def test_logits_that_are_not_finite_are_not_turned_into_text(temperature, bad):
    with pytest.raises(RunError, match="not finite"):
        Sampling(temperature=temperature).sampler()(np.array(bad, np.float32), [])


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        *(({"temperature": bad}, "0 .greedy. or more") for bad in (-1.0, float("nan"), float("inf"))),
        ({"top_k": 0}, "1 or more"),
        *(({"top_p": bad}, "more than 0 and at most 1") for bad in (0.0, 1.1, float("nan"))),
        *(({"min_p": bad}, "0 to 1") for bad in (-0.1, 1.1, float("nan"))),
        *(({"repetition_penalty": bad}, "more than 0") for bad in (0.0, -1.0, float("nan"), float("inf"))),
        ({"seed": -1}, "0 or more"),
    ],
)
def test_values_out_of_range_are_refused(settings, allowed):
    with pytest.raises(RunError, match=f"out of range: give {allowed}"):
        Sampling(**settings)
