"""Runs that a killed computer left on a board: noted here while they last, ended when the board is measured again.

A run whose follower is gone ends itself after a quarter of an hour, and keeps its board busy until then. Whoever starts
the same command again should not have to wait for a run of their own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import psutil

from bench.remote.board import Board
from bench.runtimes.session import cache_directory
from devices.common.files import write_text


@contextlib.contextmanager
def noted_run(board: Board) -> Iterator[str]:
    """The id of a new run, noted as this process's until the block ends; what was left on the board is ended first."""
    for old in left(board.name):
        board.clean(old)
    run = secrets.token_hex(8)
    note = _folder(board.name) / f"{run}.json"
    with contextlib.suppress(OSError):  # a cache that cannot be written costs a wait at most
        write_text(note, json.dumps({"pid": os.getpid(), "started": psutil.Process().create_time()}))
    try:
        yield run
    finally:
        with contextlib.suppress(OSError):
            note.unlink(missing_ok=True)


def left(board: str) -> list[str]:
    """Runs on a board of processes of this computer that are gone; they are forgotten by this."""
    runs = []
    for note in sorted(_folder(board).glob("*.json")):
        try:
            about = json.loads(note.read_text(encoding="utf-8"))
            if psutil.Process(int(about["pid"])).create_time() == about["started"]:
                continue
            runs.append(note.stem)
        except psutil.NoSuchProcess:
            runs.append(note.stem)
        except psutil.Error:
            continue
        except (OSError, ValueError, TypeError, KeyError, OverflowError):
            pass  # a damaged note names no run that could be trusted
        with contextlib.suppress(OSError):
            note.unlink(missing_ok=True)
    return runs


def _folder(board: str) -> Path:
    return cache_directory() / "boards" / hashlib.sha256(board.encode()).hexdigest()[:16]
