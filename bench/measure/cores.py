"""Which cores a measurement runs on: the fastest ones, one hardware thread per core before any core's second."""

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
    return len({_siblings(cpu, root) for cpu in cpus})


def choose_cores(threads: int, cpus: list[int] | None = None, root: Path = CPUS) -> list[int]:
    """The ``threads`` logical CPUs to pin to: highest capacity first, SMT siblings last, then lowest number."""
    cpus = allowed_cores() if cpus is None else cpus
    seen: dict[str, int] = {}
    keys = {}
    for cpu in cpus:
        core = _siblings(cpu, root)
        keys[cpu] = (seen.get(core, 0), -_capacity(cpu, root), cpu)
        seen[core] = seen.get(core, 0) + 1
    return sorted(sorted(cpus, key=keys.__getitem__)[:threads])


def pin(cpus: list[int]) -> None:
    """Keep this process, and the threads that it starts, on these CPUs; a system without affinity is left alone."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cpus)


def _siblings(cpu: int, root: Path) -> str:
    try:
        return (root / f"cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def _capacity(cpu: int, root: Path) -> int:
    """Relative speed of a core on big.LITTLE; kernels without it have equal cores."""
    try:
        return int((root / f"cpu{cpu}/cpu_capacity").read_text())
    except (OSError, ValueError):
        return 0
