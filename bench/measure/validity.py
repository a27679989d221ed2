"""May a measurement be believed? The rules that turn what went on around it into OK, WARN or INVALID.

A rule is applied to every repetition. A median stands while fewer than half of its repetitions are hit, so a rule that
would make a measurement INVALID only warns until half of them are. What a rule looks at is in the table of
``bench.measure.host_state``, and besides:

| key | unit | what |
|---|---|---|
| clock_drift, clock_limit | share | of ``bench.measure.cores``, around decode |
| clock_s | s | ``bench.measure.cores.level`` before decode |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bench.measure.result import INVALID, OK, WARN, Measurement, Sample
from bench.measure.statistics import relative_slope, summarize
from saap.base.wording import counted

SLOPE_WARN = 0.05
CEILING_MARGIN = 1.05
NEIGHBOURS_WARN = 0.10  # CPU seconds of others per second
NEIGHBOURS_LEAST_S = 0.05  # and in all: five ticks, the grain of CPU times
MEMORY_SHARE, MEMORY_LEAST = 0.05, 256e6  # of RAM, and bytes: what the rest of a quiet host may move by
CLOCK_SPREAD_WARN = 0.10  # between repetitions, where a boost that comes and goes makes a few percent

Values = Mapping[str, float | None]


@dataclass(frozen=True)
class Finding:
    """A rule that one repetition broke."""

    key: str  # the rule's
    status: str
    value: float  # how badly: of several repetitions the worst is told
    reason: str


@dataclass(frozen=True)
class Rule:
    """One counter against one limit. ``reason`` is a format string of ``value`` and of ``mb``, its millions."""

    key: str
    status: str
    breaks: Callable[[float], bool]
    reason: str


def _above(limit: float) -> Callable[[float], bool]:
    return lambda value: value > limit


def _below(limit: float) -> Callable[[float], bool]:
    return lambda value: value < limit


WAITED = 0.2  # of a repetition's time, above which its rate says more of other programs

# Of two rules for one counter the first that is broken speaks.
RULES = (
    Rule("throttle_events", INVALID, _above(0), "the CPU throttled {value:.0f} times for heat: cool it better"),
    Rule("cooling_state", INVALID, _above(0), "cooling slowed the processor (state {value:.0f}): let it cool down"),
    Rule("oc1_events", INVALID, _above(0), "under-voltage, {value:.0f} OC1 events: use a stronger power supply"),
    Rule("swapped_pages", INVALID, _above(0), "the host swapped {value:.0f} pages during decode: free memory"),
    # A page or two of code may be read late, weights must not.
    Rule("read_bytes", INVALID, _above(1 << 20), "{mb:.0f} MB were read from storage during decode: free memory"),
    Rule("memory_stall_share", INVALID, _above(0.01), "tasks waited {value:.0%} of the time for memory: free some"),
    Rule("steal_share", INVALID, _above(0.10), "the hypervisor took {value:.0%} of the cores' time"),
    Rule("steal_share", WARN, _above(0.02), "the hypervisor took {value:.0%} of the cores' time"),
    Rule("oc2_events", WARN, _above(0), "the board drew too much current, {value:.0f} OC2 events"),
    Rule("oc3_events", WARN, _above(0), "the board drew too much current, {value:.0f} OC3 events"),
    Rule("wait_share", INVALID, _above(WAITED), "waited for a core {value:.0%} of the time: end other programs"),
    Rule("wait_share", WARN, _above(0.02), "waited for a core {value:.0%} of the time"),
    Rule("fixed_clock", WARN, _below(1), "the governor moves the clock: set it to performance"),
    Rule("clock_share", WARN, _below(0.95), "a core ran at {value:.0%} of its highest clock"),
    Rule("mixed_cores", WARN, _above(0), "fast and slow cores were mixed: use as many threads as there are fast cores"),
    Rule("smt_siblings", WARN, _above(0), "{value:.0f} CPUs shared cores: use one thread per physical core"),
)
FIRMWARE_FLAGS = {1: "under-voltage", 2: "a capped clock", 4: "throttling", 8: "the soft temperature limit"}


def judge(measurement: Measurement, ceiling_ts: float | None, cache_bytes: int | None) -> tuple[str, list[str]]:
    """Status and reasons of a measurement that has all its repetitions.

    Args:
        measurement: its own status and reasons are not looked at.
        ceiling_ts: ``Result.ceiling_ts``, tokens per second at full memory bandwidth.
        cache_bytes: last-level cache; while it is unknown, a ceiling is shown but not held against a measurement.
    """
    samples = measurement.samples
    findings = [
        *_of_repetitions(samples),
        *_between_repetitions(samples),
        *_above_ceiling(measurement, ceiling_ts, cache_bytes),
    ]
    statuses = {status for status, _ in findings}
    return next((s for s in (INVALID, WARN) if s in statuses), OK), [reason for _, reason in findings]


def waited(shares: Sequence[float]) -> str | None:
    """Say that at least half of a table's processes waited too long for a core; None: they did not."""
    long = [share for share in shares if share > WAITED]
    if 2 * len(long) < max(1, len(shares)):
        return None
    return (
        f"waited for a core {max(long):.0%} of the time ({len(long)} of {counted(len(shares), 'process', 'processes')})"
    )


def drift(samples: Sequence[Sample]) -> float | None:
    """Slope of time per token from the first repetition to the last, as a fraction; None below two repetitions.

    Decode slows with depth by nature, so every token time is first divided by the median at its depth. Repetitions
    whose single tokens are not known are left out.
    """
    timed = [s.token_s for s in sorted(samples, key=lambda s: s.order) if s.token_s]
    if len(timed) < 2:
        return None
    depths = min(map(len, timed))
    times = np.array([token_s[:depths] for token_s in timed])
    flat = (times / np.median(times, axis=0)).ravel()
    blocks = np.array_split(flat, min(len(flat), 200))  # the slope looks at all pairs
    return relative_slope([float(np.median(block)) for block in blocks])


def _findings(sample: Sample) -> Iterator[Finding]:
    """One per broken rule; a counter that is unknown breaks none."""
    values, broken = sample.counters, set()
    for rule in RULES:
        value = values.get(rule.key)
        if value is not None and rule.breaks(value) and rule.key not in broken:
            broken.add(rule.key)
            yield Finding(rule.key, rule.status, value, rule.reason.format(value=value, mb=value / 1e6))
    for special in (_firmware, _clock_moved, _neighbours, _memory_of_others):
        yield from special(values)
    if sample.steady is False:
        yield Finding("steady", WARN, 1.0, "warm-up had not become steady when it ended: leave the machine alone")


def _firmware(values: Values) -> Iterator[Finding]:
    bits = int(values.get("firmware_throttled") or 0)
    flags = ", ".join(name for bit, name in FIRMWARE_FLAGS.items() if bits & bit)
    if flags:
        yield Finding("firmware_throttled", INVALID, bits, f"the firmware reported {flags}: mend supply or cooling")


def _clock_moved(values: Values) -> Iterator[Finding]:
    change, limit = values.get("clock_drift"), values.get("clock_limit")
    if change is not None and limit is not None and abs(change) > limit:
        more = "more" if change > 0 else "less"
        reason = f"fixed work took {abs(change):.0%} {more} time after decode than before it: the core's clock moved"
        yield Finding("clock_drift", INVALID, abs(change), reason)


def _neighbours(values: Values) -> Iterator[Finding]:
    """Other processes, on the chosen cores and elsewhere apart: the ones take time, the others bandwidth."""
    cores, elsewhere = values.get("neighbours_cores"), values.get("elsewhere_cores") or 0.0
    if cores is None:  # too short for ticks
        threads = values.get("runnable_others") or 0.0
        if threads:
            yield Finding("neighbours", WARN, threads, f"{counted(round(threads), 'thread')} of other processes ran")
        return
    limit = max(NEIGHBOURS_WARN, NEIGHBOURS_LEAST_S / (values.get("wall_s") or 1.0))
    here = cores - elsewhere
    if here > limit:
        yield Finding("neighbours", WARN, here, f"other processes used {here:.1f} of the chosen cores: stop them")
    if elsewhere > limit:
        reason = f"other processes used {elsewhere:.1f} of the other cores, which share the memory: stop them"
        yield Finding("elsewhere", WARN, elsewhere, reason)


def _memory_of_others(values: Values) -> Iterator[Finding]:
    size = values.get("taken_bytes") or 0.0
    if size > _memory_limit(values):
        yield Finding("memory", WARN, size, f"other processes took {size / 1e6:.0f} MB of memory during decode")


def _memory_limit(values: Values) -> float:
    return max(MEMORY_LEAST, MEMORY_SHARE * (values.get("memory_bytes") or 0.0))


def _of_repetitions(samples: Sequence[Sample]) -> Iterator[tuple[str, str]]:
    """(status, reason) of the rules on single repetitions, the worst of each."""
    by_rule: dict[str, list[Finding]] = {}
    for sample in samples:
        for finding in _findings(sample):
            by_rule.setdefault(finding.key, []).append(finding)
    for findings in by_rule.values():
        invalid = sum(finding.status == INVALID for finding in findings)
        worst = max(findings, key=lambda finding: finding.value)
        status = INVALID if invalid and 2 * invalid >= len(samples) else WARN
        yield status, f"{worst.reason} ({len(findings)} of {counted(len(samples), 'repetition')})"


def _between_repetitions(samples: Sequence[Sample]) -> Iterator[tuple[str, str]]:
    """(status, reason) of the rules on what moved from one repetition to another."""
    boots, levels, room = (_known(samples, key) for key in ("boot_id", "clock_s", "room_bytes"))
    if len(set(boots)) > 1:
        yield INVALID, "the host was restarted between repetitions"
    if levels and max(levels) / min(levels) - 1 > CLOCK_SPREAD_WARN:
        yield WARN, f"the core's clock differed by {max(levels) / min(levels) - 1:.0%} between repetitions"
    if room and max(room) - min(room) > _memory_limit(samples[0].counters):
        yield WARN, f"other processes took or freed {(max(room) - min(room)) / 1e6:.0f} MB of memory during the run"
    slope = drift(samples)
    if slope is not None and abs(slope) > SLOPE_WARN:
        # Only a warning: interleaved measurements share it, and their ratio stands.
        yield WARN, f"time per token {'rose' if slope > 0 else 'fell'} over the run, by {abs(slope):.0%} of its median"


def _known(samples: Sequence[Sample], key: str) -> list[float]:
    return [value for s in samples if (value := s.counters.get(key)) is not None]


def _above_ceiling(m: Measurement, ceiling_ts: float | None, cache_bytes: int | None) -> Iterator[tuple[str, str]]:
    decode = summarize(m.decode_ts)
    if decode is None or ceiling_ts is None or cache_bytes is None:
        return
    if decode.median > ceiling_ts * CEILING_MARGIN:
        yield INVALID, f"{decode.median:.1f} tok/s is above the memory ceiling of {ceiling_ts:.1f} tok/s"
