import math

import numpy as np
import pytest

from bench.measure.statistics import (
    Summary,
    bootstrap_ratio,
    difference_p_value,
    least_p_value,
    percentile,
    relative_half_width,
    relative_slope,
    summarize,
    typical,
)


def test_summary_of_known_values() -> None:
    summary = summarize([1.0, 2.0, 3.0, 4.0, 10.0])
    assert summary is not None
    assert (summary.median, summary.q1, summary.q3) == (3.0, 2.0, 4.0)
    assert percentile([10.0, 20.0], 95) == pytest.approx(19.5)


def test_nothing_is_unknown_not_zero() -> None:
    assert summarize([]) is None
    assert percentile([], 50) is None
    assert summarize([2.0]) == Summary(2.0, 2.0, 2.0)


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
    for paired in (False, True):
        assert bootstrap_ratio([2.0], [1.0], paired=paired) == (pytest.approx(0.5), 0.0, math.inf)
        assert relative_half_width([2.0], [1.0], paired) == math.inf
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap_ratio([], [1.0])


def test_interval_of_pairs_covers_under_drift_and_bursts() -> None:
    random = np.random.default_rng(4)
    covered = 0
    for seed in range(200):
        drift = np.exp(np.cumsum(random.normal(0, 0.05, 20)))
        noise = random.lognormal(0, 0.03, (2, 20)) * np.where(random.random((2, 20)) < 0.15, 1.2, 1.0)
        _, low, high = bootstrap_ratio(drift * noise[0], 1.05 * drift * noise[1], paired=True, resamples=300, seed=seed)
        covered += low <= 1.05 <= high
    assert 180 <= covered <= 198


def test_ratio_of_pairs_is_the_hodges_lehmann_estimate() -> None:
    # Walsh averages of 0, 1, 5: 0, 0.5, 1, 2.5, 3, 5
    ratio, _, _ = bootstrap_ratio([1.0, 1.0, 1.0], [math.exp(0), math.exp(1), math.exp(5)], paired=True)
    assert math.log(ratio) == pytest.approx(1.75)


def test_half_width_is_relative_to_the_ratio() -> None:
    old, new = np.linspace(1, 1.1, 12), np.linspace(2.1, 2, 12)
    ratio, low, high = bootstrap_ratio(old, new, paired=True)
    assert relative_half_width(old, new, True) == (high - low) / 2 / ratio
    assert relative_half_width(old, 3 * new, True) == pytest.approx(relative_half_width(old, new, True))


def test_exact_p_values() -> None:
    old, new = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0], [1.1, 2.3, 4.5, 9.6, 20.0, 41.0]
    assert difference_p_value(old, new, True) == (pytest.approx(2 / 64), "wilcoxon")
    assert difference_p_value(old[:3], [50.0, 60.0, 70.0], False) == (pytest.approx(2 / 20), "mann-whitney")
    assert difference_p_value(old, old, True) == (1.0, "wilcoxon")
    assert difference_p_value(old, old, False)[0] == pytest.approx(1.0)
    assert (least_p_value(6, 6, True), least_p_value(3, 3, False)) == (2 / 64, 2 / 20)
    assert difference_p_value(old, new[:5], True)[1] == "mann-whitney"  # a round is missing: no pairs


def test_ties_leave_the_p_value_exact() -> None:
    assert difference_p_value([1.0] * 5, [0.9] * 5, True)[0] == pytest.approx(2 / 32)
    assert difference_p_value([1.0] * 20, [0.9] * 20, True)[0] == pytest.approx(2 / 2**20)


def test_typical_step_ignores_a_burst() -> None:
    assert typical([2.0] * 5 + [9.0] * 3) == 2.0
    assert typical([1.0, 2.0, 3.0, 4.0, 5.0]) == 2.0
