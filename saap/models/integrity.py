"""Files of a model directory against the hashes that were written with them: damage is named, not computed with.

A directory that saap writes keeps size and sha256 of its files in ``saap.json``. Of a hub's cache, where a weight file
is a link to a file that is named by its sha256, the name is held against the content. Others have no hashes to hold.

An entry in the cache of converted models is built beside its place, renamed, and checked on every use. A process that
was killed leaves a hidden directory with its id in the name; the next one that builds removes it.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import psutil

from saap.base.errors import UserError
from saap.base.files import calling
from saap.base.hashing import known_sha256
from saap.base.writing import RECORD, read_object, write_document
from saap.models.directory import weight_files
from saap.models.record import FileHash

CACHE_RECORD = "saap-cache.json"
# The record itself, and a card that its owner goes on writing.
NOT_HASHED = re.compile(r"saap(-cache)?\.json$|README|LICENSE|NOTICE|\.")
# Counts up when a conversion would write other files, so that old entries are not taken for new ones.
CONVERTER = 1


def hashes(directory: Path) -> dict[str, FileHash]:
    """Size in bytes and sha256 of a directory's files that a model is made of, by name."""
    files = [p for p in sorted(directory.iterdir()) if p.is_file() and not NOT_HASHED.match(p.name)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashlib lets others compute
        return {
            file.name: {"bytes": file.stat().st_size, "sha256": sha256}
            for file, sha256 in zip(files, pool.map(known_sha256, files), strict=True)
        }


def check_directory(directory: str | Path) -> None:
    """Hold a model directory's files against their hashes, once per process for each content.

    Raises UserError: a file that is not there or has changed, a record that is damaged, or what is no file.
    """
    directory = Path(directory)
    weights = weight_files(directory)
    record = next((file for name in (RECORD, CACHE_RECORD) if (file := directory / name).is_file()), None)
    if record:
        bad = differing(directory, read_object(record, "make the directory again").get("files", {}))
        remedy = f"make the directory again; if the change is yours, remove its entry and the checksum in {record.name}"
    else:
        named = {file: re.fullmatch(r"[0-9a-f]{64}", file.resolve().name) for file in weights}
        blobs = {file.name: {"sha256": match[0]} for file, match in named.items() if match and file.is_symlink()}
        bad, remedy = differing(directory, blobs), "remove it from the hub's cache, and it is downloaded again"
    if bad:
        raise UserError(f"{directory / bad} is damaged (not the file that was written there): {remedy}")


def differing(directory: Path, files: object) -> str | None:
    """Return the first file that is missing or does not match its hash; None where all match.

    ``files``: ``sha256`` and perhaps ``bytes`` by name, as a record has them; what is none makes the record differ.
    """
    try:
        known = msgspec.convert(files, dict[str, FileHash])
        for name, entry in known.items():
            path = directory / name
            try:
                size = path.stat().st_size
            except OSError:
                return name
            if Path(name).name != name or not path.is_file() or entry.get("bytes", size) != size:
                return name
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            content = dict(zip(known, pool.map(known_sha256, [directory / name for name in known]), strict=True))
        return next((name for name, entry in known.items() if entry["sha256"] != content[name]), None)
    except (KeyError, ValueError):  # a name with a zero byte is a ValueError, and so is what is not a record
        return RECORD


def cached(entry: Path, build: Callable[[Path], None], source_sha256: str) -> Path:
    """Return the cache entry; one that is missing, damaged or of an older converter is built beside and renamed."""
    _make_cache(entry.parent)
    if _intact(entry, source_sha256):
        return entry
    _remove_leftovers(entry.parent)
    partial = entry.parent / f".{entry.name}.building-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        with calling(partial, entry):
            build(partial)
        record = {"converter": CONVERTER, "source_sha256": source_sha256, "files": hashes(partial)}
        write_document(partial / CACHE_RECORD, record)
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
    """Remove half-built entries and downloads of processes that were killed."""
    for path in cache.glob(".*"):
        owner = re.search(r"\.building-(\d+)(?:-\w+)?$", path.name)
        if owner and not psutil.pid_exists(int(owner.group(1))):
            shutil.rmtree(path, ignore_errors=True)


def _intact(directory: Path, source_sha256: str) -> bool:
    """Whether every recorded file is there unchanged."""
    try:
        record = read_object(directory / CACHE_RECORD, "")
    except UserError:
        return False
    known = record.get("converter"), record.get("source_sha256")
    return known == (CONVERTER, source_sha256) and differing(directory, record.get("files")) is None
