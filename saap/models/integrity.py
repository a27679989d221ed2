"""Files of a model directory against the hashes that were written with them: damage is named, not computed with.

A directory that saap writes keeps size and sha256 of its files in ``saap.json``. Of a hub's cache, where a weight file
is a link to a file that is named by its sha256, the name is held against the content. Others have no hashes to hold.
"""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from devices.common.files import sha256_file
from saap.system.errors import UserError
from saap.system.json_files import read_object
from saap.system.outputs import RECORD

CACHE_RECORD = "saap-cache.json"
# The record itself, and a card that its owner goes on writing.
NOT_HASHED = re.compile(r"saap(-cache)?\.json$|README|LICENSE|NOTICE|\.")
_known: dict[tuple[str, int, int], str] = {}


def hashes(directory: Path) -> dict[str, dict[str, Any]]:
    """Size in bytes and sha256 of a directory's files that a model is made of, by name."""
    files = [p for p in sorted(directory.iterdir()) if p.is_file() and not NOT_HASHED.match(p.name)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashlib lets others compute
        return {
            file.name: {"bytes": file.stat().st_size, "sha256": sha256}
            for file, sha256 in zip(files, pool.map(known_sha256, files), strict=True)
        }


def check_directory(directory: str | Path) -> None:
    """Hold a model directory's files against their hashes, once per process for each content.

    Raises:
        UserError: a file that is not there or has changed, or a record that is damaged.
    """
    directory = Path(directory)
    record = next((file for name in (RECORD, CACHE_RECORD) if (file := directory / name).is_file()), None)
    if record:
        bad = differing(directory, read_object(record, "make the directory again").get("files", {}))
        remedy = f"make the directory again; if the change is yours, remove its entry and the checksum in {record.name}"
    else:
        named = {file: re.fullmatch(r"[0-9a-f]{64}", file.resolve().name) for file in directory.glob("*.safetensors")}
        blobs = {file.name: {"sha256": found[0]} for file, found in named.items() if found and file.is_symlink()}
        bad, remedy = differing(directory, blobs), "remove it from the hub's cache, and it is downloaded again"
    if bad:
        raise UserError(f"{directory / bad} is damaged (not the file that was written there): {remedy}")


def differing(directory: Path, files: Any) -> str | None:
    """The first file that is missing or has another content than its hash; None where all are as they were.

    Args:
        files: ``sha256`` and perhaps ``bytes`` by name, as a record has them; what is none makes the record differ.
    """
    try:
        for name, entry in files.items():
            path = directory / name
            try:
                size = path.stat().st_size
            except OSError:
                return name
            if Path(name).name != name or not path.is_file() or entry.get("bytes", size) != size:
                return name
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = dict(zip(files, pool.map(known_sha256, [directory / name for name in files]), strict=True))
        return next((name for name, entry in files.items() if entry["sha256"] != found[name]), None)
    except (AttributeError, KeyError, TypeError, ValueError):  # a name with a zero byte is a ValueError
        return RECORD


def known_sha256(path: Path) -> str:
    """Hex sha256 of a file, read once per process for each content."""
    stat = path.stat()
    key = str(path.resolve()), stat.st_size, stat.st_ctime_ns
    if key not in _known:
        _known[key] = sha256_file(path)
    return _known[key]
