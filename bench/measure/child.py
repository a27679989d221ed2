"""One fresh Python process that answers one JSON line, with a time limit; lines before it tell how far it is."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from bench.measure.signals import signals_wait

PACKAGES = Path(__file__).resolve().parents[2]  # the folder that holds bench/
MOST_ANSWER = 64 << 20  # bytes; a worker that prints without end is ended
STDERR_LINES = 12

Told = Callable[[dict[str, Any]], None]


class ChildFailedError(Exception):
    """The process crashed, hung or did not answer; the message is one line, ``stderr`` its last lines."""

    def __init__(self, message: str, stderr: list[str] | None = None) -> None:
        super().__init__(message)
        self.stderr = stderr or []


def call(
    module: str,
    config: dict[str, Any],
    timeout_s: float,
    env: dict[str, str] | None = None,
    python: str = sys.executable,
    told: Told | None = None,
) -> dict[str, Any]:
    """Run ``python -m module`` with ``config`` on stdin; the last object that it prints.

    The child starts in our own folder, so that no other ``bench`` on the way is taken for ours, also where ``python``
    is another interpreter.

    Args:
        told: called with every object that comes before the answer, a line each.

    Raises:
        ChildFailedError: with the last line of its stderr.
    """
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as err:
        given.write(json.dumps(config).encode())
        given.seek(0)
        process: subprocess.Popen[bytes] | None = None
        answer: dict[str, Any] | None = None
        try:
            with signals_wait():
                process = subprocess.Popen(
                    [python, "-m", module],
                    stdin=given,
                    stdout=subprocess.PIPE,
                    stderr=err,
                    cwd=PACKAGES,
                    env={**os.environ, **(env or {})},
                    start_new_session=True,
                )
            for line in _lines(process, time.monotonic() + timeout_s):
                document = _object(line)
                if answer is not None and told is not None:
                    told(answer)
                answer = document
            process.wait()
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


def _lines(process: subprocess.Popen[bytes], deadline: float) -> Iterator[bytes]:
    """Lines of stdout as they come; TimeoutError at the deadline, OverflowError past what any answer takes."""
    assert process.stdout is not None
    rest, total = b"", 0
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise TimeoutError
            piece = os.read(process.stdout.fileno(), 1 << 16)
            if not piece:
                break
            total += len(piece)
            if total > MOST_ANSWER:
                raise OverflowError
            *whole, rest = (rest + piece).split(b"\n")
            yield from whole
    if rest:
        yield rest
    # stdout is closed, the process may yet hang.
    try:
        process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        raise TimeoutError from None


def _object(line: bytes) -> dict[str, Any] | None:
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
