"""Checks of a graph before a runtime loads it. No onnx here, for a board.

A graph names its data files by relative paths, and a runtime opens whatever they name. It allocates what a tensor
claims to be, and runs loops as long as they like; a Scan alone ends with the sequence that it is given. The file is
read as protobuf wire format (https://protobuf.dev/programming-guides/encoding), descending only to where a tensor may
stand; the field numbers are those of onnx.proto. Weights inside the file are passed over, not read. To read a graph
of some hundred nodes takes as long as a tenth of a first token, so the cache keeps what was read, by the file's hash.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Set
from dataclasses import dataclass, field
from functools import cache
from math import prod
from pathlib import Path

import msgspec

from export.bundle.manifest import BundleError, inside, is_there
from saap.base.files import cache_place, sha256_file
from saap.base.store import Store

# Message: the fields that lead to what is checked, and what message each holds.
_PATHS = {
    "Model": {7: "Graph", 25: "Function"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Function": {7: "Node", 11: "Attribute"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "Entry"},
}
# Message: the fields that may come several times. Of another that does, protobuf takes the last.
_REPEATED = {
    "Model": {8, 14, 20, 25, 26},
    "Graph": {1, 5, 11, 12, 13, 14, 15, 16},
    "Function": {4, 5, 6, 7, 9, 11, 12, 14},
    "Node": {1, 2, 5, 9, 10},
    "Attribute": {7, 8, 9, 10, 11, 15, 23},
    "SparseTensor": {3},
    "Tensor": {1, 4, 5, 6, 7, 10, 11, 13, 16},
    "Entry": set[int](),
}
_KEY, _VALUE = 1, 2  # of an Entry
_DIMENSIONS, _KIND, _DOMAIN = 1, 4, 7  # of a Tensor, of a Node
_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5  # wire types
_DOMAINS = {"", "ai.onnx", "ai.onnx.ml", "com.microsoft"}  # what ONNX Runtime brings itself
_WRITTEN = (
    "Add And BitShift BitwiseAnd BitwiseXor Cast Concat DequantizeLinear Div Exp Expand Gather GatherElements Gelu "
    "GreaterOrEqual Less MatMul Max Min Mod Mul Pad Pow Range ReduceMean ReduceSum Reshape Scan Shape Sigmoid "
    "SimplifiedLayerNormalization Slice Softmax Softplus Split Sqrt Squeeze Sub Tanh Transpose Unsqueeze Where"
)
STANDARD = frozenset(_WRITTEN.split())  # operators that saap writes
MICROSOFT = "com.microsoft:"
ALL = STANDARD | {  # portable graphs are of standard ones alone
    MICROSOFT + name
    for name in (
        "FastGelu", "FusedMatMul", "GatherBlockQuantized", "GroupQueryAttention", "LinearAttention", "MatMulNBits",
        "SkipSimplifiedLayerNormalization",
    )
}  # fmt: skip
MOST_NODES = 200_000
MOST_DIMENSIONS = 64
DEEPEST = 8  # graphs within graphs
STORE = Store("graphs", 1 << 18)  # some 100 bytes each


def check_graph(graph: str | Path, allowed: Set[str] | None = ALL, sha256: str | None = None) -> list[Path]:
    """Check an ONNX file before a session is opened, and list its data files in order of appearance.

    Args:
        allowed: operators, as of :class:`Contents`; None: all that ONNX Runtime brings, and functions and graphs in
            attributes, as other exporters write them.
        sha256: of the file, where it is known.

    Raises:
        BundleError: not an ONNX file, a data file that is missing or outside the graph's folder, functions, branches or
            loops, other operators than allowed, or tensors that claim to be larger than the files.
    """
    path = Path(graph)
    if not path.is_file():
        raise BundleError(f"{path} is missing: export the bundle again")
    contents = read_contents(path) if sha256 is None else _kept_contents(path, sha256)
    files: list[Path] = []
    for location in contents.locations:
        file = inside(path.parent, location)
        if file is None:
            raise BundleError(f"{path} wants its weights in {location!r}, outside the bundle's folder: do not use it")
        if not is_there(file):
            raise BundleError(f"{path} wants its weights in {location!r}, which is missing: export the bundle again")
        files.append(file)
    strange = sorted(
        name for name in contents.operators
        if (name not in allowed if allowed is not None else name.rpartition(":")[0] not in _DOMAINS)
    )  # fmt: skip
    most = 8 * (path.stat().st_size + sum(file.stat().st_size for file in files))  # elements of a bit
    known = all(name.rpartition(":")[0] in _DOMAINS for name in contents.operators)
    writer = "saap" if allowed is not None else "ONNX Runtime"
    foreign = " (`saap bench --foreign-graph` runs it within limits)" if allowed is not None and known else ""
    for problem, there in (
        (f"more than {MOST_NODES} nodes", contents.nodes > MOST_NODES),
        (
            f"functions, branches or loops (If, Loop), which no decoder needs{foreign}",
            contents.nested and allowed is not None,
        ),
        (
            f"the operator {min(strange, default='')!r}, which {writer} does not have{foreign}",
            bool(strange),
        ),
        ("a tensor of more elements than its files have bits", contents.largest > most),
    ):
        if there:
            raise BundleError(f"{path} holds {problem}: do not use it")
    return files


@dataclass
class Contents:
    """Contents of a graph, as far as they are limited.

    Attributes:
        locations: what tensors call their data files, each once, in order of appearance.
        operators: of its nodes, ``domain:name``, without the domain where it is the standard one.
        nested: whether there are functions, or graphs in attributes of another node than Scan.
        largest: elements of the largest tensor.
    """

    locations: dict[str, None] = field(default_factory=dict)
    operators: set[str] = field(default_factory=set)
    nodes: int = 0
    nested: bool = False
    largest: int = 0


def read_contents(graph: Path) -> Contents:
    """Read what is limited in an ONNX file.

    Raises:
        BundleError: not an ONNX file.
    """
    contents = Contents()
    try:
        with graph.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _Reader(data, contents).read("Model", 0, len(data))
    except (IndexError, ValueError):  # of an empty file, too
        raise BundleError(f"{graph} is not an ONNX file: export the bundle again") from None
    return contents


def _kept_contents(graph: Path, sha256: str) -> Contents:
    """Read a file of this hash, or what an earlier process read of it."""
    entry = cache_place() / STORE.name / f"{sha256}-{_version()}"
    contents = STORE.read(entry, lambda content: msgspec.json.decode(content, type=Contents))
    if contents is None:
        contents = read_contents(graph)
        STORE.write(entry, lambda path: path.write_bytes(msgspec.json.encode(contents)))
    return contents


@cache
def _version() -> str:
    """Tell this reader from others, which may see less in a file."""
    return sha256_file(Path(__file__))[:16]


@dataclass(frozen=True)
class _Reader:
    """Notes in ``contents`` what the messages of a file hold."""

    data: mmap.mmap
    contents: Contents

    def read(self, message: str, start: int, end: int, depth: int = 0, scans: bool = False) -> None:
        """Read a message and those below it; ``scans``: it is an attribute of a Scan."""
        if depth > DEEPEST:
            raise ValueError("graphs within graphs within graphs")
        data, contents, leads = self.data, self.contents, _PATHS[message]
        dimensions = []
        fields = list(_fields(data, start, end))
        once = [number for number, *_ in fields if number not in _REPEATED[message]]
        if len(set(once)) < len(once):
            raise ValueError("a field that stands twice")
        if message == "Node":
            named = {n: data[c:d].decode()[:80] for n, w, c, d in fields if n in (_KIND, _DOMAIN) and w == _LENGTH}
            domain, name = named.get(_DOMAIN, ""), named.get(_KIND, "")
            scans = name == "Scan" and not domain
            contents.operators.add(f"{domain}:{name}" if domain else name)
        for number, wire, a, b in fields:
            if message == "Tensor" and number == _DIMENSIONS:
                dimensions += [_varint(data, a)[0]] if wire == _VARINT else _packed(data, a, b)
            elif wire != _LENGTH:
                continue
            elif kind := leads.get(number):
                contents.nodes += kind == "Node"
                contents.nested |= kind == "Function" or (message == "Attribute" and kind == "Graph" and not scans)
                if kind == "Entry":
                    parts = {n: data[c:d] for n, w, c, d in _fields(data, a, b) if w == _LENGTH}
                    if len(parts) != 2:
                        raise ValueError("an entry of another form")
                    if parts.get(_KEY) == b"location":
                        contents.locations[parts.get(_VALUE, b"").decode()] = None
                else:
                    self.read(kind, a, b, depth + (kind == "Graph"), scans and message == "Node")
        if len(dimensions) > MOST_DIMENSIONS:
            raise ValueError("a tensor of too many dimensions")
        contents.largest = max(contents.largest, prod(max(size, 1) for size in dimensions))  # a loop may run over none


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """(field number, wire type, first byte, end) of the fields of a message."""
    position = start
    while position < end:
        tag, first = _varint(data, position)
        wire = tag & 7
        if wire == _LENGTH:
            length, first = _varint(data, first)
            position = first + length
        elif wire == _VARINT:
            _, position = _varint(data, first)
        elif wire in (_EIGHT_BYTES, _FOUR_BYTES):
            position = first + (8 if wire == _EIGHT_BYTES else 4)
        else:
            raise ValueError("no such wire type")
        yield tag >> 3, wire, first, position
    if position != end:
        raise ValueError("a field ends beyond its message")


def _packed(data: mmap.mmap, position: int, end: int) -> list[int]:
    values = []
    while position < end:
        value, position = _varint(data, position)
        values.append(value)
    return values


def _varint(data: mmap.mmap, position: int) -> tuple[int, int]:
    value = data[position]
    if value < 128:  # nearly all
        return value, position + 1
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
