"""JSON objects on disk: one-line errors, checksums, written beside and renamed. Standard library only."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from devices.common.files import ChecksumError, parse_json, with_checksum, without_checksum, write_text
from saap.system.errors import UserError


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """The object in a JSON file, without its checksum.

    Args:
        remedy: what to do when it is damaged, such as ``make the directory again``.

    Raises:
        UserError: not there, not JSON, not an object, or changed after it was written.
    """
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
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


def check_place(path: Path) -> None:
    """Refuse, before minutes of work, a file that could not be written.

    Raises:
        UserError: it is a directory, or its folder cannot be written to.
    """
    if path.is_dir():
        raise UserError(f"{path} is a directory: give the JSON file to write")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): give another place") from None


def write_document(path: Path, document: Mapping[str, Any]) -> None:
    """Write an object with its checksum, beside and renamed."""
    write_json(path, with_checksum(document))


def write_json(path: Path, value: Any) -> None:
    """Write beside and rename."""
    write_text(path, json.dumps(value, indent=1) + "\n")
