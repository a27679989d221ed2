"""JSON objects on disk: one-line errors, written beside and renamed. Standard library only, for a board."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from saap.errors import SaapError


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        remedy: what to do when it is damaged, such as ``make the directory again``.

    Raises:
        SaapError: not there, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SaapError(f"cannot read {path}: {error.strerror}; {remedy}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise SaapError(f"{path} is damaged ({error}): {remedy}") from None
    if not isinstance(value, dict):
        raise SaapError(f"{path} is damaged (not an object): {remedy}")
    return value


def write_json(path: Path, value: Any) -> None:
    """Write beside and rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
