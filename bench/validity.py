"""May a measurement be believed? What went on around it, and the rules that turn this into OK, WARN or INVALID.

A rule is applied to every repetition. A median stands while fewer than half of its repetitions are hit, so a rule that
would make a measurement INVALID only warns until half of them are.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.result import INVALID, OK, WARN, Measurement, Sample
from bench.stats import relative_slope, summarize

STEAL_WARN, STEAL_INVALID = 0.02, 0.10  # share of the cores' time taken by the hypervisor
OTHERS_WARN = 0.05  # share of the cores' time used by other processes
WAIT_WARN = 0.02  # share of the wall time that the main thread waited for a core
READ_INVALID = 1 << 20  # bytes; a page or two of code may be read late, weights must not
SLOPE_WARN = 0.05
CEILING_MARGIN = 1.05


@dataclass(frozen=True)
class Snapshot:
    """Counters of the host and of this process at one moment; None where the kernel does not tell."""

    wall_s: float
    process_s: float  # CPU time of all threads
    busy_s: float | None  # CPU time of the chosen cores, by anyone
    steal_s: float | None
    swapped_pages: int | None  # in and out, whole host
    read_bytes: int | None  # from storage, by this process
    wait_s: float | None  # main thread, in the run queue


def snapshot(cpus: Sequence[int], proc: Path = Path("/proc")) -> Snapshot:
    """Read the counters now, for the cores ``cpus``."""
    busy, steal = _cpu_times(cpus, proc / "stat")
    swap = [_field(proc / "vmstat", key) for key in ("pswpin", "pswpout")]
    wait = _words(proc / "self/schedstat")
    return Snapshot(
        wall_s=time.perf_counter(),
        process_s=time.process_time(),
        busy_s=busy,
        steal_s=steal,
        swapped_pages=None if None in swap else sum(value or 0 for value in swap),
        read_bytes=_field(proc / "self/io", "read_bytes:"),
        wait_s=int(wait[1]) * 1e-9 if len(wait) > 1 else None,
    )


def counters(before: Snapshot, after: Snapshot, cores: int) -> dict[str, float | None]:
    """What happened in between: shares of the cores' time (0..1), pages and bytes; None where unknown.

    CPU time is counted in ticks of 10 ms, so shares of an interval under 0.2 s are noise and given as None.
    """
    wall = after.wall_s - before.wall_s
    long_enough = wall >= 0.2

    def change(name: str) -> float | None:
        start, end = getattr(before, name), getattr(after, name)
        return None if start is None or end is None else float(end - start)

    busy, steal, wait = change("busy_s"), change("steal_s"), change("wait_s")
    own = after.process_s - before.process_s
    others = None if busy is None or not long_enough else max(0.0, busy - own) / (wall * cores)
    return {
        "wall_s": wall,
        "steal_share": None if steal is None or not long_enough else steal / (wall * cores),
        "others_share": others,
        "wait_share": None if wait is None or not long_enough else wait / wall,
        "swapped_pages": change("swapped_pages"),
        "read_bytes": change("read_bytes"),
    }


def judge_sample(values: Mapping[str, float | None]) -> list[tuple[str, str]]:
    """(status, reason) of every rule that one repetition's counters break; what is unknown breaks none."""

    def get(name: str) -> float:
        return values.get(name) or 0.0

    found = []
    if get("swapped_pages") > 0:
        found.append((INVALID, "the host swapped during decode"))
    if get("read_bytes") > READ_INVALID:
        found.append((INVALID, "weights were read from storage during decode"))
    if get("steal_share") > STEAL_WARN:
        status = INVALID if get("steal_share") > STEAL_INVALID else WARN
        limit = STEAL_INVALID if status == INVALID else STEAL_WARN
        found.append((status, f"the hypervisor took more than {limit:.0%} of the cores"))
    if get("others_share") > OTHERS_WARN:
        found.append((WARN, f"other processes used more than {OTHERS_WARN:.0%} of the cores"))
    if get("wait_share") > WAIT_WARN:
        found.append((WARN, f"waited for a core more than {WAIT_WARN:.0%} of the time"))
    return found


def judge(measurement: Measurement, ceiling_ts: float | None, cache_bytes: int | None) -> tuple[str, list[str]]:
    """Status and reasons of a measurement that has all its repetitions.

    Args:
        measurement: its own status and reasons are not looked at.
        ceiling_ts: ``Result.ceiling_ts``, tokens per second at full memory bandwidth.
        cache_bytes: last-level cache; while it is unknown, a ceiling is shown but not held against a measurement.
    """
    found: list[tuple[str, str]] = []
    total = len(measurement.samples)
    hits = Counter(hit for sample in measurement.samples for hit in judge_sample(sample.counters))
    for (status, reason), count in hits.items():
        found.append((status if 2 * count >= total else WARN, f"{reason} ({count} of {total} repetitions)"))
    slope = drift(measurement.samples)
    if slope is not None and abs(slope) > SLOPE_WARN:
        found.append((WARN, f"time per token drifted by {slope:+.0%} over the run"))
    found.extend(_above_ceiling(measurement, ceiling_ts, cache_bytes))
    statuses = {status for status, _ in found}
    return next((s for s in (INVALID, WARN) if s in statuses), OK), [reason for _, reason in found]


def drift(samples: Sequence[Sample]) -> float | None:
    """Slope of time per token from the first repetition to the last, as a fraction; None below two repetitions.

    Decode slows with depth by nature, so every token time is first divided by the median at its depth.
    """
    if len(samples) < 2:
        return None
    times = np.array([s.token_s for s in sorted(samples, key=lambda s: s.order)])
    flat = (times / np.median(times, axis=0)).ravel()
    blocks = np.array_split(flat, min(len(flat), 200))  # the slope looks at all pairs
    return relative_slope([float(np.median(block)) for block in blocks])


def _above_ceiling(m: Measurement, ceiling_ts: float | None, cache_bytes: int | None) -> list[tuple[str, str]]:
    decode = summarize(m.decode_ts)
    if decode is None or ceiling_ts is None or cache_bytes is None:
        return []
    if decode.median <= ceiling_ts * CEILING_MARGIN:
        return []
    return [(INVALID, f"{decode.median:.1f} tok/s is above the memory ceiling of {ceiling_ts:.1f} tok/s")]


def _cpu_times(cpus: Sequence[int], stat: Path) -> tuple[float | None, float | None]:
    """(busy, steal) seconds summed over ``cpus``; fields of /proc/stat in proc(5): user nice system idle iowait ..."""
    try:
        lines = stat.read_text().splitlines()
    except OSError:
        return None, None
    wanted = {f"cpu{cpu}" for cpu in cpus}
    rows = [[int(v) for v in words[1:]] for words in map(str.split, lines) if words and words[0] in wanted]
    if len(rows) != len(wanted) or any(len(row) < 8 for row in rows):
        return None, None
    tick = 1 / os.sysconf("SC_CLK_TCK")
    busy = sum(row[0] + row[1] + row[2] + row[5] + row[6] for row in rows)
    return busy * tick, sum(row[7] for row in rows) * tick


def _field(path: Path, key: str) -> int | None:
    try:
        words = path.read_text().split()
    except OSError:
        return None
    return int(words[words.index(key) + 1]) if key in words else None


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []
