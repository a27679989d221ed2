"""Finds the data files of an ONNX file and refuses those outside its folder. Standard library only, for a board.

A graph names its data files by relative paths, and a runtime opens whatever they name. The file is read as protobuf
wire format (https://protobuf.dev/programming-guides/encoding), descending only to where a tensor may stand; the field
numbers are those of onnx.proto. Weights inside the file are passed over, not read.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from export.bundle.manifest import BundleError, is_there

# Message: the fields that lead to tensors, and what message each holds.
_PATHS = {
    "Model": {7: "Graph", 25: "Function"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Function": {7: "Node", 11: "Attribute"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "Entry"},
}
_KEY, _VALUE = 1, 2  # of an Entry
_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5  # wire types


def check_external_data(graph: str | Path) -> list[Path]:
    """The data files of an ONNX file, each once, in order of appearance. Call it before you open a session.

    Raises:
        BundleError: not an ONNX file, or a data file that is missing or outside the graph's folder.
    """
    path = Path(graph)
    if not path.is_file():
        raise BundleError(f"{path} is missing: export the bundle again")
    files: list[Path] = []
    for location in external_locations(path):
        file = _inside(path, location)
        if not is_there(file):
            raise BundleError(f"{path} wants its weights in {location!r}, which is missing: export the bundle again")
        files.append(file)
    return files


def external_locations(graph: Path) -> list[str]:
    """What the graph's tensors call their data files, each once, in order of appearance."""
    if not graph.stat().st_size:
        raise BundleError(f"{graph} is not an ONNX file: export the bundle again")
    found: dict[str, None] = {}
    with graph.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            for start, end in _entries(data, "Model", 0, len(data)):
                parts = {number: data[a:b] for number, a, b in _fields(data, start, end)}
                if parts.get(_KEY) == b"location":
                    found[parts.get(_VALUE, b"").decode()] = None
        except (IndexError, ValueError):
            raise BundleError(f"{graph} is not an ONNX file: export the bundle again") from None
    return list(found)


def _inside(graph: Path, location: str) -> Path:
    folder = graph.parent.resolve()
    file = graph.parent / location
    strange = not location or "\\" in location or "\0" in location or PurePosixPath(location).is_absolute()
    if strange or folder not in file.resolve().parents:
        raise BundleError(f"{graph} wants its weights in {location!r}, outside the bundle's folder: do not use it")
    return file


def _entries(data: mmap.mmap, message: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Bounds of every key-value entry of external data below a message."""
    leads = _PATHS[message]
    for number, a, b in _fields(data, start, end):
        kind = leads.get(number)
        if kind == "Entry":
            yield a, b
        elif kind:
            yield from _entries(data, kind, a, b)


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(field number, first byte, end) of the fields of a message that have a length."""
    position = start
    while position < end:
        tag, position = _varint(data, position)
        wire = tag & 7
        if wire == _LENGTH:
            length, position = _varint(data, position)
            yield tag >> 3, position, position + length
            position += length
        elif wire == _VARINT:
            _, position = _varint(data, position)
        elif wire in (_EIGHT_BYTES, _FOUR_BYTES):
            position += 8 if wire == _EIGHT_BYTES else 4
        else:
            raise ValueError("no such wire type")
    if position != end:
        raise ValueError("a field ends beyond its message")


def _varint(data: mmap.mmap, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
