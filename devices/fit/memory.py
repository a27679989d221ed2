"""Memory of a bundle on a device, and how much of it there is.

What must stay resident while the model runs:

    runtime    Python, numpy and ONNX Runtime, and a session's own structures
    weights    ONNX Runtime's packed copies of the matrices; the file's pages may be dropped after packing
    cache      keys and values of every position
    work       activations of a piece of a prompt

The constants were measured on x86-64 with ONNX Runtime 1.32.0 and the session of export/engine/session.py
(docs/devices.md has the table): the sum is 1 to 5 % above what SmolLM2-135M takes, 1 % below to 2 % above for
Gemma 3 270M, up to 7 % above for random models with other shapes. On arm64 nobody has measured it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass

from saap.base.caches import GROWING, Sliding

# Resident beside weights, cache and activations: 60 to 63 MB, of which 30 are pages of libraries; on another machine
# these were 36.
RUNTIME_BYTES = 68_000_000
# What the allocator holds for a prompt over the activations that are needed at once: 1.6 to 1.9.
ALLOCATED_SHARE = 1.9
# Tokens of a prompt that are read at once (export/bundle/manifest.py).
PIECE = 256
# What the system keeps of RAM that it sees: 775 MiB on an Orin Nano with JetPack 6 and no desktop (its tegrastats), and
# no more than a quarter, since smaller boards run smaller systems. An assumption: --memory and this host know better.
SYSTEM_BYTES = 775 << 20
SYSTEM_SHARE = 0.25
# Of the capacity that a system sees where nobody has looked: the least share of six Jetsons (tegrastats).
VISIBLE_SHARE = 0.93


@dataclass(frozen=True)
class Model:
    """Numbers of a bundle, bytes; as ``bundle.json`` names them."""

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
    widest_ffn: int  # channels of the widest feed-forward block
    file_bytes: int  # of the weights file
    onnxruntime_min: str
    sliding: Sliding = GROWING  # of the cache
    attention: tuple[tuple[int, int], ...] = ()  # (query heads, KV heads) of the layers that have any


@dataclass(frozen=True)
class Device:
    """The known facts of a device; None is unknown.

    Attributes:
        isa, lacks: features it has and those it has not; one in neither is unknown.
    """

    name: str
    architecture: str | None
    isa: frozenset[str]
    lacks: frozenset[str]
    memory_bytes: int  # what a process may take
    memory_source: str
    bandwidth: float | None = None  # bytes per second that are read at most
    bandwidth_source: str = "unknown"
    sustained: float | None = None  # bytes per second that others measured over a longer time
    sustained_source: str = "unknown"
    last_level_cache: int | None = None
    big_cores: int | None = None  # of a CPU with several kinds of cores
    cuda: str | None = None  # the GPU's architecture, ``none`` where there is no GPU for CUDA
    onnxruntime: str | None = None  # the version that is installed, or that installs with the system's Python
    onnxruntime_source: str = "unknown"

    @property
    def dotprod(self) -> bool | None:
        """Whether the CPU multiplies int8 in hardware; every x86-64 is taken to, None is unknown."""
        return True if self.architecture == "x86_64" else self.has("dotprod")

    def has(self, feature: str) -> bool | None:
        return True if feature in self.isa else False if feature in self.lacks else None


@dataclass(frozen=True)
class Memory:
    """Bytes that must stay resident at a context."""

    runtime: int
    weights: int
    cache: int
    work: int

    @property
    def total(self) -> int:
        return self.runtime + self.weights + self.cache + self.work


def memory_of(model: Model, device: Device, context: int) -> Memory:
    """Resident bytes of a process that has read a prompt and filled its context."""
    # Standard operators concatenate the cache, so the old and the new one are there together.
    copies = 2 if model.target == "portable" else 1
    return Memory(
        runtime=RUNTIME_BYTES,
        weights=round(model.weight_bytes_per_token * packed_share(model, device)),
        cache=copies * cache_bytes(model, context),
        work=round(ALLOCATED_SHARE * activation_bytes(model)) * min(context, PIECE),
    )


def cache_bytes(model: Model, context: int) -> int:
    """Bytes of the cache behind a number of positions."""
    return model.kv_bytes_per_token * context - model.sliding.saved(context)


def activation_bytes(model: Model) -> int:
    """Floats that a layer needs at once, bytes per token of a prompt.

    The residual and its norm beside, in the feed-forward block, gate, up and their product, or in attention, queries,
    keys and values, rotated and before.
    """
    attention = max((2 * (query + 2 * kv) * model.head_dim for query, kv in model.attention), default=0)
    return 4 * (2 * model.hidden + max(3 * model.widest_ffn, attention))


def packed_share(model: Model, device: Device) -> float:
    """Bytes of the packed matrices over those of the file's.

    The int8 kernels keep integers, scales and, for each block, the sum of its weights as a float; the float kernels of
    4 bit keep the integers alone and read the scales from the file; floats are copied as they are.
    """
    if model.bits >= 16 or model.target == "cuda":
        return 1.0
    scales = 4 / model.block
    share = scales / (model.bits / 8 + scales)  # of a block's bytes
    return 1 + share if int8_kernels(model, device) else 1 - share


def read_share(model: Model, device: Device) -> float:
    """Bytes that decoding reads of the matrices, over those of the file's: the least, as a ceiling wants.

    The int8 kernels read what they packed: on x86-64 a float scale and a float sum beside each block, on arm64 a scale
    of 16 bits (KleidiAI, 4 bit). The float kernels read the packed integers, and the scales from the file.
    """
    if model.bits >= 16 or model.target == "cuda" or not int8_kernels(model, device):
        return 1.0
    if device.architecture == "aarch64" and model.bits == 4:
        integers = model.bits / 8
        return (integers + 2 / model.block) / (integers + 4 / model.block)
    return packed_share(model, device)


def int8_kernels(model: Model, device: Device) -> bool:
    """Whether matrices are multiplied as integers."""
    return model.accuracy_level == 4 and device.dotprod is not False


def largest_context(model: Model, device: Device) -> int:
    """Tokens of context that fit; 0 where none does. The memory grows with the context."""
    contexts = range(1, model.context_length + 1)
    return bisect_right(contexts, device.memory_bytes, key=lambda context: memory_of(model, device, context).total)


def usable_memory(numbers: Mapping[str, float | None], stated: int | None = None) -> tuple[int, str] | None:
    """Bytes that a board leaves to a process, and how that is known; None where no memory is known.

    Args:
        numbers: ``memory_visible``, ``memory_capacity`` and ``memory_smallest`` of its profile, bytes.
        stated: capacity that the user names, bytes.
    """
    sources = (
        (stated, VISIBLE_SHARE, "{share:.0%} of the {gib:.3g} GiB that were given"),
        (numbers.get("memory_visible"), 1.0, "the {gib:.3g} GiB that its system sees"),
        (numbers.get("memory_capacity"), VISIBLE_SHARE, "{share:.0%} of its {gib:.3g} GiB"),
        (numbers.get("memory_smallest"), VISIBLE_SHARE, "{share:.0%} of {gib:.3g} GiB, the smallest that is sold"),
    )
    for size, share, how in sources:
        if size is not None:
            visible = size * share
            system = min(SYSTEM_BYTES, round(SYSTEM_SHARE * visible))
            known = f"{how.format(share=share, gib=size / 2**30)} ({visible / 1e6:.0f} MB)"
            return round(visible) - system, f"{known}, less {system / 1e6:.0f} MB for the system"
    return None
