"""Memory limits of the control groups that a process is in, version 1 and 2, and a new group with a limit.

As a script it starts a command in a group: ``python cgroup.py GROUP/cgroup.procs COMMAND...``.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
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


class CgroupError(ValueError):
    """No group with a memory limit can be made here; the message says why and what to do."""

    exit_code = 2


@dataclass(frozen=True)
class MemoryGroup:
    """A control group with a memory limit, which processes are started in by :attr:`launcher`."""

    path: Path
    limit_bytes: int
    version: int  # of control groups: 1 or 2

    @property
    def launcher(self) -> tuple[str, ...]:
        """What to put before a command, so that it starts in this group.

        A process that moved in later would leave the pages it already has charged to its old group; one that is
        replaced (execve) in the new group starts with none.
        """
        return (sys.executable, "-I", "-S", str(Path(__file__).resolve()), str(self.path / "cgroup.procs"))

    def oom_kills(self) -> int:
        """Processes that the kernel killed here because of the limit (memory.events, memory.oom_control)."""
        return _counts(self.path / ("memory.events" if self.version == 2 else "memory.oom_control")).get("oom_kill", 0)


@contextlib.contextmanager
def limited_memory(limit_bytes: int, root: Path = Path("/")) -> Iterator[MemoryGroup]:
    """A new group below this process's own, removed at the end. This process stays where it is.

    Version 1 (``memory.limit_in_bytes``) takes any group as parent, version 2 (``memory.max``) only one that passes the
    controller on, which a group with processes of its own cannot (kernel documentation, cgroup-v2, "No Internal Process
    Constraint"): there the nearest one above is taken.

    Args:
        limit_bytes: resident memory, page cache and swap of all processes inside together.

    Raises:
        CgroupError: neither version lets us.
    """
    refused = []
    for parent, version in _parents(root):
        path = parent / f"saap-{os.getpid()}"
        with contextlib.suppress(OSError):  # of a killed process that had our number, as they have in containers
            path.rmdir()
        try:
            path.mkdir()
        except OSError as error:
            refused.append(f"{parent} ({error.strerror})")
            continue
        try:
            group = MemoryGroup(path, limit_bytes, version)
            if why := _set_up(group):
                refused.append(f"{parent} ({why})")
                continue
            yield group
            return
        finally:
            _remove(path)
    where = "; ".join(refused) or "no memory controller is passed on to this process's group"
    raise CgroupError(
        f"no control group with a memory limit can be made: {where}. Run as root, or in a group of your own: "
        "systemd-run --user --scope saap bench ..."
    )


def _parents(root: Path) -> Iterator[tuple[Path, int]]:
    """Groups that a new one may be made in, the nearest first."""
    levels = [(level, limit) for level, limit, _ in _levels(root)]
    for level, limit in reversed(levels):
        if limit == "memory.limit_in_bytes":
            if (level / limit).exists():
                yield level, 1
        elif "memory" in _words(level / "cgroup.subtree_control"):
            yield level, 2


def _set_up(group: MemoryGroup) -> str | None:
    """Write the limit and try to start something inside; why it does not work, or None."""
    names = {1: ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes"), 2: ("memory.max", "memory.swap.max")}
    memory, swap = (group.path / name for name in names[group.version])
    try:
        memory.write_text(str(group.limit_bytes))
    except OSError as error:
        return f"{memory.name}: {error.strerror}"
    with contextlib.suppress(OSError):  # a kernel without swap accounting has no such file
        if swap.exists():
            swap.write_text(str(group.limit_bytes) if group.version == 1 else "0")
    done = subprocess.run([*group.launcher, sys.executable, "-I", "-S", "-c", ""], capture_output=True, check=False)
    return (done.stderr.decode(errors="replace").strip().splitlines() or ["failed"])[-1] if done.returncode else None


def _remove(path: Path) -> None:
    for _ in range(40):  # the last process may not have gone yet
        try:
            path.rmdir()
            return
        except OSError:
            time.sleep(0.05)


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def _counts(path: Path) -> dict[str, int]:
    words = _words(path)
    return {name: int(value) for name, value in zip(words[::2], words[1::2], strict=False) if value.isdigit()}


def _enter(procs: str, command: list[str]) -> None:
    """Move this process into a group and become ``command``."""
    try:
        Path(procs).write_text(str(os.getpid()))
    except OSError as error:
        sys.exit(f"cgroup.procs: {error.strerror}")
    os.execvp(command[0], command)


if __name__ == "__main__":
    _enter(sys.argv[1], sys.argv[2:])
