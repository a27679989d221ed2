"""A Jetson's own files: the release of its system, its power mode, and whether its clocks are fixed.

Ids mean something else on every board, and names come back with other limits after an update, so both are kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypedDict

from saap.base.tree import number, text

# Runs a command and gives what it printed; None where it is not there or fails.
Run = Callable[[Sequence[str]], str | None]

RELEASE = "etc/nv_tegra_release"
STATUS = "var/lib/nvpmodel/status"
MODES = "etc/nvpmodel.conf"
FANS = "etc/nvfancontrol.conf"
# Of sys/class/devfreq. gm20b is of Nano, gp10b of TX2, gv11b of Xavier; Orin's folder is called 17000000.gpu or .ga10b,
# Thor's gpu-gpc-0.
GPUS = ("*gpu*", "*.ga10b", "*.gv11b", "*.gp10b", "*.gm20b")
EMC_LOCK = "sys/kernel/debug/bpmp/debug/clk/emc/mrq_rate_locked"  # root alone reads it

# Jetson Linux release -> JetPack; NVIDIA's Jetson Linux archive. A release that is not here is named by its major
# version alone.
JETPACK = {
    "32.4.3": "4.4", "32.4.4": "4.4.1", "32.5": "4.5", "32.5.1": "4.5.1", "32.6.1": "4.6", "32.7.1": "4.6.1",
    "32.7.2": "4.6.2", "32.7.3": "4.6.3", "32.7.4": "4.6.4", "32.7.5": "4.6.5", "32.7.6": "4.6.6",
    "35.1": "5.0.2", "35.2.1": "5.1", "35.3.1": "5.1.1", "35.4.1": "5.1.2", "35.5.0": "5.1.3", "35.6.0": "5.1.4",
    "35.6.1": "5.1.5",
    "36.3": "6.0", "36.4": "6.1", "36.4.3": "6.2", "36.4.4": "6.2.1", "36.4.7": "6.2.1", "36.5": "6.2.2",
    "38.2": "7.0", "38.4": "7.1", "39.2": "7.2",
}  # fmt: skip
_MAJOR = {32: "4", 34: "5", 35: "5", 36: "6", 38: "7", 39: "7"}


class PowerMode(TypedDict):
    """A part that is not known is None."""

    name: str | None
    id: int | None


def l4t_release(root: Path) -> str | None:
    line = text(root / RELEASE) or ""
    match = re.search(r"R(\d{1,9})\s*\(release\),\s*REVISION:\s*([\d.]+)", line)
    return f"{match.group(1)}.{match.group(2)}" if match else None


def jetpack(l4t: str | None) -> str | None:
    """Return the JetPack that a release belongs to: exact where known, else its major version; None for others."""
    if l4t is None:
        return None
    short = l4t.removesuffix(".0")
    return JETPACK.get(l4t) or JETPACK.get(short) or _MAJOR.get(int(l4t.split(".")[0]))


def power_mode(root: Path, run: Run) -> PowerMode | None:
    """Name and id of the mode that is on: ``{"name": "25W", "id": 1}``.

    nvpmodel's status file holds the id, its configuration the names; where the file is not there, ``nvpmodel -q`` is
    asked, which needs no root from JetPack 5 on.
    """
    match = re.search(r"pmode:\s*(\d{1,9})\b", text(root / STATUS) or "")
    if match:
        return {"name": power_modes(root).get(int(match.group(1))), "id": int(match.group(1))}
    output = run(["nvpmodel", "-q"]) or ""
    name, number = re.search(r"NV Power Mode:\s*(\S+)", output), re.search(r"^\s*(\d{1,9})\s*$", output, re.MULTILINE)
    if not name and not number:
        return None
    return {"name": name.group(1) if name else None, "id": int(number.group(1)) if number else None}


class Clocks(TypedDict):
    """Settings of ``jetson_clocks`` and the fan's tool, which a reboot resets; an unknown part is None."""

    cpu: bool | None  # whether the clock is fixed: the lowest that is allowed is the highest
    gpu: bool | None
    emc: bool | None  # memory
    fan: str | None  # profile: quiet, cool


def clocks(root: Path) -> Clocks:
    policies = sorted((root / "sys/devices/system/cpu/cpufreq").glob("policy*"))
    gpus = [gpu for pattern in GPUS for gpu in sorted((root / "sys/class/devfreq").glob(pattern))]
    lock = number(root / EMC_LOCK)
    return {
        "cpu": _all_fixed(policies, "scaling_min_freq", "scaling_max_freq"),
        "gpu": _all_fixed(gpus, "min_freq", "max_freq"),
        "emc": None if lock is None else bool(lock),
        "fan": _fan(root),
    }


def _all_fixed(places: Sequence[Path], low: str, high: str) -> bool | None:
    limits = [(number(place / low), number(place / high)) for place in places]
    return None if not limits or None in {*limits[0]} else all(a == b for a, b in limits)


def _fan(root: Path) -> str | None:
    """Return the profile of nvpmodel, up to JetPack 4, or of nvfancontrol."""
    mode = re.search(r"fmode:\s*(\w+)", text(root / STATUS) or "")
    if mode and mode.group(1) != "fanNull":
        return mode.group(1)
    profile = re.search(r"^\s*FAN_DEFAULT_PROFILE\s+(\w+)", text(root / FANS) or "", re.MULTILINE)
    return profile.group(1) if profile else None


def power_modes(root: Path) -> dict[int, str]:
    modes = re.findall(r"<\s*POWER_MODEL\s+ID=(\d{1,9})\s+NAME=([^\s>]+)", text(root / MODES) or "")
    return {int(number): name for number, name in modes}
