"""The cache of converted models: built beside, renamed, checked on every use.

An entry is a directory with a small record of its files. A process that was killed leaves a hidden directory with its
id in the name; the next one that builds removes it.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import psutil

from saap.models.integrity import CACHE_RECORD, differing, hashes
from saap.system.errors import UserError
from saap.system.json_files import read_object, write_document

# Counts up when a conversion would write other files, so that old entries are not taken for new ones.
CONVERTER = 1


def cached(entry: Path, build: Callable[[Path], None], source_sha256: str) -> Path:
    """The cache entry, built beside and renamed when it is not there, is damaged or comes from an older converter."""
    _make_cache(entry.parent)
    if _intact(entry, source_sha256):
        return entry
    _remove_leftovers(entry.parent)
    partial = entry.parent / f".{entry.name}.building-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        build(partial)
        _write_record(partial, source_sha256)
        if not _intact(entry, source_sha256):  # another process may have been faster
            shutil.rmtree(entry, ignore_errors=True)
            partial.rename(entry)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return entry


def _make_cache(cache: Path) -> None:
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the cache {cache} cannot be made ({error.strerror}): set SAAP_CACHE to another place"
        ) from None


def _remove_leftovers(cache: Path) -> None:
    """Half-built entries and downloads of processes that were killed."""
    for path in cache.glob(".*"):
        owner = re.search(r"\.building-(\d+)(?:-\w+)?$", path.name)
        if owner and not psutil.pid_exists(int(owner.group(1))):
            shutil.rmtree(path, ignore_errors=True)


def _write_record(directory: Path, source_sha256: str) -> None:
    record = {"converter": CONVERTER, "source_sha256": source_sha256, "files": hashes(directory)}
    write_document(directory / CACHE_RECORD, record)


def _intact(directory: Path, source_sha256: str) -> bool:
    """Whether every recorded file is there unchanged."""
    try:
        record = read_object(directory / CACHE_RECORD, "")
    except UserError:
        return False
    known = record.get("converter"), record.get("source_sha256")
    return known == (CONVERTER, source_sha256) and differing(directory, record.get("files")) is None
