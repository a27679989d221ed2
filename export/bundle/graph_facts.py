"""What an ONNX decoder graph is made of, read without its weights: nodes, tensors, precision of the matrices."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from export.bundle.manifest import BundleError
from saap.base.errors import first_line

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto

_LAYER = re.compile(r"(?:^|[./])layers\.(\d+)[./]")
_MATRIX = ("MatMul", "FusedMatMul", "Gemm", "MatMulNBits", "DequantizeLinear", "Transpose")
_INTEGERS = {"MatMulNBits": 1, "DequantizeLinear": 0}  # the input that is the matrix
_EMPTY_DOMAIN = "ai.onnx"
_BITS = {"int4": 4, "uint4": 4, "float4e2m1": 4, "int2": 2, "uint2": 2, "bfloat16": 16}  # of types that numpy has not


@dataclass(frozen=True)
class Node:
    """One node: ``kind`` is its operator, with the domain where that is not ONNX's own."""

    kind: str
    name: str
    inputs: tuple[str, ...]
    attributes: dict[str, int]


@dataclass
class Tensor:
    """An initialiser: where it is stored, and what it is for."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bits: int  # of one element
    bytes: int
    place: tuple[str, int] | None  # where the bytes are, equal for tensors that share them; None inside the graph
    layer: int | None = None  # decoder layer; None for embedding, head, tables and constants
    parameters: int = 0  # numbers of the model that it holds; 0 for scales, zero points, tables and constants
    readers: list[tuple[Node, int]] = field(default_factory=list)  # node and position among its inputs


@dataclass(frozen=True)
class CacheInput:
    """A ``past_key_values`` input [batch, heads, past, size]; 0 is a dimension that the graph leaves open."""

    bits: int
    heads: int
    size: int


@dataclass(frozen=True)
class Quantised:
    """Integer matrices that are alike; ``block`` is the group size."""

    node: str
    bits: int
    block: int
    accuracy_level: int | None
    count: int
    bytes: int


@dataclass(frozen=True)
class Stored:
    """Tensors of one type."""

    count: int
    bytes: int


@dataclass(frozen=True)
class GraphFacts:
    """A graph without its weights."""

    nodes: list[Node]
    tensors: dict[str, Tensor]
    cache: list[CacheInput]
    opsets: dict[str, int]
    ir_version: int
    producer: str

    def quantised(self) -> list[Quantised]:
        """The integer matrices by node, bits, group size and accuracy level, the most bytes first."""
        found: dict[tuple[str, int, int, int | None], list[int]] = defaultdict(list)
        for node in self.nodes:
            position = _INTEGERS.get(node.kind.split(":")[-1])
            if position is None or node.inputs[position] not in self.tensors:
                continue
            parts = [self.tensors[name] for name in node.inputs[position:] if name in self.tensors]
            matrix, level = parts[0], node.attributes.get("accuracy_level")
            bits = node.attributes.get("bits", 4 if "4" in matrix.dtype else 8)
            size = sum(part.bytes for part in parts[:3])
            found[node.kind, bits, node.attributes.get("block_size", 0), level].append(size)
        alike = [Quantised(*key, count=len(sizes), bytes=sum(sizes)) for key, sizes in found.items()]
        return sorted(alike, key=lambda each: -each.bytes)

    def by_dtype(self) -> dict[str, Stored]:
        """Stored tensors by type, the most bytes first; bytes that two of them share count once."""
        counts: Counter[str] = Counter()
        sizes: Counter[str] = Counter()
        seen = set()
        for tensor in self.tensors.values():
            counts[tensor.dtype] += 1
            if tensor.place is None or tensor.place not in seen:
                sizes[tensor.dtype] += tensor.bytes
            seen.add(tensor.place)
        return {name: Stored(counts[name], size) for name, size in sizes.most_common()}

    def head_bytes(self) -> int | None:
        """Bytes of the matrix behind the layers; None where no matrix outside the layers is found."""
        sizes = {
            tensor.name: tensor.bytes
            for tensor in self.tensors.values()
            if tensor.layer is None
            and len(tensor.shape) > 1
            and any(node.kind.split(":")[-1] in _MATRIX for node, _ in tensor.readers)
        }
        # Scales and zero points may be flat: they belong to the nodes that read the matrix.
        for name in list(sizes):
            for node, _ in self.tensors[name].readers:
                if node.kind.split(":")[-1] in ("MatMulNBits", "DequantizeLinear"):
                    sizes |= {part: self.tensors[part].bytes for part in node.inputs if part in self.tensors}
        return sum(sizes.values()) or None


def read_graph(path: Path) -> GraphFacts:
    """Read an ONNX file, its weights left where they are.

    Raises BundleError: damaged.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return _facts_of(onnx.load(path, load_external_data=False))
    except (DecodeError, LookupError, ValueError) as error:
        raise BundleError(f"{path} is damaged ({first_line(error)}): export the bundle again") from None


def _facts_of(model: ModelProto) -> GraphFacts:
    nodes = [_node(node) for node in model.graph.node]
    tensors = {tensor.name: _tensor(tensor) for tensor in model.graph.initializer}
    for node in nodes:
        for position, name in enumerate(node.inputs):
            if name in tensors:
                tensors[name].readers.append((node, position))
    for tensor in tensors.values():
        tensor.layer = _layer_of(tensor)
        tensor.parameters = _parameters_of(tensor)
    opsets = {o.domain or _EMPTY_DOMAIN: o.version for o in model.opset_import}
    cache = [_cache(value) for value in model.graph.input if value.name.startswith("past_key_values.")]
    return GraphFacts(nodes, tensors, cache, opsets, model.ir_version, model.producer_name)


def _node(node: NodeProto) -> Node:
    integers = {a.name: int(a.i) for a in node.attribute if a.type == a.INT}
    kind = node.op_type if node.domain in ("", _EMPTY_DOMAIN) else f"{node.domain}:{node.op_type}"
    if len(node.input) <= _INTEGERS.get(node.op_type, -1):
        raise ValueError(f"{node.op_type} {node.name[:40]!r} has no matrix among its {len(node.input)} inputs")
    return Node(kind, node.name, tuple(node.input), integers)


def _tensor(tensor: TensorProto) -> Tensor:
    dtype, bits = _kind(tensor.data_type)
    shape = tuple(tensor.dims)
    entries = {e.key: e.value for e in tensor.external_data}
    place = (entries["location"], int(entries.get("offset", 0))) if "location" in entries else None
    return Tensor(tensor.name, dtype, shape, bits, (prod(shape) * bits + 7) // 8, place)


def _cache(value: ValueInfoProto) -> CacheInput:
    kind = value.type.tensor_type
    heads, size = (kind.shape.dim[i].dim_value for i in (1, 3))
    return CacheInput(_kind(kind.elem_type)[1], heads, size)


def _kind(data_type: int) -> tuple[str, int]:
    """Name of a type, and bits of one element."""
    import onnx

    name = onnx.TensorProto.DataType.Name(data_type).lower()
    return name, _BITS.get(name) or 8 * int(onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize)


def _layer_of(tensor: Tensor) -> int | None:
    """By its own name, else by the name of the one layer whose nodes read it."""
    if match := _LAYER.search(tensor.name):
        return int(match[1])
    layers = {match[1] if (match := _LAYER.search(node.name)) else None for node, _ in tensor.readers}
    only = layers.pop() if len(layers) == 1 else None
    # Shapes, axes and scalars are no weights, although a layer's nodes read them.
    return int(only) if only is not None and tensor.dtype not in ("int64", "int32", "bool") and tensor.shape else None


def _parameters_of(tensor: Tensor) -> int:
    if not tensor.readers or tensor.layer is None:
        return 0
    node, position = tensor.readers[0]
    kind = node.kind.split(":")[-1]
    if kind == "MatMulNBits" and position in (1, 2, 3):
        return node.attributes["K"] * node.attributes["N"] if position == 1 else 0
    if kind == "DequantizeLinear" and position in (1, 2):
        return 0
    return prod(tensor.shape)
