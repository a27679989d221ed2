"""What a Jetson's own files say: the release of its system and its power mode, by name and id.

Ids mean something else on every board, and names come back with other limits after an update, so both are kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypedDict

from devices.common.tree import text

# Runs a command and gives what it printed; None where it is not there or fails.
Run = Callable[[Sequence[str]], str | None]

RELEASE = "etc/nv_tegra_release"
STATUS = "var/lib/nvpmodel/status"
MODES = "etc/nvpmodel.conf"

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
    """The JetPack that a release belongs to: exact where it is known, else its major version; None for others."""
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
    said = run(["nvpmodel", "-q"]) or ""
    name, number = re.search(r"NV Power Mode:\s*(\S+)", said), re.search(r"^\s*(\d{1,9})\s*$", said, re.MULTILINE)
    if not name and not number:
        return None
    return {"name": name.group(1) if name else None, "id": int(number.group(1)) if number else None}


def power_modes(root: Path) -> dict[int, str]:
    found = re.findall(r"<\s*POWER_MODEL\s+ID=(\d{1,9})\s+NAME=([^\s>]+)", text(root / MODES) or "")
    return {int(number): name for number, name in found}
