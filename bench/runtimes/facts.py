"""Sizes of a measured model, and how they are told for an ONNX decoder graph that is no bundle of ours.

They are read from the graph alone; external weights stay closed.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

# A table that only these read gives up a few rows per token.
_LOOKED_UP = {"Gather", "GatherBlockQuantized", "GroupQueryAttention", "RotaryEmbedding"}
_HALF_BYTES = {"UINT4": 0.5, "INT4": 0.5, "FLOAT4E2M1": 0.5, "UINT2": 0.25, "INT2": 0.25}
_BYTES = {
    "FLOAT": 4, "DOUBLE": 8, "FLOAT16": 2, "BFLOAT16": 2, "INT64": 8, "UINT64": 8, "INT32": 4, "UINT32": 4,
    "INT16": 2, "UINT16": 2, "INT8": 1, "UINT8": 1, "BOOL": 1, **_HALF_BYTES,
}  # fmt: skip


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of the measured model; None is unknown."""

    parameters: int | None = None
    model_bytes: int | None = None  # files on disk that hold weights and graph
    weight_bytes_per_token: int | None = None
    kv_bytes_per_token: int | None = None
    bits: int | None = None
    vocab_size: int | None = None
    unknown: dict[str, str] = field(default_factory=dict)


def graph_facts(graph: Path, head_size: int | None = None) -> dict[str, Any]:
    """The fields of ``ModelFacts``; what cannot be told is None, with its reason under
    ``unknown``.

    Args:
        graph: the ONNX file.
        head_size: of the cache, for a graph whose inputs leave it open.
    """
    nothing = dict.fromkeys(("parameters", "model_bytes", "weight_bytes_per_token", "kv_bytes_per_token", "bits"))
    try:
        import onnx
    except ImportError:
        return {**nothing, "unknown": dict.fromkeys(nothing, "counting the graph needs the onnx package")}
    model = onnx.load(graph, load_external_data=False).graph
    sizes = {tensor.name: _bytes(onnx, tensor.data_type, tensor.dims) for tensor in model.initializer}
    readers: dict[str, set[str]] = {name: set() for name in sizes}
    bits_of: dict[str, int] = {}
    for node in model.node:
        for name in node.input:
            if name in readers:
                readers[name].add(node.op_type)
        if node.op_type == "MatMulNBits":
            bits_of[node.input[1]] = next((a.i for a in node.attribute if a.name == "bits"), 4)
    read = sum(size for name, size in sizes.items() if readers[name] and not readers[name] <= _LOOKED_UP)
    shares: Counter[int] = Counter()
    for tensor in model.initializer:
        if len(tensor.dims) > 1 and not readers[tensor.name] <= _LOOKED_UP:
            shares[bits_of.get(tensor.name, _bits(onnx, tensor.data_type))] += int(sizes[tensor.name])
    kv = _kv_bytes(onnx, model, head_size)
    return {
        "parameters": None,
        "model_bytes": graph.stat().st_size + sum(path.stat().st_size for path in _external(graph, model)),
        "weight_bytes_per_token": int(read),
        "kv_bytes_per_token": kv,
        "bits": shares.most_common(1)[0][0] if shares else None,
        "unknown": {
            "parameters": "packed weights are not unpacked to count them",
            **({} if kv is not None else {"kv_bytes_per_token": "the graph's cache has no fixed sizes"}),
            **({} if shares else {"bits": "the graph has no matrices"}),
        },
    }


def _external(graph: Path, model: Any) -> set[Path]:
    """Files beside the graph that hold its weights."""
    named = {e.value for tensor in model.initializer for e in tensor.external_data if e.key == "location"}
    return {path for name in named if (path := graph.parent / name).is_file()}


def _kv_bytes(onnx: Any, model: Any, head_size: int | None) -> int | None:
    """Bytes that a token adds to all ``past_key_values`` inputs [batch, heads, past, size]."""
    total = 0.0
    for value in model.input:
        if value.name.startswith("past_key_values."):
            kind = value.type.tensor_type
            heads, size = (kind.shape.dim[i].dim_value for i in (1, 3))
            if not heads or not (size or head_size):
                return None
            total += _bytes(onnx, kind.elem_type, (heads, size or head_size))
    return int(total)


def _bytes(onnx: Any, data_type: int, dims: Any) -> float:
    return float(prod(dims) * _BYTES.get(onnx.TensorProto.DataType.Name(data_type), 0))


def _bits(onnx: Any, data_type: int) -> int:
    return int(8 * _BYTES.get(onnx.TensorProto.DataType.Name(data_type), 0))
