"""The memory that a process may take: the host's, and the limits of its control groups, version 1 and 2."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from saap.base.tree import field, fields, number, text


def memory_limit(root: Path = Path("/")) -> int | None:
    """Return the tightest limit, bytes, from this process's group up to the root; None without one."""
    limits = [limit for level, name, _ in _levels(root) if (limit := number(level / name))]
    return min(limits, default=None)


def memory_left(root: Path = Path("/")) -> int | None:
    """Bytes below the tightest limit that are not in use; page cache that can be dropped counts as free."""
    left = []
    for level, limit_name, usage_name in _levels(root):
        limit, usage = number(level / limit_name), number(level / usage_name)
        if limit and usage is not None:
            named = fields(level / "memory.stat")
            left.append(limit - usage + (named.get("total_inactive_file") or named.get("inactive_file") or 0))
    return min(left, default=None)


def available(root: Path = Path("/")) -> int | None:
    """Bytes that a process may still take: MemAvailable, or what a control group leaves where that is less."""
    sizes = (field(root / "proc/meminfo", "MemAvailable"), memory_left(root))
    return min((size for size in sizes if size is not None), default=None)


def _levels(root: Path) -> Iterator[tuple[Path, str, str]]:
    """Yield (group's directory, name of its limit, name of its usage) for every level that exists here."""
    mount = root / "sys/fs/cgroup"
    for line in (text(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            places = [(mount, "memory.max", "memory.current"), (mount / "unified", "memory.max", "memory.current")]
        elif "memory" in controllers.split(","):
            places = [(mount / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes")]
        else:
            continue
        # Inside a container the path may be the host's; only the levels that exist here are read.
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for base, limit, usage in places:
            yield from ((base.joinpath(*parts[:depth]), limit, usage) for depth in range(len(parts) + 1))
