"""Memory and disk that a long command takes at its peak, against what there is; known before anything is read.

Sums of what has to be there at the same time; the constants were measured (docs/memory.md says how and how well
they hold). A refusal names the sum, what there is, and the option that would make it fit.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from saap.base.cgroup import memory_left
from saap.base.errors import UserError

PROCESS = 560_000_000  # Python, torch, transformers and scipy, with what the allocators keep
FREE_SHARE = 0.95  # of the memory that is available; the rest is for what others ask for meanwhile


@dataclass(frozen=True)
class Needs:
    """Bytes at the peak, by what they are for."""

    memory: dict[str, int]  # that must be resident at the same time
    disk: dict[str, int] = field(default_factory=dict)  # written beside or into the output before anything is deleted

    @property
    def memory_bytes(self) -> int:
        return sum(self.memory.values())

    @property
    def disk_bytes(self) -> int:
        return sum(self.disk.values())


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that this process may still take: what the system has, or less where a control group limits it.

    Of several processes that were started together on a machine, each may take its part.
    """
    left = memory_left(root)
    free = int(psutil.virtual_memory().available)
    together = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))  # of accelerate launch
    return (free if left is None else min(free, left)) // together


def fits(needs: Needs) -> bool:
    return needs.memory_bytes <= FREE_SHARE * available_memory()


def check_memory(needs: Needs, what: str, advice: str) -> None:
    """Raise UserError with the sum where memory would run out.

    Args:
        what: the command, as ``pruning``.
        advice: what would make it fit.
    """
    if not fits(needs):
        raise UserError(
            f"{what} needs {gigabytes(needs.memory_bytes)} of memory ({parts(needs.memory)}), and "
            f"{gigabytes(available_memory())} are free: {advice}"
        )


def check_disk(needs: Needs, out: Path, what: str) -> None:
    """Raise UserError with the sum where the file system of ``out`` would run full."""
    place = Path(out).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needs.disk_bytes > free:
        raise UserError(
            f"{what} needs {gigabytes(needs.disk_bytes)} of disk ({parts(needs.disk)}), and {gigabytes(free)} are free "
            f"at {place}: make room, or give -o a folder on another disk"
        )


def gigabytes(count: float) -> str:
    """Bytes as GB with one decimal, or MB below one."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def parts(amounts: dict[str, int]) -> str:
    """List the summands, largest first."""
    ordered = sorted(amounts.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {gigabytes(count)}" for name, count in ordered if count)
