"""A detached run on the board: started, supervised, followed, ended. Standard library only.

``runs/ID/`` holds ``request.json`` and the laid-out bundles; the measuring process appends to ``progress.jsonl`` and
writes ``result.json``; the supervisor beats in ``beat`` and writes ``done.json`` last. Whoever follows beats in
``lease``: a run that nobody has followed for a while ends itself and leaves nothing.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from devices.agent.files import Store, free, full
from devices.agent.home import (
    CACHE,
    AgentError,
    Lock,
    alive,
    below,
    boot_id,
    guarded,
    kill,
    modified,
    read_json,
    started,
    touch,
    write_json,
)
from devices.agent.install import agent_folder, environment, ready

if TYPE_CHECKING:
    from devices.agent.requests import FetchAnswer, FollowRequest, RunRequest, StartRequest

BEAT_S = 2.0
HUNG_S = 120.0  # without a beat of a supervisor that still runs
LEASE_S = 900.0
LEAST_FREE = 1 << 20  # bytes: with less, not even how a run ended can be written
END_S = 10.0  # between asking a run to end and killing it
_ID = re.compile(r"[0-9a-f]{16}")


def run_folder(folder: Path, run: str) -> Path:
    """Return the folder of a run. Raises AgentError: ``run`` is not a run."""
    if not isinstance(run, str) or not _ID.fullmatch(run):
        raise AgentError(f"{run!r} is no run: the two sides are not of one version")
    return folder / "runs" / run


def start(folder: Path, request: StartRequest, beat: Callable[[], None] = lambda: None) -> dict[str, object]:
    """Lay out the bundles and start the supervisor, once: a second call for the same run changes nothing.

    Args:
        beat: called while files are copied.

    Raises:
        AgentError: the lock is not this run's any more, or files are missing.
    """
    with guarded(folder / "start.guard"):
        return _start(folder, request, beat)


def _start(folder: Path, request: StartRequest, beat: Callable[[], None]) -> dict[str, object]:
    place, lock = run_folder(folder, request["run"]), Lock(folder, request["root"])
    lock.keep(request["run"])
    if (place / "request.json").is_file():
        return {"boot_id": read_json(place / "request.json").get("boot_id")}
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    agent = ready(folder, request["key"], beat)
    if agent is None:
        raise AgentError("its installation is not whole any more: measure again")
    for index, bundle in enumerate(request["bundles"]):
        Store(folder, beat).lay_out(
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
            [agent["python"], "-m", "devices.agent.supervisor", str(folder), request["run"]],
            cwd=agent_folder(folder, request["key"]) / "code", env={**environment(), CACHE: str(folder)},
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    lock.process(request["run"], process.pid)
    write_json(place / "process.json", {"pid": process.pid, "start": started(process.pid)})
    return {"boot_id": boot}


def follow(folder: Path, request: FollowRequest) -> Iterator[dict[str, object]]:
    """Yield a run's progress from a byte of it on, a beat at least every other second, and how it ended.

    Raises AgentError: there is no such run.
    """
    place, lock = run_folder(folder, request["run"]), Lock(folder, request["root"])
    offset, beaten, beat_at = int(request["offset"]), 0.0, time.monotonic()
    while True:
        if not (place / "request.json").is_file():
            raise AgentError("the run is gone: it was ended there, or nobody followed it for too long")
        if boot_id(request["root"]) != read_json(place / "request.json").get("boot_id"):
            yield {"done": {"rebooted": True}}
            return
        touch(place / "lease")
        lock.touch(request["run"])
        done = read_json(place / "done.json")  # before the progress, so that nothing of it is missed
        gone = not alive(read_json(place / "process.json"))
        for line, offset in _lines(place / "progress.jsonl", offset):  # noqa: B020 one offset goes through
            yield {"line": line, "at": offset}
        if done or (gone and not read_json(place / "done.json")):
            # A full disk keeps a supervisor from writing its last word.
            killed = full(folder) if free(folder) < LEAST_FREE else "its process was killed there"
            yield {"done": done or {"error": killed}}
            return
        beat = modified(place / "beat")
        if beat != beaten:
            beaten, beat_at = beat, time.monotonic()
        elif time.monotonic() - beat_at > HUNG_S:
            yield {"done": {"error": f"its process has not moved for {HUNG_S:.0f} s"}}
            return
        yield {"beat": True}
        time.sleep(BEAT_S / 2)


def fetch(folder: Path, request: RunRequest) -> FetchAnswer:
    path = run_folder(folder, request["run"]) / "result.json"
    try:
        text = path.read_bytes()
    except OSError:
        raise AgentError("the run left no result") from None
    return {"result": text.decode("utf-8", "replace"), "sha256": hashlib.sha256(text).hexdigest()}


def end(folder: Path, request: RunRequest, beat: Callable[[], None] = lambda: None) -> dict[str, bool]:
    """End the run where it still goes on, remove it, give up the lock. May be asked again.

    A start whose connection was cut is waited for; one that comes later finds the lock gone.
    """
    place = run_folder(folder, request["run"])
    with guarded(folder / "start.guard"):
        _end_process(read_json(place / "process.json"), beat)
        shutil.rmtree(place, ignore_errors=True)
        Lock(folder, request["root"]).release(request["run"])
    return {"ended": True}


def _end_process(process: dict[str, object], beat: Callable[[], None]) -> None:
    """Ask the supervisor to end; kill it and all below it when it does not."""
    pid = process.get("pid")
    if not isinstance(pid, int) or not alive(process):
        return
    kill(pid, signal.SIGTERM)  # once: what it does then is not to be interrupted
    limit = time.monotonic() + 3 * END_S
    while alive(process):
        if time.monotonic() > limit:
            for number in [*below(pid), pid]:
                kill(number)
        beat()
        time.sleep(0.1)


def sweep(folder: Path) -> None:
    """Remove the runs of others that nobody can come back for: none of their processes runs."""
    for place in (folder / "runs").glob("*"):
        if not alive(read_json(place / "process.json")) and abs(time.time() - modified(place)) > LEASE_S:
            shutil.rmtree(place, ignore_errors=True)


def _lines(path: Path, offset: int) -> Iterator[tuple[str, int]]:
    """Whole lines from ``offset`` on, each with the offset behind it."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            new = file.read()
    except OSError:
        return
    *whole, _ = new.split(b"\n")  # a \r inside a line, as a library's progress has, ends none
    for line in whole:
        offset += len(line) + 1
        yield line.decode("utf-8", "replace"), offset
