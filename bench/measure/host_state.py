"""The host around a measurement: counters of it and of this process at both ends, and their changes.

``counters`` gives these, each None where the kernel does not tell; ``bench.measure.validity`` judges them. "Cores" are
the chosen ones where nothing else is said, and a share is of 1.

| key | unit | what |
|---|---|---|
| wall_s | s | between the snapshots |
| steal_share | share | of the cores' time, taken by the hypervisor |
| neighbours_cores | cores | CPU seconds of other processes per second, on all CPUs |
| elsewhere_cores | cores | the part of it on CPUs that were not chosen, which share the memory |
| runnable_others | threads | of other processes that ran or could have run, the lesser of both ends: a hint |
| wait_share | share | of the time, main thread ready but without a core |
| swapped_pages | pages | in and out, whole host |
| read_bytes | bytes | from storage, by this process |
| memory_stall_share | share | of the time, some task waited for memory (PSI) |
| memory_bytes | bytes | RAM of the host |
| room_bytes | bytes | MemAvailable and what this process holds itself, at the end: what all others leave |
| taken_bytes | bytes | by which that fell |
| boot_id | number | first 48 bits of the boot's identity |
| clock_share | share | lowest clock over the highest sustained one, at either end |
| fixed_clock | 0 or 1 | whether all governors are performance or userspace |
| temperature_c | C | the hottest zone at the cores, at the end |
| temperature_start_c | C | the same, at the start |
| firmware_throttled | bits | Raspberry Pi: 1 under-voltage, 2 capped, 4 throttled, 8 soft limit; at an end or new |
| throttle_events | events | x86: thermal throttling |
| cooling_state | state | of a device that cools by slowing, the higher of both ends; 0 is off |
| oc1_events, oc2_events, oc3_events | events | Jetson: under-voltage, mean current, momentary current |
| mixed_cores | 0 or 1 | big and little ones together |
| smt_siblings | CPUs | that share their core with another chosen one |
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.measure.cores import BoardState, board_state
from saap.base.tree import field, fields, text

SHARES_FROM_S = 0.2  # CPU time is counted in ticks of 10 ms: shares of a shorter interval are noise


@dataclass(frozen=True)
class Snapshot:
    """Counters at one moment; None where the kernel does not tell."""

    wall_s: float
    process_s: float  # CPU time of all threads
    busy_s: float | None  # CPU time of the chosen cores, by anyone
    all_busy_s: float | None  # of all CPUs
    steal_s: float | None  # from the chosen cores
    runnable: int | None  # threads of other processes
    wait_s: float | None  # main thread, in the run queue
    swapped_pages: int | None
    read_bytes: int | None
    memory_stall_s: float | None
    memory_bytes: int | None
    room_bytes: int | None
    boot_id: int | None
    board: BoardState


def snapshot(cpus: Sequence[int], root: Path = Path("/")) -> Snapshot:
    proc = root / "proc"
    stat, wait = text(proc / "stat") or "", (text(proc / "self/schedstat") or "").split()
    busy, steal = _cpu_times(stat, [f"cpu{cpu}" for cpu in cpus])
    memory, status, vmstat = (fields(proc / name) for name in ("meminfo", "self/status", "vmstat"))
    resident = _sum(status.get("RssAnon"), status.get("RssShmem"))
    stalled = re.search(r"^some .*total=(\d+)", text(proc / "pressure/memory") or "", re.MULTILINE)
    boot = (text(proc / "sys/kernel/random/boot_id") or "").replace("-", "")[:12]
    return Snapshot(
        wall_s=time.perf_counter(),
        process_s=time.process_time(),
        busy_s=busy,
        all_busy_s=_cpu_times(stat, ["cpu"])[0],
        steal_s=steal,
        runnable=_others_runnable(field(proc / "stat", "procs_running"), proc),
        wait_s=int(wait[1]) * 1e-9 if len(wait) > 1 else None,
        swapped_pages=_sum(vmstat.get("pswpin"), vmstat.get("pswpout")),
        read_bytes=field(proc / "self/io", "read_bytes"),
        memory_stall_s=int(stalled.group(1)) * 1e-6 if stalled else None,
        memory_bytes=memory.get("MemTotal"),
        room_bytes=_sum(memory.get("MemAvailable"), resident),
        boot_id=int(boot, 16) if re.fullmatch(r"[0-9a-f]{12}", boot) else None,
        board=board_state(cpus, root),
    )


def counters(before: Snapshot, after: Snapshot, cores: int) -> dict[str, float | None]:
    """Return the changes between two snapshots on ``cores`` chosen cores; the module's table has the keys.

    Shares and ``neighbours_cores`` of an interval under ``SHARES_FROM_S`` are None.
    """
    wall = after.wall_s - before.wall_s
    own = after.process_s - before.process_s
    start, end = before.board, after.board
    events = [_rise(*counts) for counts in zip(start.over_current, end.over_current, strict=True)]

    def per_second(seconds: float | None, width: float = 1) -> float | None:
        return None if seconds is None or wall < SHARES_FROM_S else max(0.0, seconds) / (wall * width)

    busy, everywhere = _rise(before.busy_s, after.busy_s), _rise(before.all_busy_s, after.all_busy_s)
    return {
        "wall_s": wall,
        "steal_share": per_second(_rise(before.steal_s, after.steal_s), cores),
        "neighbours_cores": per_second(None if everywhere is None else everywhere - own),
        "elsewhere_cores": per_second(None if everywhere is None or busy is None else everywhere - busy),
        "runnable_others": _extreme(min, before.runnable, after.runnable),
        "wait_share": per_second(_rise(before.wait_s, after.wait_s)),
        "swapped_pages": _rise(before.swapped_pages, after.swapped_pages),
        "read_bytes": _rise(before.read_bytes, after.read_bytes),
        "memory_stall_share": per_second(_rise(before.memory_stall_s, after.memory_stall_s)),
        "memory_bytes": after.memory_bytes,
        "room_bytes": after.room_bytes,
        "taken_bytes": _rise(after.room_bytes, before.room_bytes),
        "boot_id": after.boot_id,
        "clock_share": _extreme(min, start.clock_share, end.clock_share),
        "fixed_clock": end.fixed_clock if end.fixed_clock is None else float(end.fixed_clock),
        "temperature_c": end.temperature_c,
        "temperature_start_c": start.temperature_c,
        "firmware_throttled": _throttled_between(start.firmware_bits, end.firmware_bits),
        "throttle_events": _rise(start.throttle_count, end.throttle_count),
        "cooling_state": _extreme(max, start.cooling_state, end.cooling_state),
        **{f"oc{n}_events": count for n, count in enumerate(events, 1)},
        "mixed_cores": end.mixed_cores if end.mixed_cores is None else float(end.mixed_cores),
        "smt_siblings": end.smt_siblings,
    }


def _throttled_between(before: int | None, after: int | None) -> int | None:
    """Bits 0-3 that were set at an end, or whose lasting twin (16-19) was set in between."""
    if before is None or after is None:
        return None
    return (before | after | (after & ~before) >> 16) & 0xF


def _rise(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else float(after - before)


def _sum(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else one + other


def _extreme(pick: Callable[..., float], *values: float | None) -> float | None:
    known = [value for value in values if value is not None]
    return pick(known) if known else None


def _cpu_times(stat: str, names: Sequence[str]) -> tuple[float | None, float | None]:
    """(busy, steal) seconds of the named rows; fields of /proc/stat in proc(5): user nice system idle iowait ..."""
    rows = [[int(v) for v in words[1:]] for words in map(str.split, stat.splitlines()) if words and words[0] in names]
    if len(rows) != len(names) or any(len(row) < 8 for row in rows):
        return None, None
    tick = 1 / os.sysconf("SC_CLK_TCK")
    busy = sum(row[0] + row[1] + row[2] + row[5] + row[6] for row in rows)
    return busy * tick, sum(row[7] for row in rows) * tick


def _others_runnable(running: int | None, proc: Path) -> int | None:
    """Threads on a core or in a run queue, less those of this process: a runtime's idle threads may still spin."""
    if running is None:
        return None
    stats = [text(path) or "" for path in (proc / "self/task").glob("*/stat")]
    own = sum(stat.rpartition(") ")[2].startswith("R") for stat in stats)  # a thread's name may hold anything
    return max(0, running - own)
