from dataclasses import replace

import pytest
from support.bench_samples import measurement, result

from bench.judge.planned import integers_alone, planned_speed

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


def test_integers_alone_are_told_beside_the_dense_model_in_the_default_group_size() -> None:
    assert integers_alone(RUN) is None
    run = replace(RUN, measurements=[*RUN.measurements, measurement("dense-g32", [1.5 * t for t in BASE])])
    alone = integers_alone(run)
    assert alone is not None and alone.startswith("as fast as dense-g32: dense, by its integers alone, 1.25x (95 %: ")
    assert "; slim 1.50x (95 %: " in alone
    told = planned_speed({"planned": {"speedup": 1.5}, "costs": {"threads": 1}}, run)  # it is beside groups of 32
    assert told is not None and told.startswith("planned 1.500x with 1 thread, measured 1.500x")
