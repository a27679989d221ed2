"""One fresh Python process that answers one JSON line, with a time limit."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Any

PACKAGES = Path(__file__).resolve().parents[1]  # the folder that holds bench/


class ChildFailedError(Exception):
    """The process crashed, hung or did not answer; the message is one line for a person."""


def call(
    module: str,
    config: dict[str, Any],
    timeout_s: float,
    env: dict[str, str] | None = None,
    python: str = sys.executable,
) -> dict[str, Any]:
    """Run ``python -m module`` with ``config`` on stdin; the object that it prints.

    The child starts in our own folder, so that no other ``bench`` on the way is taken for ours, also where ``python``
    is another interpreter.

    Raises:
        ChildFailedError: with the last line of its stderr.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            [python, "-m", module],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=err,
            cwd=PACKAGES,
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )
        try:
            process.communicate(json.dumps(config).encode(), timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise ChildFailedError(f"no answer within {timeout_s:g} s{_because(err)}") from None
        finally:
            _end(process)
        if process.returncode:
            raise ChildFailedError(f"{_how_it_ended(process.returncode)}{_because(err)}")
        return _answer(out)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the child and what it started, where it still runs (time limit, or the user's interrupt)."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _how_it_ended(code: int) -> str:
    if code > 0:
        return f"exit {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


def _because(err: IO[bytes]) -> str:
    size = err.seek(0, os.SEEK_END)
    err.seek(max(0, size - 4096))
    lines = [line.strip() for line in err.read().decode(errors="replace").splitlines() if line.strip()]
    return f": {lines[-1][:300]}" if lines else ""


def _answer(out: IO[bytes]) -> dict[str, Any]:
    out.seek(0)
    try:
        answer = json.loads(out.read())
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise ChildFailedError("the worker ended without an answer")
    return answer
