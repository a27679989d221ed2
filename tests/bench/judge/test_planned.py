from __future__ import annotations

from dataclasses import replace

import pytest
from support.bench_samples import measurement, result

from bench.judge.planned import planned_speed

BASE = [0.0100, 0.0101, 0.0099, 0.0102, 0.0100, 0.0098]
RUN = result(measurement("dense", [1.2 * t for t in BASE]), measurement("slim", BASE))


def test_a_plan_is_held_against_what_was_measured() -> None:
    peer = measurement("slim@llama.cpp", BASE, kind="llama.cpp")  # which may stand beside them
    run = replace(RUN, measurements=[*RUN.measurements, peer])
    told = planned_speed({"planned": {"speedup": 1.25}, "costs": {"threads": 1}}, run)
    assert told == "planned 1.250x with 1 thread, measured 1.200x (95 %: 1.200 to 1.200): -4.0%"


@pytest.mark.parametrize(
    "plan",
    [
        {},
        {"planned": {"ratio": 0.2}},
        {"planned": {"speedup": 1.25}, "costs": {"threads": 2}},
        {"planned": {"speedup": "x"}, "costs": 3},
        {"planned": {"speedup": 1.25}, "costs": {"threads": 1, "engine": "llama.cpp"}},
    ],
)
def test_a_plan_without_times_or_of_other_threads_is_not(plan: dict[str, object]) -> None:
    assert planned_speed(plan, RUN) is None
