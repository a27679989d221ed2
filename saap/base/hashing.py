"""The sha256 of files that were read before, in this process or in an earlier one.

A file is known by its device, inode, size and time of last change, which programs cannot set on Linux file systems. One
that changed just now is read again: a clock that ticks every few milliseconds would not show a second change. A worker
knows the files that its parent hashed. Large files are remembered from one process to the next, because reading them
takes a tenth of the time to a first token. They are read again every day, because storage decays.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from saap.base.files import cache_place, sha256_file, write_text

VARIABLE = "SAAP_HASHES"  # of a worker's environment
CACHED = "hashes"  # the file of the cache, in the form of the variable
MOST = 200  # files that others are told of
LARGE = 1 << 20  # bytes of a file that is remembered for other processes
JUST_NOW_NS = 100_000_000
DAY_S = 86_400
_known: dict[str, str] = {}


def known_sha256(path: Path) -> str:
    """Hex sha256 of a file, from memory where the file is the one that was hashed before."""
    if not _known:
        _known.update(pair.split("=") for pair in _remembered().split(",") if pair.count("=") == 1)  # type: ignore[misc]
    status = path.stat()
    day = int(time.time() // DAY_S)
    key = f"{day}-{status.st_dev}-{status.st_ino}-{status.st_size}-{status.st_ctime_ns}"
    if key in _known:
        return _known[key]
    digest = sha256_file(path)
    if time.time_ns() - status.st_ctime_ns > JUST_NOW_NS:
        _known[key] = digest
        if status.st_size >= LARGE:
            with suppress(OSError):  # a cache that cannot be written costs time only
                write_text(cache_place() / CACHED, _text())
    return digest


def hashes_for_workers() -> dict[str, str]:
    """Variables that tell a worker which files this process hashed."""
    return {VARIABLE: _text()} if _known else {}


def _text() -> str:
    return ",".join("=".join(pair) for pair in list(_known.items())[-MOST:])


def _remembered() -> str:
    if VARIABLE in os.environ:
        return os.environ[VARIABLE]
    with suppress(OSError, ValueError):
        return (cache_place() / CACHED).read_text(encoding="ascii")
    return ""
