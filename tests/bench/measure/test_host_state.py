import sys
import time
from pathlib import Path

import pytest
from support.fake_trees import plant

from bench.measure.host_state import counters, snapshot

STAT = "cpu  107 17 27 907 12 8 9 37 0 0\ncpu0 100 10 20 900 5 1 2 30 0 0\ncpu1 7 7 7 7 7 7 7 7 0 0\nprocs_running 4\n"
PROC = {
    "proc/stat": STAT,
    "proc/vmstat": "nr_free 1\npswpin 3\npswpout 4\n",
    "proc/meminfo": "MemTotal: 4000000 kB\nMemFree: 1 kB\nMemAvailable: 3000000 kB\n",
    "proc/pressure/memory": "some avg10=0.00 avg60=0.00 avg300=0.00 total=1500000\nfull avg10=0.00 total=9\n",
    "proc/sys/kernel/random/boot_id": "3f8a0c52-9d1e-4b7a-8a44-0123456789ab\n",
    "proc/self/status": "Name:\tRssAnon: 1\nRssAnon:\t  50000 kB\nRssFile:\t 7 kB\nRssShmem:\t  6000 kB\n",
    "proc/self/io": "rchar: 1\nread_bytes: 8192\nwrite_bytes: 0\n",
    "proc/self/schedstat": "1000 2500000000 7\n",
    "proc/self/task/1/stat": "1 (python) R 0 1\n",
    "proc/self/task/2/stat": "2 (a ) S x) R 0 1\n",
    "proc/self/task/3/stat": "3 (idle) S 0 1\n",
}


def test_snapshot_of_a_fake_host(tmp_path: Path) -> None:
    plant(tmp_path, PROC)
    seen = snapshot([0], tmp_path)
    assert (seen.busy_s, seen.all_busy_s, seen.steal_s) == pytest.approx((1.33, 1.68, 0.30))
    assert (seen.swapped_pages, seen.read_bytes, seen.wait_s, seen.memory_stall_s) == (7, 8192, 2.5, 1.5)
    assert seen.runnable == 2  # four run, of which two are threads of this process
    assert (seen.memory_bytes, seen.room_bytes) == (4_096_000_000, 3_056_000 * 1024)
    assert seen.boot_id == 0x3F8A0C529D1E
    assert snapshot([5], tmp_path).busy_s is None and snapshot([5], tmp_path).all_busy_s == pytest.approx(1.68)


def test_a_host_that_tells_nothing(tmp_path: Path) -> None:
    seen = snapshot([0], tmp_path)
    assert {key for key, value in counters(seen, seen, 1).items() if value is not None} == {"wall_s"}


def test_counters_are_what_changed_in_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wall, process = iter([10.0, 12.0]), iter([1.0, 4.0])
    monkeypatch.setattr("time.perf_counter", wall.__next__)
    monkeypatch.setattr("time.process_time", process.__next__)
    before = snapshot([0, 1], plant(tmp_path, PROC))
    changed = {
        # 3.4 s more on the chosen cores, of which 3 by this process; 1 s on another
        "proc/stat": "cpu  547 17 27 0 0 8 9 57 0 0\ncpu0 270 10 20 0 0 1 2 50 0 0\ncpu1 177 7 7 7 7 7 7 7 0 0\n"
        "procs_running 3\n",
        "proc/vmstat": "pswpin 5\npswpout 5\n",
        "proc/meminfo": "MemTotal: 4000000 kB\nMemAvailable: 2500000 kB\n",
        "proc/pressure/memory": "some avg10=0.00 total=1600000\n",
        "proc/self/status": "RssAnon:\t 450000 kB\nRssShmem:\t 6000 kB\n",
        "proc/self/io": "read_bytes: 12288\n",
        "proc/self/schedstat": "1000 2600000000 7\n",
    }
    values = counters(before, snapshot([0, 1], plant(tmp_path, changed)), cores=2)
    known = {key: value for key, value in values.items() if value is not None}
    assert known == pytest.approx(
        {
            "wall_s": 2.0,
            "steal_share": 0.05,
            "neighbours_cores": 0.7,
            "elsewhere_cores": 0.5,
            "runnable_others": 1,
            "wait_share": 0.05,
            "swapped_pages": 3,
            "read_bytes": 4096,
            "memory_stall_share": 0.05,
            "memory_bytes": 4_096_000_000,
            "room_bytes": 2_956_000 * 1024,
            "taken_bytes": 100_000 * 1024,  # 500 000 kB less, of which this process took 400 000
            "boot_id": 0x3F8A0C529D1E,
        }
    )


def test_short_intervals_have_no_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.perf_counter", iter([1.0, 1.1]).__next__)
    before = snapshot([0], plant(tmp_path, PROC))
    values = counters(before, snapshot([0], tmp_path), cores=1)
    shares = ("steal_share", "neighbours_cores", "elsewhere_cores", "wait_share", "memory_stall_share")
    assert {values[name] for name in shares} == {None}
    assert values["swapped_pages"] == 0 and values["runnable_others"] == 2


def test_this_host_is_read_quickly() -> None:
    best = 1.0
    for _ in range(5):
        start = time.process_time()
        seen = snapshot([0])
        best = min(best, time.process_time() - start)
    assert best < 0.005
    if sys.platform == "linux":
        assert seen.busy_s and seen.all_busy_s and seen.memory_bytes and seen.room_bytes
        assert seen.room_bytes < seen.memory_bytes * 1.01
