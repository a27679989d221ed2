"""A model's weight files: read tensor by tensor, written as tensors come, counted and hashed."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from saap.base.errors import UserError
from saap.base.hashing import known_sha256
from saap.base.writing import read_object
from saap.models.architectures import (
    FAMILIES,
    Architecture,
    UnknownFamilyError,
    architecture_of,
    layer_count,
    shape_of,
)
from saap.models.directory import INDEX, SINGLE, weight_files
from saap.models.integrity import check_directory
from saap.system.sealed_tensors import save_tensors

SHARD_BYTES = 1 << 30
STRANGE = 3  # modules that are named
MOST_TENSORS = 100_000  # of a file: four hundred layers of a mixture of fifty experts
PIECE = 1 << 26  # numbers that are looked at together
ALLOWED_TYPES = dict.fromkeys(  # as safetensors names them, by the last part of a tensor's name
    ("weight", "bias", "scales", "A_log", "dt_bias", "layer_scalar"), ("F32", "F16", "BF16", "F64")
) | dict.fromkeys(("qweight", "zero_points"), ("U8",))
LAYER = re.compile(r".*?\blayers\.\d+(?=\.)")
NOT_NEEDED = re.compile(r"rotary_emb\.inv_freq$|^lm_head\.weight$")  # that checkpoints hold and models make themselves


def tensor_reader(directory: str | Path) -> tuple[list[str], Callable[[str], torch.Tensor]]:
    """Return the names of a checkpoint's tensors and a function that reads one, memory-mapped.

    Raises UserError: no safetensors there, or files that are not what was written.
    """
    check_directory(directory)
    row = architecture_of(config := read_object(Path(directory) / "config.json", "get or make it again"))
    where = {name.replace(*row.stored_as): (file, name) for name, file in stored_tensors(directory).items()}
    _check_names(Path(directory), row, layer_count(config), sorted(where))
    finite = set[str]()

    def read(name: str) -> torch.Tensor:
        if name not in where:
            raise UserError(f"{directory} has no tensor {name}, which its config.json asks for: get or make it again")
        file, stored = where[name]
        with opened(file) as handle:
            tensor: torch.Tensor = handle.get_tensor(stored)
        if name not in finite:
            check_finite(directory, name, tensor)
            finite.add(name)
        return tensor

    return sorted(where), read


def stored_tensors(directory: str | Path) -> dict[str, Path]:
    """Return the file of each tensor of a checkpoint, by its name there.

    Raises UserError: no safetensors there, an index that names other files, or weights of another type than floats.
    """
    files = weight_files(directory)
    if not files:
        raise UserError(f"{directory} holds no *.safetensors; saap reads no pickled weights: convert the model first")
    places: dict[str, Path] = {}
    for file in files:
        with opened(file) as handle:
            if len(names := handle.keys()) > MOST_TENSORS:
                raise UserError(f"{file} has {len(names)} tensors, {MOST_TENSORS} are allowed: get it again")
            for name in names:
                _check_type(file, name, handle.get_slice(name).get_dtype())
                places[name] = file
    return places


def _check_type(file: Path, name: str, dtype: str) -> None:
    """Refuse weights that are integers, or floats of 8 bits without their scales; buffers may be of any type."""
    if (allowed := ALLOWED_TYPES.get(name.rpartition(".")[2])) and dtype not in allowed:
        raise UserError(
            f"{file} has {name} of type {dtype}: must be {' or '.join(allowed)}; get the model again as floats"
        )


def read_tensors(directory: str | Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a checkpoint, memory-mapped, by their names there. Raises UserError: as above."""
    tensors: dict[str, torch.Tensor] = {}
    for file in dict.fromkeys(stored_tensors(directory).values()):
        with opened(file) as handle:
            tensors |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    return tensors


def check_family(directory: str | Path) -> None:
    """Refuse a family that is not in the table, by the modules of its layers that the nearest one does not have.

    Raises UnknownFamilyError.
    """
    try:
        architecture_of(read_object(Path(directory) / "config.json", "get or make it again"))
    except UnknownFamilyError as error:
        if not error.nearest:
            raise
        known, there = FAMILIES[error.nearest].modules, dict[str, None]()
        for file in weight_files(directory):
            with opened(file) as handle:
                places = [name[len(layer[0]) + 1 :] for name in handle.keys() if (layer := LAYER.match(name))]  # noqa: SIM118
            there |= dict.fromkeys(re.sub(r"\.\d+\.", ".N.", name.removesuffix(".weight")) for name in places)
        strange = [name for name in there if name not in known and name.rpartition(".")[0] not in known]
        examples = ", ".join(strange[:STRANGE]) + (" and others" if len(strange) > STRANGE else "")
        raise UnknownFamilyError(error.name, strange=f", which has no {examples}" if strange else "") from None


def _check_names(directory: Path, row: Architecture, layers: int, names: list[str]) -> None:
    """Refuse a tensor that the model of ``config.json`` has no place for."""
    outside = (row.per_layer.matrix, row.per_layer.norm) if row.per_layer else ()
    roots = (*row.tables, row.final_norm, *outside, *(f"{row.layers}.{n}" for n in range(layers)))
    for name in names:
        root = name if (layer := LAYER.match(name)) is None else layer[0]
        if not NOT_NEEDED.search(name) and not any(root == known or root.startswith(f"{known}.") for known in roots):
            raise UserError(f"{directory} has a tensor {name}, which its config.json has no place for: get it again")


def check_sizes(directory: str | Path) -> None:
    """Hold the sizes of ``config.json`` against the headers of the weight files, before anything is made by them.

    Raises UserError: a matrix is not there, or of another shape.
    """
    config = read_object(Path(directory) / "config.json", "get or make it again")
    row, shape = architecture_of(config), shape_of(config)
    expected = {f"{row.embedding}.weight": [shape.vocab, shape.hidden]}
    for index, sizes in enumerate(shape.layers):
        for kind in sizes.blocks:
            name = f"{row.layers}.{index}.{row.writing(kind)}.weight"
            expected[name] = [shape.hidden, shape.inner_width(kind, sizes)]
    shapes = dict[str, list[int]]()
    for file in weight_files(directory):
        with opened(file) as handle:
            names = expected.keys() & set(handle.keys())
            shapes |= {name: handle.get_slice(name).get_shape() for name in names}
    for name, sides in expected.items():
        if (there := shapes.get(name)) != sides:
            has = f"a {name} of {' x '.join(map(str, there))}" if there else f"no tensor {name}"
            size = " x ".join(map(str, sides))
            raise UserError(f"{directory} has {has}, and its config.json makes it {size}: get or make it again")


def check_finite(directory: str | Path, name: str, tensor: torch.Tensor) -> None:
    """Refuse a tensor with a number that is NaN or infinite: what is computed with it would be so, too."""
    pieces = tensor.flatten().split(PIECE) if tensor.is_floating_point() else ()  # a table may be of gigabytes
    if not all(bool(torch.isfinite(piece).all()) for piece in pieces):
        raise UserError(f"{directory} has NaN or infinite numbers in {name}: get or make the model again")


@contextmanager
def opened(file: Path) -> Iterator[safe_open]:
    """Open a safetensors file to read from."""
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except (SafetensorError, OSError, MemoryError) as error:
        raise UserError(f"{file} is damaged ({error}): get or make it again") from None


def write_shards(directory: Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write ``model.safetensors``; or files of about 1 GiB and their index, as transformers has them.

    ``tensors``: (name, tensor) in the order of the files.
    """
    parts: list[Path] = []
    places: dict[str, int] = {}
    pending: dict[str, torch.Tensor] = {}
    pending_bytes = total = 0

    def flush() -> None:
        nonlocal pending_bytes
        part = directory / f"part-{len(parts)}.safetensors"
        save_tensors(pending, part)
        places.update(dict.fromkeys(pending, len(parts)))
        parts.append(part)
        pending.clear()
        pending_bytes = 0

    for name, tensor in tensors:
        if pending and pending_bytes + tensor.nbytes > SHARD_BYTES:
            flush()
        pending[name] = tensor.contiguous()
        pending_bytes += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(parts) == 1:
        parts[0].rename(directory / SINGLE)
        return
    names = [f"model-{number:05}-of-{len(parts):05}.safetensors" for number in range(1, len(parts) + 1)]
    for part, name in zip(parts, names, strict=True):
        part.rename(directory / name)
    index = {"metadata": {"total_size": total}, "weight_map": {name: names[i] for name, i in sorted(places.items())}}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


class TensorFolder(MutableMapping[str, torch.Tensor]):
    """A mapping whose tensors lie in a folder, a file each; what is read is a tensor of its own.

    Args:
        folder: exists, and is removed by who made it.
        dtype: in which tensors are kept; None is as they come.
    """

    def __init__(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        self._folder, self._dtype = folder, dtype
        self._files: dict[str, Path] = {}

    def __setitem__(self, name: str, tensor: torch.Tensor) -> None:
        file = self._files.setdefault(name, self._folder / f"{len(self._files)}.safetensors")
        save_tensors({"tensor": tensor.to(self._dtype or tensor.dtype)}, file)

    def __getitem__(self, name: str) -> torch.Tensor:
        with safe_open(self._files[name], framework="pt") as handle:
            tensor: torch.Tensor = handle.get_tensor("tensor")
        return tensor

    def __delitem__(self, name: str) -> None:
        self._files.pop(name).unlink()

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def weights_hash(directory: str | Path) -> str:
    """Hash a model's config and weight files, for a lineage's base. A file is read once per process."""
    files = [Path(directory) / "config.json", *weight_files(directory)]
    digest = hashlib.sha256()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for file, sha256 in zip(files, pool.map(known_sha256, files), strict=True):
            digest.update(f"{file.name} {sha256}\n".encode())
    return digest.hexdigest()


def weights_bytes(directory: str | Path) -> int:
    return sum(file.stat().st_size for file in weight_files(directory))


def weights_dtype(directory: str | Path) -> torch.dtype:
    """Return the type of a model's widest tensor, which is that of its matrices."""
    names, read = tensor_reader(directory)
    return max(map(read, names), key=lambda tensor: tensor.numel()).dtype
