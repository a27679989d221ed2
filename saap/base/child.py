"""A fresh Python process that answers one JSON line, with a time limit; lines before it tell how far it is.

``call`` is this side, ``job_and_tell`` the child's. ``python -m saap.base.child`` is a child that tells which
packages its interpreter has.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from importlib.util import find_spec
from pathlib import Path
from typing import IO, TypeVar

from saap.base.hashing import hashes_for_workers
from saap.base.waiting import environment_of_others

PACKAGES = Path(__file__).resolve().parents[2]  # the folder that holds devices/
MOST_ANSWER = 64 << 20  # bytes; a worker that prints without end is ended
STDERR_LINES = 12
AWAKE_S = 0.2
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h
EVERY_WORKER = ("numpy", "msgspec")  # packages that any worker needs

T = TypeVar("T")
Tell = Callable[[Mapping[str, object]], None]


class ChildFailedError(Exception):
    """The process crashed, hung or did not answer; the message is one line, ``stderr`` its last lines."""

    def __init__(self, message: str, stderr: list[str] | None = None) -> None:
        super().__init__(message)
        self.stderr = stderr or []


def call(
    module: str,
    job: Mapping[str, object],
    timeout_s: float,
    env: dict[str, str] | None = None,
    python: str = sys.executable,
    notify: Callable[[dict[str, object]], None] | None = None,
) -> dict[str, object]:
    """Run ``python -m module`` with ``job`` on stdin; the last object that it prints.

    The child starts in our own folder, so that no other ``bench`` on the way is taken for ours, also where ``python``
    is another interpreter.

    Args:
        notify: called with every object that comes before the answer, a line each.

    Raises:
        ChildFailedError: with the last line of its stderr.
    """
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as err:
        stdin.write(json.dumps(job).encode())
        stdin.seek(0)
        process: subprocess.Popen[bytes] | None = None
        answer: dict[str, object] | None = None
        try:
            with signals_wait():
                process = subprocess.Popen(
                    [python, "-m", module], stdin=stdin, stdout=subprocess.PIPE, stderr=err, cwd=PACKAGES,
                    env={**environment_of_others(), **hashes_for_workers(), **(env or {})}, start_new_session=True,
                )  # fmt: skip
            for line in _lines_until(process, time.monotonic() + timeout_s):
                document = _object(line)
                if answer is not None and notify is not None:
                    notify(answer)
                answer = document
        except TimeoutError:
            raise _failed(f"no answer within {timeout_s:g} s", err) from None
        except OverflowError:
            raise _failed("the worker printed without end", err) from None
        finally:
            if process is not None:
                _end(process)
        if process.returncode:
            raise _failed(_how_it_ended(process.returncode), err)
        if answer is None:
            raise _failed("the worker ended without an answer", err)
        return answer


class Resident:
    """A child that stays and answers a JSON line with a JSON line, until the block ends."""

    def __init__(self, module: str, timeout_s: float, env: Mapping[str, str], python: str = sys.executable) -> None:
        self._module, self._timeout_s = module, timeout_s
        self._env, self._python = {**environment_of_others(), **env}, python

    def __enter__(self) -> Resident:
        self._err = tempfile.TemporaryFile()
        with signals_wait():
            self._process = subprocess.Popen(
                [self._python, "-m", self._module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._err,
                cwd=PACKAGES, env={**self._env, **hashes_for_workers()}, start_new_session=True,
            )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        _end(self._process)
        self._err.close()

    def ask(self, document: Mapping[str, object]) -> dict[str, object]:
        """Send a document, and what comes back; a child that rests goes on.

        Raises ChildFailedError: it ended, hung, or said something else.
        """
        process = self._process
        assert process.stdin is not None
        try:
            if hasattr(signal, "SIGCONT"):
                process.send_signal(signal.SIGCONT)
            process.stdin.write(json.dumps(document).encode() + b"\n")
            process.stdin.flush()
            line = next(_lines_until(process, time.monotonic() + self._timeout_s), b"")
        except (BrokenPipeError, StopIteration):
            line = b""
        except TimeoutError:
            raise _failed(f"no answer within {self._timeout_s:g} s", self._err) from None
        answer = _object(line)
        if answer is None:
            raise _failed(
                _how_it_ended(process.returncode) if process.poll() else "the worker gave no answer", self._err
            )
        return answer

    def rest(self) -> None:
        """Stop the child and all its threads, where the system can, so that none spins while others are timed."""
        if hasattr(signal, "SIGSTOP"):
            self._process.send_signal(signal.SIGSTOP)


def job_and_tell(kind: type[T]) -> tuple[T, Tell]:
    """Read a child's job as ``kind``, and return it with a function that sends an object to the parent.

    What libraries print goes to stderr from now on, so that stdout holds our lines only.
    """
    import msgspec  # which this module is asked for, too, where it may be missing

    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def tell(document: Mapping[str, object]) -> None:
        out.write(json.dumps(document) + "\n")
        out.flush()

    return msgspec.json.decode(sys.stdin.buffer.read(), type=kind), tell


def end_with_parent() -> None:
    """Let the system end this process with its parent: one that is stopped, or hangs, does not see that it has gone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)


def read_lines(
    pipe: IO[bytes], patience: Callable[[float], float], most: int, heard: Callable[[], None] = lambda: None
) -> Iterator[bytes]:
    """Yield the lines of a pipe as they come, without their ends.

    Args:
        patience: given the seconds since the last byte, how many more to wait before it is asked again; it raises to
            wait no longer.
        most: bytes of one line.
        heard: called whenever there is a piece, be it part of a line.

    Raises:
        OverflowError: a line is longer.
    """
    rest, since = b"", time.monotonic()
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while True:
            if not selector.select(patience(time.monotonic() - since)):
                continue
            piece = os.read(pipe.fileno(), 1 << 16)
            if not piece:
                break
            since = time.monotonic()
            heard()
            *whole, rest = (rest + piece).split(b"\n")
            yield from whole
            if len(rest) > most:
                raise OverflowError("a line without end")
    if rest:
        yield rest


def _lines_until(process: subprocess.Popen[bytes], deadline: float) -> Iterator[bytes]:
    """Lines of stdout until the process has ended; TimeoutError at the deadline."""

    def left(silent_s: float = 0.0) -> float:
        seconds = deadline - time.monotonic()
        if seconds <= 0:
            raise TimeoutError
        return seconds

    assert process.stdout is not None
    total = 0
    for line in read_lines(process.stdout, left, MOST_ANSWER):
        total += len(line)
        if total > MOST_ANSWER:
            raise OverflowError
        yield line
    try:  # stdout is closed, the process may yet hang
        process.wait(left())
    except subprocess.TimeoutExpired:
        raise TimeoutError from None


def _object(line: bytes) -> dict[str, object] | None:
    try:
        document = json.loads(line)
    except ValueError:
        return None
    return document if isinstance(document, dict) else None


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the child and what it started, where it still runs (time limit, or the user's interrupt)."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _how_it_ended(code: int) -> str:
    if code > 0:
        return f"exit {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


def _failed(what: str, err: IO[bytes]) -> ChildFailedError:
    size = err.seek(0, os.SEEK_END)
    err.seek(max(0, size - 8192))
    lines = [line.strip() for line in err.read().decode(errors="replace").splitlines() if line.strip()]
    because = f": {lines[-1][:300]}" if lines else ""
    return ChildFailedError(what + because, [line[:500] for line in lines[-STDERR_LINES:]])


def until_done(futures: Collection[Future[T]]) -> None:
    """Wait for other threads' work, and hear every signal meanwhile.

    Python handles a signal in its main thread. A wait without end there does not notice one that the system handed to
    another thread, or that came in just before it: an interrupt now and then had no effect.
    """
    while wait(futures, AWAKE_S).not_done:
        pass


@contextlib.contextmanager
def signals_wait() -> Iterator[None]:
    """Let a signal that arrives inside the block take effect after it.

    An interrupt inside ``Popen`` would leave a process that nobody knows of. Blocking the signals instead would not do:
    a child inherits its parent's mask.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    handlers = {number: handler for number, handler in previous.items() if callable(handler)}
    for number in handlers:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if came:
        handlers[signal.Signals(came[0])](came[0], None)


def absent(modules: Sequence[str]) -> list[str]:
    """Those of ``modules`` that cannot be found. They are not imported, which would take seconds."""
    return [name for name in modules if not _is_installed(name)]


def _is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # the package around it
        return False


if __name__ == "__main__":
    print(json.dumps({"missing": absent([*EVERY_WORKER, *json.load(sys.stdin)["modules"]])}))
