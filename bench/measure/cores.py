"""The cores that a measurement runs on: which they are, whether they kept their clock, and how warm they are.

Every path hangs below ``root``, so that a tree of files stands in for a board. What is not there is None.

**Clock.** What a kernel says of its clocks may be wrong: a board has been seen to report four times its real clock. So
a fixed piece of work is timed before and after a measurement. It is a chain of additions, each waiting for the one
before, in the first-level cache: its time depends on the clock of the core and on nothing else that a measurement
shares (memory, vector units, a second hardware thread). It allocates nothing.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from devices.probe.cpu import CPU
from devices.probe.throttling import cooling_states, firmware_bits, over_current, throttle_count, zones
from saap.base.tree import number, text

FIXED_GOVERNORS = ("performance", "userspace")
MIXED_BELOW = 0.9  # capacity of the slowest chosen core over that of the fastest; favoured cores differ by less

_NEAR_THE_CORES = re.compile(r"cpu|soc|x86_pkg|^tj", re.IGNORECASE)


@dataclass(frozen=True)
class BoardState:
    """Facts of one moment, of the chosen CPUs where a fact belongs to a CPU; None where /sys does not tell."""

    clock_share: float | None  # lowest clock over that CPU's highest sustained one
    fixed_clock: bool | None  # whether every governor keeps the clock where it is
    temperature_c: float | None  # the hottest zone at the cores
    firmware_bits: int | None  # Raspberry Pi's get_throttled: 0-3 are now, 16-19 have been since they were last read
    throttle_count: int | None  # x86: thermal throttling since boot
    cooling_state: int | None  # highest state of a device that cools by slowing; 0 is off
    over_current: tuple[int | None, ...]  # Jetson: events OC1, OC2, OC3 since boot
    mixed_cores: bool | None  # big and little ones
    smt_siblings: int | None  # CPUs that share their core with another chosen one


def board_state(cpus: Sequence[int], root: Path = Path("/")) -> BoardState:
    places = [root / CPU / f"cpu{cpu}" for cpu in cpus]
    events = over_current(root)
    governors = {text(place / "cpufreq/scaling_governor") for place in places}
    capacities = [value for place in places if (value := number(place / "cpu_capacity")) is not None]
    siblings = [text(place / "topology/thread_siblings_list") for place in places]
    return BoardState(
        clock_share=_least(map(_clock_share, places)),
        fixed_clock=None if None in governors else governors <= set(FIXED_GOVERNORS),
        temperature_c=temperature(root),
        firmware_bits=firmware_bits(root),
        throttle_count=throttle_count(root, cpus),
        cooling_state=max(cooling_states(root), default=None),
        over_current=tuple(events.get(f"OC{n}") for n in (1, 2, 3)),
        mixed_cores=min(capacities) < MIXED_BELOW * max(capacities) if capacities else None,
        smt_siblings=None if None in siblings else sum(siblings.count(core) > 1 for core in siblings),
    )


def temperature(root: Path = Path("/")) -> float | None:
    """Degrees Celsius of the hottest thermal zone at the cores (not of a power chip, which may be a dummy of 100)."""
    return max((celsius for kind, celsius in zones(root) if _NEAR_THE_CORES.search(kind)), default=None)


def _clock_share(cpu: Path) -> float | None:
    """Clock over the highest that the CPU keeps on all its cores: a boost above that comes and goes by design."""
    now = number(cpu / "cpufreq/scaling_cur_freq")
    nominal_mhz = number(cpu / "acpi_cppc/nominal_freq")
    limits = [number(cpu / "cpufreq" / name) for name in ("scaling_max_freq", "cpuinfo_max_freq", "base_frequency")]
    highest = _least([*limits, nominal_mhz * 1000 if nominal_mhz else None])
    return min(1.0, now / highest) if now and highest else None


def _least(values: Iterable[float | None]) -> float | None:
    return min((value for value in values if value is not None), default=None)


IDLE_PROBES = 30  # probes on each side; 20 are the least for a spread
ROUNDS = 64  # 2^17 additions, about a millisecond at 1 to 3 GHz
LEAST_LIMIT = 0.03
MADS = 4  # median absolute deviations
# A neighbour's time slice hits single probes and only lengthens them, so the undisturbed ones are the fast ones.
QUANTILE = 0.10

_ONES = np.ones(2048)
_SUMS = np.empty(2048)


def probe_clock(count: int = IDLE_PROBES, clock: Callable[[], float] = time.perf_counter) -> list[float]:
    """Seconds of each of ``count`` runs of the same work on the calling thread, about 1 ms each."""
    _chain()  # pages and code are there from now on
    times = []
    for _ in range(count):
        start = clock()
        _chain()
        times.append(clock() - start)
    return times


def level(probes: Sequence[float]) -> float:
    """Seconds that the work takes undisturbed, robust to preemption; proportional to 1 / clock."""
    return float(np.quantile(np.asarray(probes), QUANTILE))


def drift(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """Return the slowdown of the same work, and the limit below which it is noise, both relative.

    The limit is 3 % or four median absolute deviations of the noisier side, whichever is more. 0.1 is a clock that
    fell by 9 %.

    Args:
        before, after: at least 20 probes each, of the same process.
    """
    return level(after) / level(before) - 1, max(LEAST_LIMIT, MADS * max(_spread(before), _spread(after)))


def _chain() -> None:
    for _ in range(ROUNDS):
        np.add.accumulate(_ONES, out=_SUMS)


def _spread(probes: Sequence[float]) -> float:
    values = np.asarray(probes)
    median = np.median(values)
    return float(np.median(np.abs(values - median)) / median)
