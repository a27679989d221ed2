"""sha256 of files, and of a JSON document inside itself. Standard library only; everything of saap may import it.

A document that saap writes carries ``checksum`` beside its own fields: sha256 over the others as JSON with sorted keys,
so that a byte that changed on a disk or on the way is found when it is read, and not taken for a number.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FIELD = "checksum"


class ChecksumError(ValueError):
    """A document is not the one that was written; the message goes on from the name of its file."""


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def with_checksum(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document with its checksum, the last of its fields."""
    fields = {name: value for name, value in document.items() if name != FIELD}
    return {**fields, FIELD: _checksum(json.loads(json.dumps(fields)))}  # as it will be read: lists, and keys of text


def without_checksum(document: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a document that was read. One without a checksum, of an earlier saap or by hand, passes.

    Raises:
        ChecksumError: the checksum is that of other fields.
    """
    fields = {name: value for name, value in document.items() if name != FIELD}
    if FIELD in document and document[FIELD] != _checksum(fields):
        raise ChecksumError(f"it was changed after it was written; if that was you, remove its {FIELD!r}")
    return fields


def _checksum(fields: Mapping[str, Any]) -> str:
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
