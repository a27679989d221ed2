"""A JSON document as its owner would change it by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def edited(path: Path, edit: Callable[[dict[str, Any]], object] | None = None, **fields: Any) -> None:
    """Change a document: ``edit`` does it in place, ``fields`` are set; its checksum and the files' hashes go."""
    document = json.loads(path.read_text(encoding="utf-8"))
    document.pop("checksum", None)
    if path.name != "bundle.json":
        document.pop("files", None)
    document.update(fields)
    if edit:
        edit(document)
    path.write_text(json.dumps(document), encoding="utf-8")
