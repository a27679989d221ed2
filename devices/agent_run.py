"""A detached run on the board: started, supervised, followed, ended. Standard library only.

``runs/ID/`` holds ``request.json`` and the laid-out bundles; the measuring process appends to ``progress.jsonl`` and
writes ``result.json``; the supervisor beats in ``beat`` and writes ``done.json`` last. Whoever follows beats in
``lease``: a run that nobody has followed for a while ends itself and leaves nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from devices.agent_files import Store
from devices.agent_home import AgentError, Lock, alive, boot_id, guarded, read_json, started, write_json
from devices.agent_install import agent_folder, environment, ready

BEAT_S = 2.0
HUNG_S = 120.0  # without a beat of a supervisor that still runs
LEASE_S = 900.0
END_S = 10.0  # between asking a run to end and killing it
JOB = "bench.board_job"
_ID = re.compile(r"[0-9a-f]{16}")
_DEATH_SIGNAL, _SUBREAPER = 1, 36  # PR_SET_PDEATHSIG and PR_SET_CHILD_SUBREAPER of linux/prctl.h


def run_folder(folder: Path, run: str) -> Path:
    """Where a run is.

    Raises:
        AgentError: ``run`` is none.
    """
    if not isinstance(run, str) or not _ID.fullmatch(run):
        raise AgentError(f"{run!r} is no run: the two sides are not of one version")
    return folder / "runs" / run


def start(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Lay out the bundles and start the supervisor, once: a second call for the same run changes nothing.

    Args:
        request: run, key, bundles (each: name, files as relative path -> sha256), job (what the measuring process
            gets), root, lease_s.

    Raises:
        AgentError: the lock is not this run's any more, or files are missing.
    """
    with guarded(folder / "start.guard"):
        return _start(folder, request)


def _start(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    place, lock = run_folder(folder, request["run"]), Lock(folder, request["root"])
    if not lock.holds(request["run"]):
        raise AgentError("another run has taken the board meanwhile: measure again")
    if (place / "request.json").is_file():
        return {"boot_id": read_json(place / "request.json").get("boot_id")}
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    agent = ready(folder, request["key"])
    if agent is None:
        raise AgentError("its installation is not whole any more: measure again")
    for index, bundle in enumerate(request["bundles"]):
        Store(folder).lay_out(
            place / "bundles" / str(index), {f"{bundle['name']}/{k}": v for k, v in bundle["files"].items()}
        )
    boot = boot_id(request["root"])
    (place / "lease").touch()
    write_json(place / "job.json", request["job"])
    write_json(
        place / "request.json",
        {"run": request["run"], "boot_id": boot, "lease_s": request["lease_s"], "root": request["root"]},
    )
    with (place / "supervisor.txt").open("ab") as log:
        process = subprocess.Popen(
            [agent["python"], "-m", "devices.agent_run", str(folder), request["run"]],
            cwd=agent_folder(folder, request["key"]) / "code", env=environment(), stdin=subprocess.DEVNULL,
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    lock.process(request["run"], process.pid)
    write_json(place / "process.json", {"pid": process.pid, "start": started(process.pid)})
    return {"boot_id": boot}


def follow(folder: Path, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What happens in a run from a byte of its progress on, a beat at least every other second, and how it ended.

    Raises:
        AgentError: there is no such run.
    """
    place, lock = run_folder(folder, request["run"]), Lock(folder, request["root"])
    offset, beaten, beat_at = int(request["offset"]), 0.0, time.monotonic()
    while True:
        if not (place / "request.json").is_file():
            raise AgentError("the run is gone: it was ended there, or nobody followed it for too long")
        if boot_id(request["root"]) != read_json(place / "request.json").get("boot_id"):
            yield {"done": {"rebooted": True}}
            return
        _touch(place / "lease")
        lock.touch()
        done = read_json(place / "done.json")  # before the progress, so that nothing of it is missed
        process = read_json(place / "process.json")
        gone = not alive(process.get("pid"), process.get("start"))
        for line, offset in _lines(place / "progress.jsonl", offset):  # noqa: B020 one offset goes through
            yield {"line": line, "at": offset}
        if done or (gone and not read_json(place / "done.json")):
            yield {"done": done or {"error": "its process was killed there"}}
            return
        beat = _modified(place / "beat")
        if beat != beaten:
            beaten, beat_at = beat, time.monotonic()
        elif time.monotonic() - beat_at > HUNG_S:
            yield {"done": {"error": f"its process has not moved for {HUNG_S:.0f} s"}}
            return
        yield {"beat": True}
        time.sleep(BEAT_S / 2)


def fetch(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    """The result's text and its sha256."""
    path = run_folder(folder, request["run"]) / "result.json"
    try:
        text = path.read_bytes()
    except OSError:
        raise AgentError("the run left no result") from None
    return {"result": text.decode("utf-8", "replace"), "sha256": hashlib.sha256(text).hexdigest()}


def end(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    """End the run where it still goes on, remove it, give up the lock. May be asked again."""
    place, lock = run_folder(folder, request["run"]), Lock(folder, request["root"])
    process = read_json(place / "process.json")
    pid, begun = process.get("pid"), process.get("start")
    for what, seconds in ((signal.SIGTERM, END_S + 5), (signal.SIGKILL, 5.0)):
        limit = time.monotonic() + seconds
        if pid is not None and alive(pid, begun):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, what)
        while alive(pid, begun) and time.monotonic() < limit:
            time.sleep(0.05)
    shutil.rmtree(place, ignore_errors=True)
    lock.release(request["run"])
    return {"ended": True}


def sweep(folder: Path) -> None:
    """Remove the runs of others that nobody can come back for: none of their processes runs."""
    for place in (folder / "runs").glob("*"):
        process = read_json(place / "process.json")
        if not alive(process.get("pid"), process.get("start")) and time.time() - _modified(place) > LEASE_S:
            shutil.rmtree(place, ignore_errors=True)


class Supervisor:
    """Stays small beside the measuring process, and outlives it whatever happens to it."""

    def __init__(self, folder: Path, run: str) -> None:
        self.place, self.folder, self.run = run_folder(folder, run), folder, run
        request = read_json(self.place / "request.json")
        self.lock = Lock(folder, str(request.get("root", "/")))
        self._lease_s = float(request.get("lease_s", LEASE_S))
        self._stop = False

    def main(self) -> None:
        """Run the measuring process to its end; nothing that it started is left."""
        signal.signal(signal.SIGTERM, self._asked)
        _prctl(_SUBREAPER, 1)  # orphans of a killed child become ours, and are ended
        with (self.place / "progress.jsonl").open("ab") as told, (self.place / "stderr.txt").open("ab") as said:
            job = subprocess.Popen(
                [sys.executable, "-m", JOB, str(self.place)], stdin=subprocess.DEVNULL, stdout=told, stderr=said,
                start_new_session=True, preexec_fn=lambda: _prctl(_DEATH_SIGNAL, signal.SIGTERM),
            )  # fmt: skip
        followed = self._watch(job)
        _end_children()
        if followed:
            write_json(self.place / "done.json", self._how(job.returncode))
        else:
            shutil.rmtree(self.place, ignore_errors=True)
            self.lock.release(self.run)

    def _watch(self, job: subprocess.Popen[bytes]) -> bool:
        """Until the process ends; False when nobody follows any more."""
        lease, leased_at = 0.0, time.monotonic()
        while True:
            (self.place / "beat").touch()
            self.lock.touch()
            if (now := _modified(self.place / "lease")) != lease:
                lease, leased_at = now, time.monotonic()
            followed = time.monotonic() - leased_at <= self._lease_s
            if self._stop or not followed:
                job.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    job.wait(END_S)
                if job.poll() is None:
                    job.kill()
                    job.wait()
                return followed
            with contextlib.suppress(subprocess.TimeoutExpired):
                job.wait(BEAT_S)
                return True

    def _how(self, code: int) -> dict[str, Any]:
        if code == 0:
            return {"code": 0}
        lines = (self.place / "stderr.txt").read_text(encoding="utf-8", errors="replace").splitlines()
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")[:300]
        killed = "killed there, as the system does when memory runs out" if code == -signal.SIGKILL else ""
        return {"code": code, "error": killed or last or f"its process ended with {code}"}

    def _asked(self, number: int, frame: FrameType | None) -> None:
        self._stop = True


def _prctl(option: int, value: int) -> None:
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _end_children() -> None:
    """Kill what is left below us, until nothing is; see PR_SET_CHILD_SUBREAPER in prctl(2)."""
    for _ in range(100):
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        children = [pid for pid in _processes() if _parent(pid) == os.getpid()]
        if not children:
            return
        for pid in children:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").glob("[0-9]*")]


def _parent(pid: int) -> int | None:
    try:
        return int(
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[1]
        )
    except (OSError, IndexError, ValueError):
        return None


def _lines(path: Path, offset: int) -> Iterator[tuple[str, int]]:
    """Whole lines from ``offset`` on, each with the offset behind it."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            new = file.read()
    except OSError:
        return
    for line in new.splitlines(keepends=True):
        if line.endswith(b"\n"):
            offset += len(line)
            yield line.decode("utf-8", "replace"), offset


def _touch(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.touch()


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


if __name__ == "__main__":
    Supervisor(Path(sys.argv[1]), sys.argv[2]).main()
