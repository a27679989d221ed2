"""Memory limits of the control groups that a process is in, version 1 and 2."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def memory_limit(root: Path = Path("/")) -> int | None:
    """The tightest limit, bytes, from this process's group up to the root; None without one."""
    found = [limit for level, name, _ in _levels(root) if (limit := _number(level / name))]
    return min(found, default=None)


def memory_left(root: Path = Path("/")) -> int | None:
    """Bytes below the tightest limit that are not in use; page cache that can be dropped counts as free."""
    left = []
    for level, limit_name, usage_name in _levels(root):
        limit, usage = _number(level / limit_name), _number(level / usage_name)
        if limit and usage is not None:
            left.append(limit - usage + _droppable(level))
    return min(left, default=None)


def _levels(root: Path) -> Iterator[tuple[Path, str, str]]:
    """(group's directory, name of its limit, name of its usage) for every level that exists here."""
    mount = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
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


def _droppable(level: Path) -> int:
    named = _counts(level / "memory.stat")
    return named.get("total_inactive_file") or named.get("inactive_file") or 0


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def _counts(path: Path) -> dict[str, int]:
    words = _words(path)
    return {name: int(value) for name, value in zip(words[::2], words[1::2], strict=False) if value.isdigit()}
