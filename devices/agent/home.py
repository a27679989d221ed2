"""The agent's folder on a board, and the lock that lets one run at a time measure there. Standard library only."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

CACHE = "SAAP_CACHE"  # moves the folder, as everywhere in this project
STALE_S = 120  # a lock that nobody has touched for so long, and whose process is gone, holds nothing


class AgentError(Exception):
    """A failure on the board, and what to do: one line without the board's name.

    Args:
        again: whether the same request may work in a moment.
    """

    def __init__(self, message: str, again: bool = False) -> None:
        super().__init__(message)
        self.again = again


def home() -> Path:
    """Return the folder, which is made where it is missing. Raises AgentError: it cannot be written."""
    places = [Path("/data/local/tmp/saap")]  # Android's
    with contextlib.suppress(RuntimeError):  # no home
        places.insert(0, Path.home() / ".cache/saap")
    if chosen := os.environ.get(CACHE):
        with contextlib.suppress(RuntimeError):  # sshd's SetEnv leaves a ~ as it is
            chosen = str(Path(chosen).expanduser())
        places = [Path(chosen).absolute()]  # since a run is started in another folder than a login
    for place in places:
        with contextlib.suppress(OSError):
            place.mkdir(parents=True, exist_ok=True)
            if os.access(place, os.W_OK):
                return place
    raise AgentError(f"{places[0]} cannot be written: free it, or name another folder there in {CACHE}")


def boot_id(root: str) -> str:
    """Return a value that changes with every boot; empty where the kernel has none. ``root`` is that of /proc."""
    try:
        return (Path(root) / "proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _stat(pid: int) -> list[str]:
    """Return the fields of a process from its state on (proc(5), stat); empty where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def started(pid: int) -> str | None:
    """Return the time at which a running process started, in ticks: with the pid it names one process."""
    fields = _stat(pid)
    return fields[19] if fields and fields[0] not in ("Z", "X") else None


def alive(process: Mapping[str, object]) -> bool:
    """Whether the very process of a ``pid`` and a ``start`` runs."""
    pid, start = process.get("pid"), process.get("start")
    return isinstance(pid, int) and start is not None and started(pid) == start


def below(pid: int) -> list[int]:
    """Its children and theirs."""
    pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    parents = {each: int(fields[1]) for each in pids if (fields := _stat(each))}
    descendants: list[int] = []
    generation = [pid]
    while generation:
        generation = [child for child, parent in parents.items() if parent in generation]
        descendants += generation
    return descendants


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def write_json(path: Path, document: object) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(document), encoding="utf-8")
    partial.replace(path)


def read_json(path: Path) -> dict[str, object]:
    """Read an object; empty where there is none that can be read."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


class Lock:
    """``lock.json`` of the folder: who measures here, since when, and by which process.

    Its modification time is the heartbeat. It holds while that is fresh or the process runs, and never over a reboot.
    """

    def __init__(self, folder: Path, root: str = "/") -> None:
        self.path, self._guard, self._root = folder / "lock.json", folder / "lock.guard", root

    def take(self, run: str, owner: str) -> None:
        """Take the lock for ``run``; taken again by the same run, it stays. Raises AgentError: another run has it."""
        with guarded(self._guard):
            lock = read_json(self.path)
            if lock.get("run") == run:
                write_json(self.path, {**lock, "taker": os.getpid()})
                return
            if self.path.exists() and not self._stale(lock):
                begun, who, process = lock.get("since"), lock.get("owner", "somebody"), lock.get("pid")
                seconds = max(0.0, time.time() - begun) if isinstance(begun, float) else 0.0
                since = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
                what = f" (process {process} there)" if process else ""
                raise AgentError(f"{who} measures there since {since}{what}: wait until that run has ended")
            write_json(
                self.path,
                {"run": run, "owner": owner, "since": time.time(), "boot_id": boot_id(self._root),
                 "taker": os.getpid()},
            )  # fmt: skip

    def process(self, run: str, pid: int) -> None:
        with guarded(self._guard):
            lock = read_json(self.path)
            if lock.get("run") == run:
                write_json(self.path, {**lock, "pid": pid, "start": started(pid)})

    def holds(self, run: str) -> bool:
        return read_json(self.path).get("run") == run

    def touch(self, run: str) -> bool:
        """Keep it fresh for ``run``, and say whether that still has it: whoever expired must disturb nobody."""
        with guarded(self._guard):
            if not self.holds(run):
                return False
            with contextlib.suppress(OSError):
                os.utime(self.path)
            return True

    def keep(self, run: str) -> None:
        """Touch the lock. Raises AgentError: another run has it, or none."""
        if not self.touch(run):
            raise AgentError("another run has taken the board meanwhile: measure again")

    def release(self, run: str) -> None:
        with guarded(self._guard):
            if self.holds(run):
                self.path.unlink(missing_ok=True)

    def untake(self, run: str) -> None:
        """Give up what this process took in vain, unless the same run has taken it again over another connection."""
        with guarded(self._guard):
            lock = read_json(self.path)
            if (lock.get("run"), lock.get("taker")) == (run, os.getpid()):
                self.path.unlink(missing_ok=True)

    def _stale(self, lock: dict[str, object]) -> bool:
        if lock.get("boot_id", boot_id(self._root)) != boot_id(self._root):
            return True
        # A board without a clock of its own jumps when it learns the time: a touch far ahead is as old as one long ago.
        return abs(time.time() - self.path.stat().st_mtime) > STALE_S and not alive(lock)


@contextlib.contextmanager
def guarded(path: Path) -> Iterator[None]:
    """One process at a time: a request whose connection was cut may still be at work when it is made again."""
    with path.open("a") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        yield


def touch(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.touch()


def modified(path: Path) -> float:
    """Seconds since the epoch, 0 where there is none."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
