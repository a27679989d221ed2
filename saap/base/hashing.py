"""The sha256 of files: each is read once, by this process or by the one that started it as a worker.

A file is known by device, inode, size and time of its last change, which nobody can set back. One that changed just now
is read again: a clock that ticks every few milliseconds would not show a second change.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from saap.base.files import sha256_file

VARIABLE = "SAAP_HASHES"  # of a worker's environment
MOST = 200  # files that a worker is told of
JUST_NOW_NS = 100_000_000
_known: dict[str, str] = {}


def known_sha256(path: Path) -> str:
    """Hex sha256 of a file, from memory where the file is the one that was hashed before."""
    if VARIABLE in os.environ and not _known:
        pairs = [pair.split("=") for pair in os.environ[VARIABLE].split(",") if pair.count("=") == 1]
        _known.update(dict(pairs))
    status = path.stat()
    key = f"{status.st_dev}-{status.st_ino}-{status.st_size}-{status.st_ctime_ns}"
    if key in _known:
        return _known[key]
    digest = sha256_file(path)
    if time.time_ns() - status.st_ctime_ns > JUST_NOW_NS:
        _known[key] = digest
    return digest


def hashes_for_workers() -> dict[str, str]:
    """Variables that tell a worker which files this process hashed."""
    pairs = list(_known.items())[-MOST:]
    return {VARIABLE: ",".join("=".join(pair) for pair in pairs)} if pairs else {}
