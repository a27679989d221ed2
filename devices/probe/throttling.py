"""Signs of heat and throttling, read below ``root``, by which a measurement is judged.

What this host has no sign of is None or empty. Nothing here raises.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from devices.probe.cpu import CPU
from saap.base.tree import glob, number, text

_THERMAL = "sys/class/thermal"
# Devices that slow a processor or its memory. A fan is none, also where it is a CPU's.
_SLOWING = re.compile(r"^(?!.*fan).*(cpu|processor|devfreq|gpu|powerclamp)", re.IGNORECASE)
# Jetson boards name the directory by release; the names of the files are their own.
_OVER_CURRENT = (
    "sys/class/hwmon/hwmon*",
    "sys/devices/platform/soctherm*",
    "sys/devices/platform/soctherm*/hwmon/hwmon*",
)


def zones(root: Path) -> Iterator[tuple[str, float]]:
    """Yield kind and degrees Celsius of each thermal zone; a gated one gives an error or an absurd number."""
    for zone in glob(root / _THERMAL, "thermal_zone[0-9]*"):
        millidegrees = number(zone / "temp")
        if millidegrees is not None and -40_000 < millidegrees < 150_000:
            yield text(zone / "type") or zone.name, millidegrees / 1000


def cooling_states(root: Path) -> list[int]:
    """Return the states of the devices that cool by slowing a processor; 0 is off."""
    states = []
    for device in glob(root / _THERMAL, "cooling_device[0-9]*"):
        kind, state = text(device / "type") or "", number(device / "cur_state")
        if _SLOWING.search(kind) and state is not None:
            states.append(max(0, state))  # powerclamp tells -1 while it is off
    return states


def firmware_bits(root: Path) -> int | None:
    """Raspberry Pi's get_throttled: bits 0-3 are now, 16-19 have been since boot."""
    for path in glob(root / "sys/devices/platform", "soc*/soc*firmware/get_throttled"):
        bits = text(path)
        if bits and re.fullmatch(r"(0x)?[0-9a-fA-F]+", bits):
            return int(bits, 16)
    return None


def throttle_count(root: Path, cpus: Sequence[int]) -> int | None:
    """x86: thermal throttling since boot, of these CPUs together."""
    counts = [
        number(root / CPU / f"cpu{cpu}/thermal_throttle/{part}_throttle_count")
        for cpu in cpus
        for part in ("core", "package")
    ]
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def over_current(root: Path) -> dict[str, int]:
    """Jetson: events since boot by name, such as OC1."""
    counts: dict[str, int] = {}
    for place in _OVER_CURRENT:
        for path in glob(root, f"{place}/oc[0-9]_event_cnt"):
            if (count := number(path)) is not None:
                counts.setdefault(path.name.split("_")[0].upper(), count)
    return counts
