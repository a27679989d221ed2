"""Inputs and outputs of a command: JSON objects with checksums; outputs are written by one process at a time, beside
their place, and renamed, never over what saap did not write.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from saap.base.documents import LARGEST
from saap.base.errors import UserError
from saap.base.files import (
    ChecksumError,
    cache_directory,
    calling,
    check_nested,
    is_special,
    naming,
    parse_json,
    read_whole,
    with_checksum,
    without_checksum,
    write_text,
)
from saap.base.outputs import check_directory_place
from saap.base.progress import Progress, note

RECORD = "saap.json"
POLL_S = 0.5
_claimed: set[tuple[Path, int]] = set()  # lock and thread
RUN = "run.json"
OURS = (RECORD, "bundle.json", RUN)  # a directory that holds one of these may be written over


def check_output(out: str | Path, *inputs: object, record: str | None = None) -> None:
    """Refuse an output path that holds something else than an earlier output of ours, or one of the inputs.

    ``record``: the name of the record that this output will have, as an earlier one must; None: any of ours.
    """
    out = Path(out)
    check_directory_place(out, OURS if record is None else (record,), *inputs)
    here = Path.cwd()
    if record != RUN and out.resolve() in (here, *here.parents):
        raise UserError(f"{out} is, or holds, the working directory: give a directory of its own")


@contextmanager
def claimed(out: str | Path) -> Iterator[None]:
    """Keep other processes of this user from writing the same output for the time of the block.

    The lock is a file in the cache that goes with the block; where a process was killed, the next one takes it over.
    This thread may claim an output again inside the block; while another one writes it, that is a UserError.
    """
    place = cache_directory() / "locks" / hashlib.sha256(os.fsencode(Path(out).resolve())).hexdigest()[:32]
    mine = place, threading.get_ident()
    try:
        lock = None if mine in _claimed else _locked(place)
    except BlockingIOError:
        raise UserError(
            f"another process of saap is writing {out}: wait until it has ended, or give another output"
        ) from None
    except (OSError, ImportError):  # a cache that cannot be written, or no POSIX: one process is the usual case
        lock = None
    if lock is None:
        yield
        return
    _claimed.add(mine)
    try:
        yield
    finally:
        _claimed.remove(mine)
        place.unlink(missing_ok=True)  # while it is held: whoever has opened it sees that it is not there any more
        os.close(lock)


@contextmanager
def taking_turns(progress: Progress | None) -> Iterator[None]:
    """Let one process of this user measure at a time, as the lock of a board does; the others wait."""
    place, waits = cache_directory() / "locks" / "measuring", False
    while True:
        try:
            lock = _locked(place)
        except BlockingIOError:
            if not waits:
                note(progress, "waiting for another measurement of saap on this host")
            waits = True
            time.sleep(POLL_S)
        except (OSError, ImportError):  # as in claimed
            yield
            return
        else:
            break
    try:
        yield
    finally:
        place.unlink(missing_ok=True)  # as in claimed
        os.close(lock)


def _locked(place: Path) -> int:
    """Return a descriptor that holds the lock. Raises BlockingIOError: another one does."""
    import fcntl

    place.parent.mkdir(parents=True, exist_ok=True)
    while True:
        lock = os.open(place, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock), place.stat()):
                return lock
        except FileNotFoundError:  # its owner has just removed it
            pass
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


@contextmanager
def writing_directory(out: str | Path) -> Iterator[Path]:
    """Give a fresh directory beside ``out``; it takes the place of ``out`` when the block ends without an error.

    Raises UserError: ``out`` exists and holds something that saap did not write, or another process is writing it.
    """
    out = Path(out)
    check_output(out)
    with claimed(out), beside(out, "partial") as partial:
        yield partial
        put_in_place(partial, out)


@contextmanager
def writing_file(out: str | Path) -> Iterator[Path]:
    """Give a name beside ``out``; the file that the block writes there takes the place of ``out`` when it ends well."""
    out = Path(out)
    if is_special(out):
        raise UserError(f"{out} is not a regular file: give the name of one")
    out.parent.mkdir(parents=True, exist_ok=True)
    with claimed(out):
        for left in _left(out, "partial"):
            left.unlink(missing_ok=True)
        partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
        try:
            with naming(out), calling(partial, out):
                yield partial
            partial.replace(out)
        finally:
            partial.unlink(missing_ok=True)


def put_in_place(partial: Path, out: Path) -> None:
    """Rename a finished directory to ``out``; what was there is moved aside first, and removed last.

    A process that is killed in between leaves the old directory, the new one, or the old one aside, which ``beside``
    puts back.
    """
    if not os.path.lexists(out):
        partial.rename(out)
        return
    old = out.parent / f".{out.name}.old-{os.getpid()}"
    _remove(old)
    out.rename(old)
    try:
        partial.rename(out)
    except OSError:
        old.rename(out)
        raise
    _remove(old)


def _remove(old: Path) -> None:
    """Remove a directory, or a link without what it names."""
    if old.is_symlink():
        old.unlink()
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def beside(out: str | Path, purpose: str) -> Iterator[Path]:
    """Give a fresh hidden directory beside ``out`` for the time of the block; those of killed processes are deleted."""
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    for old in _left(out, "old"):
        if os.path.lexists(out):
            _remove(old)
        else:
            old.rename(out)
    for left in _left(out, purpose):
        shutil.rmtree(left, ignore_errors=True)
    fresh = out.parent / f".{out.name}.{purpose}-{os.getpid()}"
    fresh.mkdir()
    try:
        with naming(out), calling(fresh, out):
            yield fresh
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _left(out: Path, purpose: str) -> Iterator[Path]:
    """Yield the leftovers beside ``out`` of processes that are gone."""
    for left in out.parent.glob(f".{out.name}.{purpose}-*"):
        owner = left.name.rsplit("-", 1)[1]
        if owner.isdigit() and (int(owner) == os.getpid() or not psutil.pid_exists(int(owner))):
            yield left


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """Read the object in a JSON file, without its checksum.

    ``remedy``: what to do when it is damaged, such as ``make the directory again``.

    Raises UserError: not there, not JSON, not an object, or changed after it was written.
    """
    try:
        value = parse_json(read_whole(path, LARGEST))
        check_nested(value)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; {remedy}") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): {remedy}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged (not an object): {remedy}")
    try:
        return without_checksum(value)
    except ChecksumError as error:
        raise UserError(f"{path} is damaged ({error}): {remedy}") from None


def write_document(path: Path, document: Mapping[str, object]) -> None:
    """Write an object with its checksum, beside and renamed."""
    write_json(path, with_checksum(document))


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")
