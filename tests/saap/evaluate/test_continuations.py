"""Likelihoods of tails that share a context are those of reading every pair from its start."""

import random
import time
from itertools import chain

import numpy as np
import onnx
import pytest
import torch
from support.exported import export_bundle, export_portable
from support.family_cuts import CASES, dense_dir
from support.hostile import seal

from export.engine.scoring import BundleScorer
from saap.evaluate import continuations
from saap.evaluate.continuations import Group, cached_continuations, torch_continuations
from saap.models.checkpoint import load_model

__all__ = ["dense_dir"]


def some_groups(seed=0):
    """Contexts of 1 to 20 tokens, each with one to five tails of 1 to 12."""
    draw = random.Random(seed)

    def ids(most):
        return tuple(draw.randrange(3, 300) for _ in range(draw.randint(1, most)))

    drawn = [Group(ids(20), tuple(ids(12) for _ in range(draw.randint(1, 5)))) for _ in range(6)]
    return [*drawn, Group((7,), ((8,), (9,)))]


def one_by_one(model, groups):
    """Every pair from its start, as the definition says."""
    found = []
    for group in groups:
        found.append([])
        for tail in group.tails:
            ids = torch.tensor([group.context + tail])
            with torch.no_grad():
                logprobs = model(ids).logits[0, -len(tail) - 1 : -1].double().log_softmax(-1)
            told = logprobs[range(len(tail)), list(tail)].sum().item()
            found[-1].append((told, logprobs.argmax(-1).tolist() == list(tail)))
    return found


def assert_same(found, expected, tolerance):
    assert [len(group) for group in found] == [len(group) for group in expected]
    for ours, theirs in zip(chain(*found), chain(*expected), strict=True):
        assert ours[0] == pytest.approx(theirs[0], abs=tolerance)
        assert ours[1] == theirs[1]


@pytest.mark.parametrize("case", CASES)
def test_a_packed_row_tells_what_separate_rows_do(dense_dir, case):
    model, groups = load_model(dense_dir(case)), some_groups()
    assert_same(list(torch_continuations(model)(groups)), one_by_one(model, groups), 2e-4)


def test_neighbours_in_a_row_do_not_see_each_other(tiny_model, monkeypatch):
    model, groups = load_model(tiny_model()), some_groups(1)
    together = list(torch_continuations(model)(groups))
    monkeypatch.setattr(continuations, "PACKED_TOKENS", 1)
    assert_same(together, list(torch_continuations(model)(groups)), 2e-4)


def test_what_greedy_decoding_would_say_is_told(tiny_model):
    model = load_model(tiny_model())
    told = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)[0, 3:].tolist()
    other = [*told[:3], (told[3] + 1) % 300]
    [found] = torch_continuations(model)([Group((5, 6, 7), (tuple(told), tuple(other)))])
    assert [greedy for _, greedy in found] == [True, False]


@pytest.mark.parametrize("target", ["cpu", "portable"])
@pytest.mark.parametrize("case", ["llama", "mistral"])
def test_a_bundle_tells_what_its_model_does(dense_dir, tmp_path, case, target):
    directory = dense_dir(case)
    export = export_bundle if target == "cpu" else export_portable
    export(directory, tmp_path / "bundle", bits=32)
    groups = some_groups(2)
    expected = one_by_one(load_model(directory), groups)
    for workers in (1, 3):
        scorer = cached_continuations(BundleScorer(tmp_path / "bundle").read, workers)
        assert_same(list(scorer(groups)), expected, 2e-3)


def test_workers_answer_in_order_and_stop_when_nobody_asks_further():
    asked, tail = [], (1,)

    def read(ids, cache=None, last=False):
        number = int(ids[0, -1])
        asked.append(number)
        time.sleep(0.02 * (number % 3))  # a later group is done before an earlier one
        logits = np.zeros((1, 1, 4), np.float32)
        logits[0, 0, 1] = number
        return logits, None

    def told(number):
        return number - np.log(3 + np.exp(number))

    numbers = [2, 0, 1, 3, 5, 4] * 10
    groups = [Group((number,), (tail,)) for number in numbers]
    found = list(cached_continuations(read, workers=3)(groups))
    assert [answer[0] for (answer,) in found] == pytest.approx([told(number) for number in numbers])
    asked.clear()
    answers = cached_continuations(read, workers=3)(groups)
    assert next(answers)[0][0] == pytest.approx(told(2))
    answers.close()
    assert len(asked) < len(groups)


def test_what_goes_wrong_in_a_worker_is_told():
    def read(ids, cache=None, last=False):
        raise MemoryError("no room for a cache")

    with pytest.raises(MemoryError, match="no room"):
        list(cached_continuations(read, workers=2)(some_groups()))


@pytest.mark.parametrize("write", [export_bundle, export_portable], ids=["cpu", "portable"])
def test_of_a_context_only_the_last_logits_are_computed(tiny_model, tmp_path, write):
    write(tiny_model(), tmp_path / "bundle", bits=32)
    ids = np.arange(3, 13)[None]
    scorer = BundleScorer(tmp_path / "bundle")
    everything, cache = scorer.read(ids)
    last, same = scorer.read(ids, last=True)
    assert everything.shape == (1, 10, 320) and last.shape == (1, 1, 320)
    assert np.abs(last - everything[:, -1:]).max() <= 1e-5
    assert all(np.array_equal(cache[name], same[name]) for name in cache)
    # a graph that cannot be asked for less, such as that of an older bundle, or what optimum wrote
    path = tmp_path / "bundle/scoring.onnx"
    model = onnx.load(path, load_external_data=False)
    found = [given for given in model.graph.input if given.name == "first_logit"]
    assert found or write is export_portable
    for given in found:
        model.graph.input.remove(given)
        onnx.save(model, path)
        seal(tmp_path / "bundle")
        old = BundleScorer(tmp_path / "bundle").read(ids, last=True)[0]
        assert old.shape == (1, 1, 320) and np.abs(old - last).max() <= 1e-5


def test_a_cache_may_be_followed_more_than_once(tiny_model, tmp_path):
    export_bundle(tiny_model(), tmp_path / "bundle", bits=32)
    scorer = BundleScorer(tmp_path / "bundle")
    ids = np.arange(3, 13)[None]
    whole, _ = scorer.read(ids)
    _, cache = scorer.read(ids[:, :6])
    for _ in range(2):
        assert scorer.read(ids[:, 6:], cache)[0] == pytest.approx(whole[:, 6:], abs=1e-4)
