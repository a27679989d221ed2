"""Memory of this process, read from inside it: what a parent sees of its children (ru_maxrss, time -v) is wrong.

All values are bytes. A kernel without these files (not Linux) gives None.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from saap.base.tree import field

SELF = Path("/proc/self")


@dataclass(frozen=True)
class Split:
    """The resident set by origin: ``anonymous`` must stay in RAM, ``file`` may be dropped and read again."""

    anonymous: int | None = None
    file: int | None = None
    pss: int | None = None  # pages shared with other processes counted in parts


def peak_rss(process: Path = SELF) -> int | None:
    """VmHWM, the largest resident set since the start or the last ``reset_peak``."""
    return field(process / "status", "VmHWM")


def reset_peak(process: Path = SELF) -> bool:
    """Set VmHWM to the present resident set, which needs no root; False where the kernel refuses."""
    try:
        (process / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def resident_split(process: Path = SELF) -> Split:
    """Split the present resident set by ``smaps_rollup``; shared memory counts as anonymous, it cannot be dropped."""
    rollup = process / "smaps_rollup"
    rss, anonymous = field(rollup, "Rss"), field(rollup, "Anonymous")
    if rss is None or anonymous is None:
        return Split()
    shared = field(process / "status", "RssShmem") or 0
    return Split(anonymous + shared, max(0, rss - anonymous - shared), field(rollup, "Pss"))


def resident(process: Path = SELF) -> int | None:
    return field(process / "status", "VmRSS")
