"""Small files of a bundle or a model directory, read whole and hashed before anything is made of them."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path

from export.bundle.manifest import MANIFEST, BundleError, BundleManifest, read_manifest
from saap.base.files import read_whole
from saap.base.tokenizer_file import LARGEST_TOKENIZER, TOKENIZER

LARGEST_JSON = 16 << 20  # bytes that are read of a small file
LARGEST = {TOKENIZER: LARGEST_TOKENIZER, "chat_template.jinja": 1 << 20}


def manifest_of(directory: Path) -> BundleManifest | None:
    """Read the manifest of a bundle; None for a model directory."""
    return read_manifest(directory) if (directory / MANIFEST).is_file() else None


@dataclass(frozen=True)
class SmallFiles:
    """The small files of a bundle or, without ``manifest``, of a model directory.

    ``hashed``: names of those that were read and are as the manifest lists them.
    """

    directory: Path
    manifest: BundleManifest | None
    hashed: set[str] = field(default_factory=set)

    def read(self, name: str) -> bytes | None:
        """Read a file; None where there is none.

        Of a bundle these are the very bytes that the manifest lists, hashed before anything is made of them.

        Raises BundleError: no file, larger than such a file ever is, not listed, or not as listed.
        """
        path, most = self.directory / name, LARGEST.get(name, LARGEST_JSON)
        entry = None if self.manifest is None else self.manifest.files.get(name)
        if not os.path.lexists(path) and entry is None:
            return None
        if self.manifest is not None and entry is None:
            raise BundleError(f"{path} is not listed in {MANIFEST}: remove it, or export the bundle again")
        try:
            content = read_whole(path, most)
        except (OSError, ValueError) as error:
            raise BundleError(f"{path} cannot be read ({error}): {remedy(self.directory)}") from None
        if entry is not None:
            if hashlib.sha256(content).hexdigest() != entry.sha256:
                raise BundleError(f"{path} does not match the hash in {MANIFEST}: export the bundle again")
            self.hashed.add(name)
        return content


def remedy(directory: Path) -> str:
    """Say how to repair a damaged file of a bundle or a model directory."""
    return "export the bundle again" if (directory / MANIFEST).is_file() else "get or make the model again"
