from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from bench.compare import NOT_COMPARABLE, compare
from bench.edge import EdgeClass, bench_emulated, edge_class, notes
from bench.peer import PeerError
from bench.plan import Plan
from bench.result import INVALID, OK, WARN, Result
from devices.cgroup import CgroupError, MemoryGroup, limited_memory
from devices.profile import load_profile
from export.bundle import LayerSizes
from tests.bench_samples import measurement, result
from tests.tiny_graphs import tiny_bundle

MB = 1_000_000
PI = EdgeClass("raspberry-pi-5", "Raspberry Pi 5", 4, None, 4_000 * MB, "as given", 17.1e9, "LPDDR4X")
ALLOCATE = "block = bytearray({size} << 20); block[::4096] = bytes(len(block[::4096])); print(len(block) >> 20)"


@pytest.fixture
def group() -> Iterator[MemoryGroup]:
    """A real group of 64 MB."""
    with _or_skip() as made:
        yield made


def _or_skip():
    manager = limited_memory(64 * MB)
    try:
        made = manager.__enter__()
    except CgroupError as error:
        pytest.skip(f"no memory limit can be set here: {error}")

    class Entered:
        def __enter__(self) -> MemoryGroup:
            return made

        def __exit__(self, *_: object) -> None:
            manager.__exit__(None, None, None)

    return Entered()


def start(group: MemoryGroup, megabytes: int) -> subprocess.CompletedProcess[str]:
    command = [*group.launcher, sys.executable, "-I", "-c", ALLOCATE.format(size=megabytes)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_process_within_the_limit_runs(group: MemoryGroup) -> None:
    done = start(group, 16)
    assert (done.returncode, done.stdout.strip(), group.oom_kills()) == (0, "16", 0)


def test_a_process_beyond_the_limit_is_killed_and_counted(group: MemoryGroup) -> None:
    done = start(group, 128)
    assert done.returncode == -9 and not done.stdout and group.oom_kills() == 1


def test_the_group_goes_away_and_its_maker_was_never_in_it() -> None:
    with _or_skip() as made:
        assert str(os.getpid()) not in (made.path / "cgroup.procs").read_text().split()
    assert not made.path.exists()


def test_what_a_killed_process_of_this_number_left_is_no_obstacle() -> None:
    with _or_skip() as made:
        place = made.path
    place.mkdir()
    try:
        with limited_memory(64 * MB) as group:
            assert group.path == place
    finally:
        assert not place.exists()


def test_a_model_that_does_not_fit_is_invalid_and_the_parent_lives(tmp_path: Path) -> None:
    """The runtime needs more than 40 MB and the copies of these weights that its kernels want another 100."""
    with _or_skip():
        pass
    bundle = tiny_bundle(tmp_path / "wide", layers=[LayerSizes(4, 2, 200_000)])
    small = replace(PI, memory_bytes=64 * MB)
    found = bench_emulated([str(bundle)], Plan(prompt=4, generate=4, threads=1, repetitions=3), small)
    (m,) = found.measurements
    assert m.status == INVALID and not m.samples
    assert m.reasons[0].startswith("killed by the memory limit of 64 MB (raspberry-pi-5)")
    assert found.settings["emulated"]["processes_killed"] >= 1


def test_one_that_fits_is_measured_inside(tmp_path: Path) -> None:
    with _or_skip():
        pass
    bundle = tiny_bundle(tmp_path / "tiny")
    before = os.sched_getaffinity(0)
    enough = replace(PI, cores=1, memory_bytes=600 * MB)
    found = bench_emulated([str(bundle)], Plan(prompt=4, generate=4, repetitions=3), enough)
    (m,) = found.measurements
    assert len(m.samples) == 3 and m.n_threads == 1  # the only core
    assert os.sched_getaffinity(0) == before
    assert found.device["emulated"] == "raspberry-pi-5, 1 cores, 600 MB"


class Host:
    """Stands in for bench()."""

    def __init__(self, **fields: object) -> None:
        self.fields, self.plan = fields, None

    def __call__(self, specs: object, plan: Plan, **_: object) -> Result:
        self.plan = plan
        return result(measurement("tiny", [0.01] * 6, **self.fields), fingerprint="a" * 16)


def without_groups(root: Path) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text("0::/\n")
    (root / "proc/meminfo").write_text("MemTotal:       16000000 kB\n")
    return root


def test_without_a_group_it_warns_and_says_why(tmp_path: Path) -> None:
    host = Host()
    found = bench_emulated(["tiny"], Plan(root=without_groups(tmp_path)), PI, run=host)
    (m,) = found.measurements
    assert m.status == WARN and "memory is not limited: no control group" in m.reasons[0]
    assert "systemd-run --user --scope" in m.reasons[0] and host.plan.launch == ()


def test_a_host_that_is_no_larger_needs_no_group(tmp_path: Path) -> None:
    found = bench_emulated(
        ["tiny"], Plan(root=without_groups(tmp_path)), replace(PI, memory_bytes=32_000 * MB), run=Host()
    )
    assert found.measurements[0].reasons == [
        "memory is not limited: this host has 16384 MB, no more than raspberry-pi-5"
    ]


def test_notes_say_whose_rates_they_are_and_mark_the_projection(tmp_path: Path) -> None:
    found = bench_emulated(["tiny"], Plan(root=without_groups(tmp_path)), PI, run=Host())
    first, second = notes(found)
    assert "Rates are this host's, not those of raspberry-pi-5" in first
    per_token = found.measurements[0].bytes_per_token
    assert second.startswith("projection, not measured:") and f"under {17.1e9 / per_token:.0f} tok/s" in second


def test_no_projection_without_a_bandwidth_or_for_an_invalid_run(tmp_path: Path) -> None:
    root = without_groups(tmp_path)
    unknown = replace(PI, bandwidth=None, bandwidth_source="the profile holds no bandwidth")
    assert notes(bench_emulated(["t"], Plan(root=root), unknown, run=Host()))[1:] == [
        "no projection for raspberry-pi-5: the profile holds no bandwidth"
    ]
    assert len(notes(bench_emulated(["t"], Plan(root=root), PI, run=Host(status=INVALID)))) == 1


def test_no_projection_for_what_may_run_from_cache(tmp_path: Path) -> None:
    cached = replace(PI, cache_bytes=2 * MB)
    (_, told) = notes(bench_emulated(["t"], Plan(root=without_groups(tmp_path)), cached, run=Host()))
    assert told == "no projection for tiny: on raspberry-pi-5 it may run from cache"


def test_it_does_not_compare_with_the_host_itself(tmp_path: Path) -> None:
    plain = Host()([], Plan())
    limited = bench_emulated(["tiny"], Plan(root=without_groups(tmp_path)), PI, run=Host())
    (row,) = compare(plain, limited).rows
    assert row.verdict == NOT_COMPARABLE and "emulated" in row.reason


def test_a_kill_without_the_limit_keeps_its_own_words(tmp_path: Path) -> None:
    failed = Host(samples=[], status=INVALID, reasons=["killed by SIGKILL"])
    found = bench_emulated(["tiny"], Plan(root=without_groups(tmp_path)), PI, run=failed)
    assert found.measurements[0].reasons[0] == "killed by SIGKILL"


def test_fast_cores_are_the_default_threads(tmp_path: Path) -> None:
    host = Host()
    mixed = replace(PI, cores=8, fast_cores=1)
    bench_emulated(["tiny"], Plan(root=without_groups(tmp_path)), mixed, run=host)
    assert host.plan.threads == 1


def test_a_board_of_several_sizes_asks_which() -> None:
    pi4 = load_profile("raspberry-pi-4")
    with pytest.raises(PeerError, match="--emulate-memory"):
        edge_class("raspberry-pi-4", pi4)
    edge = edge_class("raspberry-pi-4", pi4, 2 * 10**9)
    assert (edge.cores, edge.memory_bytes, edge.bandwidth) == (4, 2 * 10**9, 12.8e9)


def test_a_board_of_one_size_leaves_its_system_some() -> None:
    edge = edge_class("jetson-orin-nano", load_profile("jetson-orin-nano"))
    assert edge.memory_bytes is not None and 6.5e9 < edge.memory_bytes < 7.5e9
    assert "for the system" in edge.memory_source


def test_a_gpu_is_refused() -> None:
    with pytest.raises(PeerError, match="--provider cuda"):
        bench_emulated(["tiny"], Plan(provider="cuda"), PI, run=Host())


def fake(root: Path, lines: str, files: dict[str, str]) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(lines)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_version_2_takes_the_nearest_group_that_passes_memory_on(tmp_path: Path) -> None:
    """As systemd lays it out: the scope has processes, the slice above passes the controller on."""
    from devices.cgroup import _parents

    root = fake(
        tmp_path,
        "0::/user.slice/user-1000.slice/session-3.scope\n",
        {
            "cgroup.subtree_control": "cpu memory pids\n",
            "user.slice/cgroup.subtree_control": "cpu memory pids\n",
            "user.slice/user-1000.slice/cgroup.subtree_control": "cpu memory pids\n",
            "user.slice/user-1000.slice/session-3.scope/cgroup.subtree_control": "\n",
        },
    )
    found = [(path.relative_to(root / "sys/fs/cgroup").as_posix(), version) for path, version in _parents(root)]
    assert found[0] == ("user.slice/user-1000.slice", 2)


def test_kills_are_read_from_both_versions(tmp_path: Path) -> None:
    (tmp_path / "memory.events").write_text("low 0\nhigh 0\nmax 31\noom 2\noom_kill 2\noom_group_kill 0\n")
    (tmp_path / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 5\n")
    assert MemoryGroup(tmp_path, 1, 2).oom_kills() == 2 and MemoryGroup(tmp_path, 1, 1).oom_kills() == 5


def test_status_ok_stays_ok_where_all_is_limited(
    tmp_path: Path, group: MemoryGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = bench_emulated(["tiny"], Plan(), replace(PI, memory_bytes=500 * MB), run=Host())
    assert found.measurements[0].status == OK and found.settings["emulated"]["memory_limited"]
