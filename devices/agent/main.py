"""The board's side of ``saap bench --on``: answers one request and ends. Python >= 3.10, standard library only.

This file and its neighbours travel with every request, so a board that was never seen before needs
nothing but Python, and the two sides are always of one version. A request is one line of JSON on standard input, for
``put`` followed by the file's bytes. Answers are lines of ``MARK`` and JSON on standard output: any number of
``{"beat"|"at"|"line": ...}``, then ``{"answer": ...}``, or ``{"error": ...}``, one line for a person.

| request | what it does |
|---|---|
| hello | Python, memory, disk, clock, boot, and what of the asked files is missing |
| take | the lock, old runs swept away, room made |
| put | a file of the store, from where it was cut |
| install | the bench's code, and its packages in a venv |
| start, follow, fetch, end | a detached run (``devices.agent.run``, ``devices.agent.supervisor``) |
"""

from __future__ import annotations

import errno
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, cast

from devices.agent.files import Store, free, full
from devices.agent.home import AgentError, Lock, boot_id, home, started
from devices.agent.install import install, ready
from devices.agent.run import end, fetch, follow, start, sweep

if TYPE_CHECKING:
    from devices.agent.requests import (
        FollowRequest,
        HelloAnswer,
        PutRequest,
        Request,
        TakeAnswer,
        TakeRequest,
    )

MARK = "saap-agent-1 "
KEEPING = ("held", "put", "install", "start")  # which hash, copy or install for long, and only for who has the lock
EVERY_S = 1.0
GONE_S = 60  # without a byte of a file that is being sent; the other side gives a connection up sooner
Tell = Callable[[dict[str, object]], None]
Beat = Callable[..., None]  # whatever takes long calls it now and then


def hello(folder: Path, request: Request, tell: Tell, beat: Beat) -> HelloAnswer:
    """Answer a preflight with bytes and seconds since the epoch.

    Raises AgentError: a system without Linux's /proc, by which processes are known.
    """
    if started(os.getpid()) is None:
        raise AgentError(f"it is no Linux but {platform.system()}: give a board with Linux")
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "folder": str(folder),
        "free_bytes": free(folder),
        "available_bytes": _available(request["root"]),
        "time": time.time(),
        "boot_id": boot_id(request["root"]),
    }


def take(folder: Path, request: TakeRequest, tell: Tell, beat: Beat) -> TakeAnswer:
    """Take the lock; tell which files are missing (sha256 -> bytes that are here), and whether the agent is installed.

    Raises AgentError: another run measures, or what is missing does not fit.
    """
    lock = Lock(folder, request["root"])
    lock.take(request["run"], request["owner"])
    try:
        beat = _beat(lock, request["run"], tell)
        sweep(folder)
        store = Store(folder, beat)
        missing = {}
        for sha in request["files"]:
            if (there := store.received(sha)) is not None:
                missing[sha] = there
        agent = ready(folder, request["key"], beat)
        needed = sum(request["files"][sha] - there for sha, there in missing.items())
        needed += request["reserve"] + (0 if agent else request["agent_bytes"])
        if store.make_room(request["files"], needed) < needed:
            raise AgentError(full(folder, needed))
    except BaseException:
        lock.untake(request["run"])
        raise
    return {"missing": missing, "installed": agent is not None}


def put(folder: Path, request: PutRequest, tell: Tell, beat: Beat) -> dict[str, bool]:
    """Receive a file, or the rest of one.

    A computer that lost its network says nothing, and sshd may wait for it for hours: whoever waits for its bytes ends
    before, so that the file is free when it comes back.
    """

    def heard(done: int | None = None) -> None:
        signal.alarm(GONE_S)
        beat(done)

    signal.signal(signal.SIGALRM, _gone)
    signal.alarm(GONE_S)
    try:
        Store(folder, heard).receive(
            request["sha"], request["size"], request["offset"], cast("BufferedReader", sys.stdin.buffer), heard
        )
    finally:
        signal.alarm(0)
    return {"whole": True}


def follows(folder: Path, request: FollowRequest, tell: Tell, beat: Beat) -> dict[str, object]:
    for document in follow(folder, request):
        if isinstance(done := document.get("done"), dict):
            return done
        tell(document)
    raise AgentError("the run is gone")


REQUESTS: dict[str, Callable[..., object]] = {
    "hello": hello,
    "take": take,
    "held": lambda folder, request, tell, beat: {"held": Store(folder, beat).received(request["sha"])},
    "put": put,
    "install": lambda folder, request, tell, beat: install(folder, request, beat),
    "start": lambda folder, request, tell, beat: start(folder, request, beat),
    "follow": follows,
    "fetch": lambda folder, request, tell, beat: fetch(folder, request),
    "end": lambda folder, request, tell, beat: end(folder, request, beat),
}


def main() -> None:
    try:
        request = json.loads(sys.stdin.buffer.readline())
        folder = home()
        beat = _beat(Lock(folder, request["root"]), request["run"] if request["do"] in KEEPING else None, say)
        answer: dict[str, object] = {"answer": REQUESTS[request["do"]](folder, request, say, beat)}
    except AgentError as error:
        answer = {"error": str(error), "again": error.again}
    except BrokenPipeError:
        os._exit(1)  # nobody listens any more
    except OSError as error:
        answer = {"error": _why(error)}
    try:
        say(answer)
    except BrokenPipeError:
        if request["do"] == "take":  # whoever asked does not know that it has the lock
            Lock(home(), request["root"]).untake(request["run"])
        os._exit(1)


def say(document: dict[str, object]) -> None:
    sys.stdout.write(MARK + json.dumps(document) + "\n")
    sys.stdout.flush()


def _gone(number: int, frame: FrameType | None) -> None:
    raise AgentError(f"nothing came for {GONE_S} s", again=True)


def _why(error: OSError) -> str:
    """Say what a person can mend; any other error is raised again."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return full(home())
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):  # left by a run as root, perhaps
        return f"{error.filename}: {error.strerror}: give it to this user, or name another folder there in SAAP_CACHE"
    raise error


def _beat(lock: Lock, run: str | None, tell: Tell) -> Beat:
    """Keep the lock for ``run`` and tell how far it is, at most once in ``EVERY_S``.

    Raises AgentError, here and in the beat: the run has lost the lock, so that its work would disturb another's.
    """
    if run is not None:
        lock.keep(run)
    last = 0.0

    def beat(done: int | None = None) -> None:
        nonlocal last
        if time.monotonic() - last > EVERY_S:
            last = time.monotonic()
            if run is not None:
                lock.keep(run)
            tell({"at": done})

    return beat


def _available(root: str) -> int | None:
    try:
        lines = (Path(root) / "proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
