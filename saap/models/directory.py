"""The files of a model directory that are read: regular ones inside it, or the hub cache's links to its own blobs.

Somebody else may have made the directory. A link could have any file of this user's copied into what is published, a
pipe never ends, and an index may name a pickle.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from fnmatch import fnmatch
from pathlib import Path
from typing import BinaryIO

import msgspec

from saap.base.documents import LARGEST
from saap.base.errors import UserError
from saap.base.writing import read_object

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
WEIGHTS = "*.safetensors"
# What goes along from one model directory to the next: all but weights and config.
SIDECARS = (
    "tokenizer*.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "chat_template.*", "generation_config.json", "LICENSE*", "NOTICE*", "README.md",
)  # fmt: skip
BLOB = re.compile(r"\.\./\.\./blobs/(?:[0-9a-f]{40}|[0-9a-f]{64})")


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def check_files(directory: str | Path) -> None:
    """Refuse a directory that holds anything but regular files, the hub's links to its blobs, and directories, or a
    file that would be carried along and is larger than any of its kind.

    Raises UserError: names the first such entry.
    """
    with os.scandir(directory) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            regular = entry.is_file(follow_symlinks=False) or entry.is_dir(follow_symlinks=False)
            if regular or (entry.is_symlink() and _is_blob(Path(entry.path))):
                if entry.stat().st_size > LARGEST and any(fnmatch(entry.name, pattern) for pattern in SIDECARS):
                    raise UserError(f"{entry.path} is larger than {LARGEST >> 20} MiB: get it again, or remove it")
                continue
            kind = "a link" if entry.is_symlink() else "a pipe, a socket or a device"
            raise UserError(f"{entry.path} is {kind}: a model directory holds files; put a file there, or remove it")


def _is_blob(link: Path) -> bool:
    """Whether a link is the hub's: from ``models--*/snapshots/REVISION`` to a regular file of the same ``blobs``."""
    folder = link.parent.resolve()
    if folder.parent.name != "snapshots" or not folder.parents[1].name.startswith("models--"):
        return False
    target = str(link.readlink())
    try:
        return bool(BLOB.fullmatch(target)) and stat.S_ISREG((folder / target).lstat().st_mode)
    except OSError:
        return False


def weight_files(directory: str | Path) -> list[Path]:
    """List the safetensors files that hold a model's tensors: those that its index names, else all; perhaps none.

    Raises UserError: an entry of the directory that is no file, or an index that names anything but such files.
    """
    directory = Path(directory)
    check_files(directory)
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    index = directory / INDEX
    if not index.is_file():
        return sorted(path for path in directory.glob(WEIGHTS) if path.is_file())
    try:
        names = set(msgspec.convert(read_object(index, "get it again"), _Index).weight_map.values())
    except msgspec.ValidationError as error:
        raise UserError(f"{index} is damaged ({error}): get it again") from None
    for name in sorted(names):
        if not re.fullmatch(r"[^/\\\0]+\.safetensors", name):
            raise UserError(f"{index} names {name[:80]!r}: must be a safetensors file beside it; do not use this model")
        if not (directory / name).is_file():
            raise UserError(f"{directory} has no file {name}, which {INDEX} names: get it again")
    return sorted(directory / name for name in names)


def copy_sidecars(src: Path, dst: Path) -> None:
    """Copy tokenizer, chat template, generation config, licence and model card, but neither weights nor config.

    ``dst``: an existing directory; files of the same name are replaced.

    Raises UserError: as of :func:`check_files`.
    """
    check_files(src)
    for pattern in SIDECARS:
        for path in src.glob(pattern):
            target = dst / path.name
            if path.is_file() and not (target.exists() and target.samefile(path)):
                with _opened(path) as source, target.open("wb") as copy:
                    shutil.copyfileobj(source, copy)


def _opened(path: Path) -> BinaryIO:
    """Open a file, following no link that came there since it was checked."""
    real = path.parent / path.readlink() if path.is_symlink() and _is_blob(path) else path
    try:
        return os.fdopen(os.open(real, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0)), "rb")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): put a file there, or remove it") from None
