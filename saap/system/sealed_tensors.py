"""Write safetensors files; those of a cache or a state hold the sha256 of their own content in the header."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file

SEAL = "sha256"


def data_hash(tensors: Mapping[str, torch.Tensor]) -> str:
    """Hash named tensors: names, types, sizes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path, about: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors.

    ``about``: for the header; ``format`` is pt where it is not given, as transformers wants it.
    """
    try:
        save_file({name: t.contiguous() for name, t in tensors.items()}, path, metadata=dict(about or {"format": "pt"}))
    except SafetensorError as error:  # how the library reports a full disk
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code), str(path)) from None


def save_sealed(tensors: Mapping[str, torch.Tensor], path: Path, about: Mapping[str, str] | None = None) -> None:
    """Write tensors and their metadata, beside ``path``, and rename."""
    about, partial = dict(about or {}), path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        save_tensors(tensors, partial, {**about, SEAL: _seal(tensors, about)})
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_sealed(content: bytes) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read the tensors of a file's content, and its metadata.

    Raises ValueError: damaged, or not written by ``save_sealed``.
    """
    try:
        tensors = load(content)
        about = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    except (SafetensorError, KeyError) as error:
        raise ValueError(str(error)) from None
    if about.pop(SEAL, None) != _seal(tensors, about):
        raise ValueError("not the content that was written")
    return tensors, about


def read_sealed(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Do the same with a file whose tensors are mapped: a page of it takes memory once it is looked at.

    Raises ValueError: as :func:`load_sealed`.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about, tensors = dict(file.metadata() or {}), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(str(error)) from None
    if about.pop(SEAL, None) != _seal(tensors, about):
        raise ValueError("not the content that was written")
    return tensors, about


def _seal(tensors: Mapping[str, torch.Tensor], about: Mapping[str, str]) -> str:
    return hashlib.sha256(f"{json.dumps(about, sort_keys=True)} {data_hash(tensors)}".encode()).hexdigest()
