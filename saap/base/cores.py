"""The cores that this process may use."""

from __future__ import annotations

import os
from pathlib import Path

CPUS = Path("/sys/devices/system/cpu")


def allowed_cores() -> list[int]:
    """Logical CPUs that this process may use, ascending."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def physical_cores(cpus: list[int] | None = None, root: Path = CPUS) -> int:
    """Distinct physical cores among the allowed logical ones: the default thread count."""
    cpus = allowed_cores() if cpus is None else cpus
    return len({siblings(cpu, root) for cpu in cpus})


def siblings(cpu: int, root: Path) -> str:
    """The hardware threads that share a core with ``cpu``, as the kernel lists them."""
    try:
        return (root / f"cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)
