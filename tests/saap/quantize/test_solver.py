import itertools

import numpy as np
import pytest

from saap.quantize.solver import least_price, one_for_each, within


def test_the_answer_is_the_best_of_all_choices():
    random = np.random.default_rng(3)
    counts = (3, 2, 6, 1, 4)
    prices = [random.random(n) for n in counts]
    sizes = [random.integers(1, 20, n).astype(float) for n in counts]
    every = list(itertools.product(*map(range, counts)))
    owners, options = np.repeat(np.arange(len(counts)), counts), np.arange(sum(counts))
    each = one_for_each(owners, options, (len(counts), sum(counts)))

    def total(of, choice):
        return sum(part[n] for part, n in zip(of, choice, strict=True))

    least = sum(part.min() for part in sizes)
    for room in (least, least + 6, least + 20):
        fitting = [choice for choice in every if total(sizes, choice) <= room]
        answer = least_price(np.concatenate(prices), [each, within(np.concatenate(sizes), room)])
        chosen = [int(part.argmax()) for part in np.split(answer.x, np.cumsum(counts)[:-1])]
        assert tuple(chosen) in fitting
        assert total(prices, chosen) == pytest.approx(min(total(prices, choice) for choice in fitting))
    assert least_price(np.concatenate(prices), [each, within(np.concatenate(sizes), least - 1)]).x is None
