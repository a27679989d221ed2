from __future__ import annotations

import time
import tracemalloc

import numpy as np
import pytest

from bench.measure.cores import IDLE_PROBES, drift, level, probe_clock

IDLE = list(1e-3 + 4e-6 * np.random.default_rng(0).standard_normal(IDLE_PROBES))  # a spread of 0.4 %


def slowed(factor: float) -> list[float]:
    return [seconds * factor for seconds in IDLE]


def test_each_probe_is_timed_by_the_clock_that_was_given() -> None:
    ticks = iter(range(100))
    assert probe_clock(20, lambda: float(next(ticks))) == [1.0] * 20


def test_a_probe_takes_about_a_millisecond_and_allocates_nothing() -> None:
    probe_clock(20)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        probes = probe_clock(20)
        assert tracemalloc.get_traced_memory()[1] - before < 4096  # the list of its times
    finally:
        tracemalloc.stop()
    assert 5e-5 < level(probes) < 1e-2


@pytest.mark.parametrize(("factor", "moved"), [(1.0, False), (1.02, False), (1.04, True), (1 / 0.9, True), (0.9, True)])
def test_drift_beyond_three_percent(factor: float, moved: bool) -> None:
    change, limit = drift(IDLE, slowed(factor))
    assert change == pytest.approx(factor - 1) and limit == 0.03
    assert (abs(change) > limit) is moved


def test_a_noisy_side_widens_the_limit() -> None:
    noisy = [1e-3 * (1 + 0.1 * (i % 3)) for i in range(30)]  # median 1.1 ms, half of them 0.1 ms away
    assert drift(IDLE, noisy)[1] == pytest.approx(4 * 0.1 / 1.1)
    assert drift(noisy, IDLE)[1] == drift(IDLE, noisy)[1]


def test_preempted_probes_do_not_look_like_a_slower_clock() -> None:
    preempted = [seconds + 4e-3 * (i % 10 < 4) for i, seconds in enumerate(IDLE)]
    change, limit = drift(IDLE, preempted)
    assert abs(change) < 0.005 < limit


def test_twice_the_work_takes_twice_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    once = level(probe_clock(30, time.perf_counter))
    monkeypatch.setattr("bench.measure.cores.ROUNDS", 128)
    assert level(probe_clock(30, time.perf_counter)) / once == pytest.approx(2, rel=0.25)
