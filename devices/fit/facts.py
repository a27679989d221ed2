"""What the question whether a bundle fits is about: numbers of the bundle, and what is known of the device."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """Numbers of a bundle, bytes; as ``bundle.json`` names them.

    Attributes:
        widest_ffn: channels of the widest feed-forward block.
        file_bytes: of the weights file.
        attention: (query heads, KV heads) of the layers that have any.
    """

    target: str  # cpu | cuda | portable
    bits: int
    block: int
    accuracy_level: int
    weight_bytes_per_token: int
    kv_bytes_per_token: int
    kv_dtype: str
    context_length: int
    hidden: int
    head_dim: int
    widest_ffn: int
    file_bytes: int
    onnxruntime_min: str
    attention: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Device:
    """What is known of a device; None is unknown.

    Attributes:
        isa, lacks: features it has and those it has not; one in neither is unknown.
        memory_bytes: what a process may take.
        bandwidth: bytes per second that are read at most.
        cuda: the GPU's architecture, ``none`` where there is no GPU for CUDA.
        onnxruntime: the version that is installed, or that installs with the system's Python.
    """

    name: str
    architecture: str | None
    isa: frozenset[str]
    lacks: frozenset[str]
    memory_bytes: int
    memory_source: str
    bandwidth: float | None = None
    bandwidth_source: str = "unknown"
    last_level_cache: int | None = None
    cuda: str | None = None
    onnxruntime: str | None = None
    onnxruntime_source: str = "unknown"


@dataclass(frozen=True)
class Finding:
    """What stands against a bundle, or what would help, and the command that does it."""

    what: str
    command: str | None = None


@dataclass(frozen=True)
class Memory:
    """Bytes that must stay resident at a context."""

    runtime: int
    weights: int
    cache: int
    work: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.runtime + self.weights + self.cache + self.work
