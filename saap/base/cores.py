"""The cores that this process may use."""

from __future__ import annotations

import os
from pathlib import Path

from saap.base.tree import number

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
    """Return the hardware threads that share a core with ``cpu``, as the kernel lists them."""
    try:
        return (root / f"cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def choose_cores(threads: int, cpus: list[int] | None = None, root: Path = CPUS) -> list[int]:
    """Choose the ``threads`` logical CPUs to pin to: highest capacity first, SMT siblings last, then lowest number."""
    cpus = allowed_cores() if cpus is None else cpus
    ranks: dict[str, int] = {}
    keys = {}
    for cpu in cpus:
        core = siblings(cpu, root)
        capacity = number(root / f"cpu{cpu}/cpu_capacity") or 0  # kernels that do not tell have equal cores
        keys[cpu] = (ranks.get(core, 0), -capacity, cpu)
        ranks[core] = ranks.get(core, 0) + 1
    return sorted(sorted(cpus, key=keys.__getitem__)[:threads])


def pin(cpus: list[int]) -> None:
    """Keep this process, and the threads that it starts, on these CPUs; a system without affinity is left alone."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cpus)
