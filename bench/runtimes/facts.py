"""Sizes of a measured model, and how they are told for an ONNX decoder graph that is no bundle of ours.

They are read from the graph alone; external weights stay closed.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from export.bundle.graph_facts import CacheInput, Tensor, read_graph

# A table that only these read gives up a few rows per token.
_LOOKED_UP = {"Gather", "GatherBlockQuantized", "GroupQueryAttention", "RotaryEmbedding"}


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
        facts = read_graph(graph)
    except ImportError:
        return {**nothing, "unknown": dict.fromkeys(nothing, "counting the graph needs the onnx package")}
    read = [
        tensor
        for tensor in facts.tensors.values()
        if not {_kind(node.kind) for node, _ in tensor.readers} <= _LOOKED_UP
    ]
    shares: Counter[int] = Counter()
    for tensor in read:
        if len(tensor.shape) > 1:
            shares[_matrix_bits(tensor)] += tensor.bytes
    files = {
        path for tensor in facts.tensors.values() if tensor.place and (path := graph.parent / tensor.place[0]).is_file()
    }
    kv = _kv_bytes(facts.cache, head_size)
    return {
        "parameters": None,
        "model_bytes": graph.stat().st_size + sum(path.stat().st_size for path in files),
        "weight_bytes_per_token": sum(tensor.bytes for tensor in read),
        "kv_bytes_per_token": kv,
        "bits": shares.most_common(1)[0][0] if shares else None,
        "unknown": {
            "parameters": "packed weights are not unpacked to count them",
            **({} if kv is not None else {"kv_bytes_per_token": "the graph's cache has no fixed sizes"}),
            **({} if shares else {"bits": "the graph has no matrices"}),
        },
    }


def _matrix_bits(tensor: Tensor) -> int:
    """Bits of a weight: those that MatMulNBits unpacks, else those of an element."""
    packed = [node for node, position in tensor.readers if _kind(node.kind) == "MatMulNBits" and position == 1]
    return packed[0].attributes.get("bits", 4) if packed else tensor.bits


def _kv_bytes(cache: list[CacheInput], head_size: int | None) -> int | None:
    """Bytes that a token adds to the whole cache."""
    total = 0
    for each in cache:
        size = each.size or head_size
        if not each.heads or not size:
            return None
        total += each.heads * size * each.bits // 8
    return total


def _kind(kind: str) -> str:
    """An operator without its domain."""
    return kind.rpartition(":")[2]
