from typing import Any

import pytest
from support.bench_samples import measurement, sample

from bench.measure.result import INVALID, OK, WARN
from bench.measure.validity import drift, judge

# What a host that tells everything tells when all is well.
QUIET: dict[str, float | None] = {
    "wall_s": 1.0, "steal_share": 0.0, "neighbours_cores": 0.02, "elsewhere_cores": 0.01,
    "runnable_others": 1, "wait_share": 0.0, "swapped_pages": 0.0, "read_bytes": 4096.0, "memory_stall_share": 0.0,
    "memory_bytes": 8e9, "room_bytes": 6e9, "taken_bytes": 2e7, "boot_id": 12345, "clock_share": 1.0, "fixed_clock": 1,
    "temperature_c": 60.0, "temperature_start_c": 50.0, "firmware_throttled": 0, "throttle_events": 0,
    "cooling_state": 0, "oc1_events": 0, "oc2_events": 0, "oc3_events": 0, "mixed_cores": 0, "smt_siblings": 0,
    "clock_drift": 0.02, "clock_limit": 0.03, "clock_s": 0.001,
}  # fmt: skip


def judged(changes: list[dict[str, float | None]], **fields: Any) -> tuple[str, list[str]]:
    """Repetitions on a quiet host but for these changes."""
    samples = [sample([0.01] * 4, i, counters={**QUIET, **change}, **fields) for i, change in enumerate(changes)]
    return judge(measurement("m", [], samples=samples), None, None)


def test_a_host_that_is_quiet_or_tells_nothing_breaks_no_rule() -> None:
    assert judged([{}] * 5, steady=True) == (OK, [])
    assert judged([dict.fromkeys(QUIET)] * 5) == (OK, [])
    empty = [sample([0.01] * 4, i) for i in range(5)]
    assert judge(measurement("m", [], samples=empty), None, None) == (OK, [])


@pytest.mark.parametrize(
    ("change", "status", "reason"),
    [
        ({"firmware_throttled": 5}, INVALID, "the firmware reported under-voltage, throttling: "),
        ({"firmware_throttled": 10}, INVALID, "the firmware reported a capped clock, the soft temperature limit: "),
        ({"throttle_events": 3}, INVALID, "the CPU throttled 3 times for heat"),
        ({"cooling_state": 2}, INVALID, "cooling slowed the processor (state 2)"),
        ({"oc1_events": 4}, INVALID, "under-voltage, 4 OC1 events"),
        ({"swapped_pages": 7}, INVALID, "swapped 7 pages"),
        ({"read_bytes": 5e6}, INVALID, "5 MB were read from storage"),
        ({"memory_stall_share": 0.03}, INVALID, "tasks waited 3% of the time for memory"),
        ({"steal_share": 0.2}, INVALID, "the hypervisor took 20% of the cores' time"),
        ({"clock_drift": 0.08}, INVALID, "fixed work took 8% more time after decode"),
        ({"clock_drift": -0.08}, INVALID, "fixed work took 8% less time after decode"),
        ({"steal_share": 0.05}, WARN, "the hypervisor took 5% of the cores' time"),
        ({"oc2_events": 1}, WARN, "1 OC2 events"),
        ({"oc3_events": 6}, WARN, "6 OC3 events"),
        ({"wait_share": 0.2}, WARN, "waited for a core 20% of the time"),
        ({"wait_share": 0.25}, INVALID, "waited for a core 25% of the time: end other programs"),
        ({"fixed_clock": 0}, WARN, "governor"),
        ({"clock_share": 0.8}, WARN, "a core ran at 80% of its highest clock"),
        ({"mixed_cores": 1}, WARN, "fast and slow cores were mixed"),
        ({"smt_siblings": 2}, WARN, "2 CPUs shared cores"),
        ({"neighbours_cores": 0.5}, WARN, "other processes used 0.5 of the chosen cores"),
        ({"neighbours_cores": 1.0, "elsewhere_cores": 0.95}, WARN, "used 0.9 of the other cores, which share the mem"),
        ({"neighbours_cores": None, "runnable_others": 2}, WARN, "2 threads of other processes ran"),
        ({"neighbours_cores": None, "runnable_others": 1}, WARN, "1 thread of other processes ran"),
        ({"taken_bytes": 5e8}, WARN, "other processes took 500 MB of memory"),
        ({"taken_bytes": 2.6e8, "memory_bytes": 1e9}, WARN, "other processes took 260 MB of memory"),
    ],
)
def test_each_rule(change: dict[str, float | None], status: str, reason: str) -> None:
    got, (told,) = judged([change] * 5)
    assert got == status and reason in told and told.endswith(" (5 of 5 repetitions)")


@pytest.mark.parametrize(
    "change",
    [
        {"steal_share": 0.02},
        {"read_bytes": 1e6},
        {"memory_stall_share": 0.01},
        {"clock_drift": 0.08, "clock_limit": 0.09},
        {"clock_drift": 0.08, "clock_limit": None},
        {"clock_share": 0.95},
        {"wall_s": 0.25, "neighbours_cores": 0.19},  # under five ticks in all
        {"taken_bytes": 3.9e8},  # under 5 % of 8 GB
        {"taken_bytes": 2.5e8, "memory_bytes": 1e9},
        {"taken_bytes": -5e9},
    ],
)
def test_under_the_limit(change: dict[str, float | None]) -> None:
    assert judged([change]) == (OK, [])


def test_neighbours_on_both_kinds_of_cores_are_told_apart() -> None:
    status, (here, elsewhere) = judged([{"neighbours_cores": 1.5, "elsewhere_cores": 1.0}])
    assert status == WARN and "0.5 of the chosen cores" in here and "1.0 of the other cores" in elsewhere


@pytest.mark.parametrize(
    ("hit", "total", "status"), [(0, 5, OK), (2, 5, WARN), (3, 5, INVALID), (2, 4, INVALID), (1, 1, INVALID)]
)
def test_a_median_stands_until_half_of_its_repetitions_are_hit(hit: int, total: int, status: str) -> None:
    got, reasons = judged([{"swapped_pages": float(i < hit)} for i in range(total)])
    assert got == status
    noun = "repetition" if total == 1 else "repetitions"
    told = [f"the host swapped 1 pages during decode: free memory ({hit} of {total} {noun})"]
    assert reasons == (told if hit else [])


STEALING = [{"steal_share": share} for share in (0.03, 0.12, 0.30, 0.0, 0.05)]
CLOCKS = [{"clock_s": seconds} for seconds in (0.001, 0.00105, 0.0012)]
HOG = [{"room_bytes": room} for room in (6e9, 6.1e9, 3e9, 3e9)]


@pytest.mark.parametrize(
    ("changes", "steady", "status", "reasons"),
    [
        (STEALING, True, WARN, ["the hypervisor took 30% of the cores' time (4 of 5 repetitions)"]),  # the worst
        ([{}] * 3, False, WARN, ["warm-up had not become steady when it ended: leave the machine alone (3 of 3 rep"]),
        ([{}, {}, {"boot_id": 54321}], True, INVALID, ["the host was restarted between repetitions"]),
        (CLOCKS, True, WARN, ["the core's clock differed by 20% between repetitions"]),
        ([{"clock_s": seconds} for seconds in (0.001, 0.00109)], True, OK, []),
        (HOG, True, WARN, ["other processes took or freed 3100 MB of memory during the run"]),
    ],
)
def test_what_several_repetitions_tell(
    changes: list[dict[str, float | None]], steady: bool, status: str, reasons: list[str]
) -> None:
    found, told = judged(changes, steady=steady)
    assert found == status and len(told) == len(reasons)
    assert all(text.startswith(reason) for text, reason in zip(told, reasons, strict=True))


def test_above_the_ceiling_is_invalid_when_the_cache_is_known() -> None:
    m = measurement("m", [0.01] * 3)  # 100 tok/s
    assert judge(m, 96.0, 1000) == (OK, [])
    status, reasons = judge(m, 95.0, 1000)
    assert status == INVALID and reasons == ["100.0 tok/s is above the memory ceiling of 95.0 tok/s"]
    assert judge(m, 95.0, None) == (OK, [])
    assert judge(m, None, 1000) == (OK, [])


def test_drift_is_over_the_run_and_not_over_depth() -> None:
    deeper_is_slower = [0.010, 0.011, 0.012, 0.013]
    steady = [sample(deeper_is_slower, i) for i in range(5)]
    assert drift(steady) == pytest.approx(0)
    heating = [sample([t * (1 + 0.05 * i) for t in deeper_is_slower], i) for i in range(5)]
    assert drift(heating) == pytest.approx(0.2 / 1.1 * 19 / 16, rel=0.2)
    cooling = [sample([0.01 * 0.7**i] * 4, i) for i in range(5)]  # by more than its median
    for samples, told in ((heating, "rose over the run, by 2"), (cooling, "fell over the run, by 1")):
        status, reasons = judge(measurement("m", [], samples=samples), None, None)
        assert status == WARN and told in reasons[0] and reasons[0].endswith("% of its median")
    assert drift(steady[:1]) is None


def test_repetitions_without_single_tokens_have_no_drift() -> None:
    assert drift([sample([], i, decode_s=1.0 + i) for i in range(5)]) is None
    mixed = [sample([], 0), *(sample([0.01] * 4, i) for i in range(1, 5))]
    assert drift(mixed) == pytest.approx(0)
    assert judge(measurement("m", [], n_gen=0, samples=[sample([], i) for i in range(3)]), 10.0, 1000) == (OK, [])
    assert judge(measurement("m", []), 10.0, 1000) == (OK, [])  # none at all
