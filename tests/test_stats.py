from __future__ import annotations

import math

import numpy as np
import pytest

from bench.stats import bootstrap_ratio, percentile, relative_slope, summarize


def test_summary_of_known_values() -> None:
    summary = summarize([1.0, 2.0, 3.0, 4.0, 10.0])
    assert summary is not None
    assert (summary.n, summary.mean, summary.median, summary.q1, summary.q3, summary.iqr) == (
        5,
        4.0,
        3.0,
        2.0,
        4.0,
        2.0,
    )
    assert summary.stddev == pytest.approx(math.sqrt(12.5))


def test_nothing_is_unknown_not_zero() -> None:
    assert summarize([]) is None
    assert percentile([], 50) is None
    single = summarize([2.0])
    assert single is not None and single.stddev is None


def test_percentile_interpolates() -> None:
    assert percentile([10.0, 20.0], 95) == pytest.approx(19.5)


def test_slope_sees_a_trend_and_not_a_spike() -> None:
    flat = [1.0] * 50
    assert relative_slope(flat) == 0.0
    assert relative_slope([*flat[:20], 30.0, *flat[20:]]) == 0.0
    rising = list(np.linspace(1.0, 1.2, 50))
    assert relative_slope(rising) == pytest.approx(0.2 / 1.1)
    assert relative_slope([1.0, 2.0, 3.0]) is None


def test_bootstrap_interval_covers_a_known_ratio() -> None:
    random = np.random.default_rng(0)
    covered = 0
    for seed in range(100):
        a, b = random.normal(1.0, 0.05, 20), random.normal(0.9, 0.05, 20)
        ratio, low, high = bootstrap_ratio(a, b, resamples=400, seed=seed)
        assert low <= ratio <= high
        covered += low <= 0.9 <= high
    assert 88 <= covered <= 100


def test_pairs_cancel_what_hit_both() -> None:
    rounds = np.random.default_rng(1).uniform(1.0, 2.0, 12)
    _, low, high = bootstrap_ratio(rounds, 0.9 * rounds, paired=True)
    assert (low, high) == (pytest.approx(0.9), pytest.approx(0.9))
    _, low, high = bootstrap_ratio(rounds, 0.9 * rounds)
    assert high - low > 0.1


def test_a_single_value_has_no_interval() -> None:
    assert bootstrap_ratio([2.0], [1.0]) == (0.5, 0.0, math.inf)
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap_ratio([], [1.0])
