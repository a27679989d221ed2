"""Bundles of models at hand, without the checks of a command."""

from pathlib import Path
from typing import Any

import torch

from export.bundle.manifest import BundleManifest
from export.options import ExportOptions
from export.write import Rows, write_bundle
from saap.base.progress import Progress


def export_bundle(
    directory: Path, out: Path, ids: torch.Tensor | None = None, progress: Progress | None = None, **options: Any
) -> BundleManifest:
    """``ids`` [rows, tokens]: check parity on them, and scale an int8 cache with them."""
    rows: Rows | None = None if ids is None else lambda count: (ids, "dice")
    return write_bundle(directory, out, ExportOptions(**options), rows, progress)


def export_portable(directory: Path, out: Path, ids: torch.Tensor | None = None, **options: Any) -> BundleManifest:
    """In standard operators."""
    return export_bundle(directory, out, ids, target="portable", **options)
