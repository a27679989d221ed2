from __future__ import annotations

from pathlib import Path

import pytest

from bench.result import INVALID, OK, WARN
from bench.validity import Snapshot, counters, drift, judge, judge_sample, snapshot
from tests.bench_samples import measurement, sample

QUIET = {"steal_share": 0.0, "others_share": 0.01, "wait_share": 0.0, "swapped_pages": 0.0, "read_bytes": 4096.0}


def test_snapshot_of_a_fake_host(tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "stat").write_text(
        "cpu  9 9 9 9 9 9 9 9 9 9\ncpu0 100 10 20 900 5 1 2 30 0 0\ncpu1 7 7 7 7 7 7 7 7 0 0\nintr 5\n"
    )
    (tmp_path / "vmstat").write_text("nr_free 1\npswpin 3\npswpout 4\n")
    (tmp_path / "self/io").write_text("rchar: 1\nread_bytes: 8192\nwrite_bytes: 0\n")
    (tmp_path / "self/schedstat").write_text("1000 2500000000 7\n")
    seen = snapshot([0], tmp_path)
    assert seen.busy_s == pytest.approx(1.33) and seen.steal_s == pytest.approx(0.30)
    assert (seen.swapped_pages, seen.read_bytes, seen.wait_s) == (7, 8192, 2.5)
    assert snapshot([5], tmp_path).busy_s is None


def test_a_host_that_tells_nothing(tmp_path: Path) -> None:
    seen = snapshot([0], tmp_path)
    values = counters(seen, seen, 1)
    assert values["swapped_pages"] is None and values["read_bytes"] is None and values["steal_share"] is None
    assert judge_sample(values) == []


def test_counters_are_shares_of_the_cores() -> None:
    before = Snapshot(10.0, 1.0, 50.0, 5.0, 100, 1000, 0.5)
    after = Snapshot(12.0, 4.0, 53.4, 5.2, 103, 5000, 0.6)
    values = counters(before, after, cores=2)
    assert values == pytest.approx(
        {
            "wall_s": 2.0,
            "steal_share": 0.05,
            "others_share": 0.1,
            "wait_share": 0.05,
            "swapped_pages": 3,
            "read_bytes": 4000,
        }
    )


def test_short_intervals_have_no_shares() -> None:
    before, after = Snapshot(1.0, 0, 0, 0, 0, 0, 0), Snapshot(1.1, 0, 0.1, 0.1, 0, 0, 0)
    values = counters(before, after, cores=1)
    assert values["others_share"] is None and values["steal_share"] is None and values["swapped_pages"] == 0


def test_a_quiet_host_breaks_no_rule() -> None:
    assert judge_sample(QUIET) == []


@pytest.mark.parametrize(
    ("change", "status", "reason"),
    [
        ({"swapped_pages": 1.0}, INVALID, "swapped"),
        ({"read_bytes": 5e6}, INVALID, "read from storage"),
        ({"steal_share": 0.05}, WARN, "more than 2% of the cores"),
        ({"steal_share": 0.2}, INVALID, "more than 10% of the cores"),
        ({"others_share": 0.2}, WARN, "other processes"),
        ({"wait_share": 0.2}, WARN, "waited for a core"),
    ],
)
def test_each_rule(change: dict[str, float], status: str, reason: str) -> None:
    ((found, text),) = judge_sample({**QUIET, **change})
    assert found == status and reason in text


def _swapped(hit: int, total: int) -> tuple[str, list[str]]:
    samples = [sample([0.01] * 4, i, counters={**QUIET, "swapped_pages": float(i < hit)}) for i in range(total)]
    return judge(measurement("m", [], samples=samples), None, None)


def test_a_median_stands_until_half_of_its_repetitions_are_hit() -> None:
    assert _swapped(0, 5) == (OK, [])
    assert _swapped(2, 5) == (WARN, ["the host swapped during decode (2 of 5 repetitions)"])
    assert _swapped(3, 5)[0] == INVALID
    assert _swapped(2, 4)[0] == INVALID


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
    assert judge(measurement("m", [], samples=heating), None, None)[0] == WARN
    assert drift(steady[:1]) is None
