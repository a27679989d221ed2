"""What a board tells of itself at one moment: clocks, temperatures and signs of throttling, read from /sys.

Every path hangs below ``root``, so that a tree of files stands in for a board. What is not there is None.
``devices.probe.throttling`` reads the signs; here they become the numbers that a measurement is judged by.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from devices.common.tree import number, text
from devices.probe.cpu import CPU
from devices.probe.throttling import coolers, firmware_bits, over_current, throttle_count, zones

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
    """Read it now, for the CPUs ``cpus``."""
    places = [root / CPU / f"cpu{cpu}" for cpu in cpus]
    events = over_current(root)
    governors = {text(place / "cpufreq/scaling_governor") for place in places}
    return BoardState(
        clock_share=_least(map(_clock_share, places)),
        fixed_clock=None if None in governors else governors <= set(FIXED_GOVERNORS),
        temperature_c=temperature(root),
        firmware_bits=firmware_bits(root),
        throttle_count=throttle_count(root, cpus),
        cooling_state=max((cooler.state for cooler in coolers(root)), default=None),
        over_current=tuple(events.get(f"OC{n}") for n in (1, 2, 3)),
        mixed_cores=_mixed(places),
        smt_siblings=_siblings(places),
    )


def temperature(root: Path = Path("/")) -> float | None:
    """Degrees Celsius of the hottest thermal zone at the cores (not of a power chip, which may be a dummy of 100)."""
    near = [zone.celsius for zone in zones(root) if _NEAR_THE_CORES.search(zone.kind)]
    return max((celsius for celsius in near if celsius is not None), default=None)


def _clock_share(cpu: Path) -> float | None:
    """Clock over the highest that the CPU keeps on all its cores: a boost above that comes and goes by design."""
    now = number(cpu / "cpufreq/scaling_cur_freq")
    nominal_mhz = number(cpu / "acpi_cppc/nominal_freq")
    limits = [number(cpu / "cpufreq" / name) for name in ("scaling_max_freq", "cpuinfo_max_freq", "base_frequency")]
    highest = _least([*limits, nominal_mhz * 1000 if nominal_mhz else None])
    return min(1.0, now / highest) if now and highest else None


def _mixed(places: Sequence[Path]) -> bool | None:
    known = [value for value in (number(place / "cpu_capacity") for place in places) if value is not None]
    return min(known) < MIXED_BELOW * max(known) if known else None


def _siblings(places: Sequence[Path]) -> int | None:
    cores = [text(place / "topology/thread_siblings_list") for place in places]
    if None in cores:
        return None
    return sum(cores.count(core) > 1 for core in cores)


def _least(values: Iterable[float | None]) -> float | None:
    return min((value for value in values if value is not None), default=None)
