"""What a command writes: beside its place and renamed, by one process at a time, never over what saap did not write."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from devices.common.files import cache_directory, naming
from saap.system.errors import UserError

RECORD = "saap.json"
OURS = (RECORD, "bundle.json", "run.json")  # a directory that holds one of these may be written over


def check_output(out: str | Path) -> None:
    """Refuse an output path that holds something else than an earlier output of ours."""
    out = Path(out)
    if out.is_file():
        raise UserError(f"{out} is a file: give a directory that is new, empty, or an earlier output of saap")
    if out.is_dir() and any(out.iterdir()) and not any((out / name).is_file() for name in OURS):
        raise UserError(f"{out} holds other files: give a directory that is new, empty, or an earlier output of saap")


@contextmanager
def claimed(out: str | Path) -> Iterator[None]:
    """Keep other processes of this user from writing the same output for the time of the block.

    The lock lies in the cache, so that nothing is left beside the output, and ends with the process, however that ends.
    This process may claim an output again inside the block.

    Raises:
        UserError: another process is writing it.
    """
    from filelock import FileLock, Timeout

    name = hashlib.sha256(str(Path(out).resolve()).encode("utf-8", "surrogateescape")).hexdigest()
    place = cache_directory() / "locks" / f"{name[:32]}.lock"
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(place, is_singleton=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"another process of saap is writing {out}: wait until it has ended, or give another output"
        ) from None
    except OSError:  # a cache that cannot be written: one process is the usual case
        yield
        return
    try:
        yield
    finally:
        lock.release()


@contextmanager
def writing_directory(out: str | Path) -> Iterator[Path]:
    """Give a fresh directory beside ``out``; it takes the place of ``out`` when the block ends without an error.

    Raises:
        UserError: ``out`` exists and holds something that saap did not write, or another process is writing it.
    """
    out = Path(out)
    check_output(out)
    with claimed(out), beside(out, "partial") as partial:
        yield partial
        put_in_place(partial, out)


@contextmanager
def writing_file(out: str | Path) -> Iterator[Path]:
    """Give a name beside ``out``; the file that the block writes there takes the place of ``out`` when it ends well.

    Raises:
        UserError: another process is writing it.
    """
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with claimed(out):
        for left in _left(out, "partial"):
            left.unlink(missing_ok=True)
        partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
        try:
            with naming(out):
                yield partial
            partial.replace(out)
        finally:
            partial.unlink(missing_ok=True)


def put_in_place(partial: Path, out: Path) -> None:
    """Rename a finished directory to ``out``; what was there is moved aside first, and removed last.

    A process that is killed in between leaves the old directory, the new one, or the old one aside, which ``beside``
    puts back.
    """
    if not out.exists():
        partial.rename(out)
        return
    old = out.parent / f".{out.name}.old-{os.getpid()}"
    shutil.rmtree(old, ignore_errors=True)
    out.rename(old)
    try:
        partial.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def beside(out: str | Path, purpose: str) -> Iterator[Path]:
    """Give a fresh hidden directory beside ``out`` for the time of the block; those of killed processes are deleted."""
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    for old in _left(out, "old"):
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(out)
    for left in _left(out, purpose):
        shutil.rmtree(left, ignore_errors=True)
    fresh = out.parent / f".{out.name}.{purpose}-{os.getpid()}"
    fresh.mkdir()
    try:
        with naming(out):
            yield fresh
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _left(out: Path, purpose: str) -> Iterator[Path]:
    """What processes that are gone left beside ``out``."""
    for left in out.parent.glob(f".{out.name}.{purpose}-*"):
        owner = left.name.rsplit("-", 1)[1]
        if owner.isdigit() and (int(owner) == os.getpid() or not psutil.pid_exists(int(owner))):
            yield left
