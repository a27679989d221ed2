"""``saap cache``: shows what saap keeps between runs and how large it is, or clears it. No torch, no transformers."""

from __future__ import annotations

import shutil
from pathlib import Path

import click

from saap.base.files import cache_place
from saap.cli.console import print_table, tell
from saap.cli.types import Sections

KEPT = {  # a part: a folder of the cache, or how its folders begin, and what it holds
    "scores": "scores and measured losses of calibration text",
    "prices": "prices of what may go from a model",
    "teacher": "a teacher's answers",
    "prepacked": "weights packed for this CPU, which saap no longer uses",
    "tensorrt": "TensorRT engines, which saap no longer uses",
    "boards": "what is known of boards",
    "hashes": "hashes of large files, each for a day",
    "locks": "names of outputs that are being written",
    "matplotlib": "the list of fonts",
    "model": "models converted from GGUF files",
    "others": "packaged models, and environments of emulated boards",
}
ALL, OTHERS = "all", "others"


@click.command(cls=Sections)
@click.option(
    "--clear", is_flag=False, flag_value=ALL, metavar="[PART]", type=click.Choice([ALL, *KEPT]),
    help="Remove a part, or all of it. Nothing may be running.",
)  # fmt: skip
def cache(clear: str | None) -> None:
    """Show what saap keeps for next time, or remove it.

    The folder is the one that SAAP_CACHE names, else saap in XDG_CACHE_HOME or ~/.cache.

    \b
    Example:
      saap cache
      saap cache --clear prices
    """
    place = cache_place()
    sizes: dict[str, int] = {}
    for entry in sorted(place.iterdir()) if place.is_dir() else []:
        part = next((name for name in KEPT if entry.name.startswith(name)), OTHERS)
        if clear in (None, ALL, part):
            sizes[part] = sizes.get(part, 0) + _size(entry)
        if clear in (ALL, part):
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    ordered = sorted(sizes.items(), key=lambda item: -item[1])
    print_table("", ["part", "kept", "MB"], [[part, KEPT[part], f"{size / 1e6:,.1f}"] for part, size in ordered])
    tell(f"{sum(sizes.values()) / 1e6:,.1f} MB {'removed from' if clear else 'in'} {place}")


def _size(entry: Path) -> int:
    files = [entry] if entry.is_file() else [path for path in entry.rglob("*") if path.is_file()]
    return sum(path.lstat().st_size for path in files)
