"""Sizes of a measured model, and how they are told for an ONNX decoder graph that is no bundle of ours.

They are read from the graph alone; external weights stay closed.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from export.bundle.graph_facts import CacheInput, Tensor, read_graph
from export.bundle.manifest import Spelling
from saap.base.caches import GROWING, Sliding

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
    sliding: Sliding = GROWING  # of the cache
    spelling: Spelling | None = None  # in how many tokens it says a text


SIZES = ("parameters", "model_bytes", "weight_bytes_per_token", "kv_bytes_per_token", "bits")


@dataclass(frozen=True)
class PeerFacts:
    """What a worker knows of the model that it ran; ``model`` is None where a manifest has its sizes."""

    versions: dict[str, str] = field(default_factory=dict)
    model: ModelFacts | None = None


def graph_facts(graph: Path, head_size: int | None = None) -> ModelFacts:
    """What the graph of an ONNX file says.

    Args:
        head_size: of the cache, for a graph whose inputs leave it open.
    """
    try:
        facts = read_graph(graph)
    except ImportError:
        return ModelFacts(unknown=dict.fromkeys(SIZES, "counting the graph needs the onnx package"))
    tensors = list(facts.tensors.values())
    read = [tensor for tensor in tensors if not {_kind(node.kind) for node, _ in tensor.readers} <= _LOOKED_UP]
    shares: Counter[int] = Counter()
    for tensor in read:
        if len(tensor.shape) > 1:
            shares[_matrix_bits(tensor)] += tensor.bytes
    files = {path for tensor in tensors if tensor.place and (path := graph.parent / tensor.place[0]).is_file()}
    kv = _kv_bytes(facts.cache, head_size)
    unknown = {"parameters": "packed weights are not unpacked to count them"}
    if kv is None:
        unknown["kv_bytes_per_token"] = "the graph's cache has no fixed sizes"
    if not shares:
        unknown["bits"] = "the graph has no matrices"
    return ModelFacts(
        model_bytes=graph.stat().st_size + sum(path.stat().st_size for path in files),
        weight_bytes_per_token=sum(tensor.bytes for tensor in read),
        kv_bytes_per_token=kv,
        bits=shares.most_common(1)[0][0] if shares else None,
        unknown=unknown,
    )


def _matrix_bits(tensor: Tensor) -> int:
    """Bits of a weight: those that MatMulNBits unpacks, else those of an element."""
    packed = [node for node, position in tensor.readers if _kind(node.kind) == "MatMulNBits" and position == 1]
    return packed[0].attributes.get("bits", 4) if packed else tensor.bits


def _kv_bytes(cache: list[CacheInput], head_size: int | None) -> int | None:
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
