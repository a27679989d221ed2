"""Will a bundle run on a device: does it load, how much memory does it take, how fast could it be at most.

Numbers in, numbers out: whoever calls reads the bundle and the device. Which kernels there are was read from ONNX
Runtime's sources (MLAS, KleidiAI) and, on x86-64, measured; nobody has run them on the boards.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from devices.fit.memory import (
    Device,
    Memory,
    Model,
    cache_bytes,
    largest_context,
    memory_of,
    packed_share,
    read_share,
)
from devices.profiles.profile import DeviceError

CACHES = 2  # a model below so many last-level caches may run from them, and memory is then no ceiling
TIGHT = 0.9  # of the memory, from where a fit is called tight
# Head sizes and query heads per KV head for which CUDA's attention has its fast decode path (ONNX Runtime 1.32).
CUDA_HEADS = (64, 128, 256)
CUDA_RATIOS = (1, 2, 4, 5, 8, 16, 32)
# What the onnxruntime-gpu wheel for arm64 holds kernels for.
WHEEL_GPUS = ("sm_89", "sm_90", "sm_120", "sm_121")
OWN_PYTHON = "install a Python of your own, 3.11 or newer, and onnxruntime into it; then say --onnxruntime VERSION"
KV8_RUNTIME = (1, 27)  # ONNX Runtime whose attention takes an int8 cache on a CPU
MEGABYTE, KILOBYTE = 10**6, 10**3
FINE = 10  # megabytes, below which sizes are told in kilobytes
EXPORT = "saap export MODEL -o BUNDLE"


@dataclass(frozen=True)
class Finding:
    """An obstacle of a bundle, or a remedy, and the command that does it."""

    what: str
    command: str | None = None


@dataclass(frozen=True)
class Fit:
    """The verdict.

    Attributes:
        ceiling: tokens per second that reading the memory allows, with an empty cache and with a full one; None is
            unknown, and ``remarks`` say why.
        sustained: the same for the bandwidth that others measured there; None where the ceiling is, or nobody did.
    """

    context: int
    memory: Memory
    available: int
    loads: bool  # None of ``refusals`` stands against it
    fits: bool  # it loads, and the memory suffices at ``context``
    largest_context: int  # tokens that fit in the memory, at most the model's; 0 where not even one does
    ceiling: tuple[float | None, float | None]
    sustained: tuple[float | None, float | None]
    refusals: tuple[Finding, ...]
    remarks: tuple[str, ...]
    remedies: tuple[Finding, ...]  # what would make it fit


def fit(model: Model, device: Device, context: int) -> Fit:
    """Judge a model on a device.

    Args:
        context: positions of the cache.

    Raises:
        DeviceError: a context that the model cannot have.
    """
    if not 1 <= context <= model.context_length:
        raise DeviceError(f"a context of {context} tokens: this model holds 1 to {model.context_length}")
    against = refusals(model, device)
    memory = memory_of(model, device, context)
    largest = largest_context(model, device)
    suffices = memory.total <= device.memory_bytes
    ceiling, why = _ceiling(model, device, context)
    share = device.sustained / device.bandwidth if device.sustained and device.bandwidth else None
    empty, full = (None if share is None or rate is None else rate * share for rate in ceiling)
    notes = remarks(model, device) + why
    remedies = tuple(Finding("so that it loads", finding.command) for finding in against if finding.command)
    if not suffices:
        remedies += for_memory(model, device, context, largest)
    elif not against and memory.total > TIGHT * device.memory_bytes:
        notes += ("tight: less than a tenth of the memory is left, and other processes want some",)
    return Fit(
        context, memory, device.memory_bytes, not against, not against and suffices, largest, ceiling,
        (empty, full), against, notes, remedies,
    )  # fmt: skip


def _ceiling(model: Model, device: Device, context: int) -> tuple[tuple[float | None, float | None], tuple[str, ...]]:
    if device.bandwidth is None:
        return (None, None), (f"ceiling unknown: the bandwidth is not known ({device.bandwidth_source})",)
    empty, cache = round(model.weight_bytes_per_token * read_share(model, device)), device.last_level_cache
    if cache and empty <= CACHES * cache:
        why = f"{empty / 1e6:.0f} MB per token may be read from a cache of {cache / 1e6:.0f} MB"
        return (None, None), (f"ceiling unknown: {why}",)
    full = empty + cache_bytes(model, context)
    return (device.bandwidth / empty, device.bandwidth / full), ()


def refusals(model: Model, device: Device) -> tuple[Finding, ...]:
    """Say why it would not load, or not run at a speed that makes sense; empty where nothing is known against it."""
    findings = []
    needed, there = model.onnxruntime_min, device.onnxruntime
    if there and _version(there) < _version(needed):
        reason = f"it needs ONNX Runtime {needed}, there it is {there} ({device.onnxruntime_source})"
        for_cache = model.kv_dtype == "int8" and _version(there) >= (1, 23)  # which alone asks for a newer one
        findings.append(Finding(reason, f"{EXPORT} --kv 32" if for_cache else OWN_PYTHON))
    if model.target != "cuda" and model.bits == 8:
        if device.dotprod is False:
            findings.append(Finding("8 bit has no kernel without dotprod", f"{EXPORT} --bits 4 --no-dotprod"))
        if model.accuracy_level != 4:
            slow = "8 bit is fast at accuracy level 4 only (else 250 times slower)"
            findings.append(Finding(slow, f"{EXPORT} --bits 8"))
    if model.target == "cuda" and device.cuda == "none":
        findings.append(Finding("it is for CUDA, and there is no such GPU", f"{EXPORT} --target cpu"))
    return tuple(findings)


def remarks(model: Model, device: Device) -> tuple[str, ...]:
    notes = []
    if device.onnxruntime is None:
        notes.append(f"needs ONNX Runtime {model.onnxruntime_min}; which one is there is not known")
    if model.target != "cuda" and model.bits == 8 and device.dotprod is None:
        notes.append("8 bit needs dotprod, and whether the CPU has it is not known")
    if model.target != "cuda" and model.bits == 4 and device.dotprod is False:
        notes.append("without dotprod 4 bit is computed in float32: arithmetic, not memory, will be the limit")
    if model.target == "cpu" and model.kv_dtype == "float16":
        notes.append("a float16 cache is slower than float32 on CPUs")
    if model.target == "portable":
        notes.append("standard operators copy the cache at every token: it counts twice, and decode slows with depth")
    return (*notes, *(_cuda_remarks(model, device) if model.target == "cuda" else ()))


def _cuda_remarks(model: Model, device: Device) -> list[str]:
    notes = ["the memory is a lower bound: what CUDA itself takes has not been measured"]
    if device.cuda is None:
        notes.append("whether there is a GPU for CUDA is not known")
    elif device.architecture == "aarch64" and device.cuda not in (*WHEEL_GPUS, "none"):
        build = "it needs a build of NVIDIA's for Jetson"
        notes.append(f"onnxruntime-gpu on PyPI has no kernels for {device.cuda}: {build}")
    ratios = {heads / kv for heads, kv in model.attention}
    if model.head_dim not in CUDA_HEADS or not ratios <= set(CUDA_RATIOS):
        notes.append(
            f"attention takes CUDA's slow path: the fast one wants heads of {', '.join(map(str, CUDA_HEADS))} and "
            f"{', '.join(map(str, CUDA_RATIOS))} query heads per KV head"
        )
    return notes


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d{1,9}", text)[:2])


def for_memory(model: Model, device: Device, context: int, largest: int) -> tuple[Finding, ...]:
    """Return the changes that would bring it below the device's memory, each by itself; empty where nothing would."""
    findings = []

    def fits(smaller: Model) -> bool:
        return memory_of(smaller, device, context).total <= device.memory_bytes

    if largest:
        findings.append(Finding(f"a context of {largest} tokens fits", f"saap generate BUNDLE --context {largest}"))
    for bits in (8, 4):
        if bits < model.bits and (bits == 4 or device.dotprod is not False) and fits(with_bits(model, bits)):
            findings.append(Finding(f"weights of {bits} bit fit", f"{EXPORT} --bits {bits}"))
    newer = device.onnxruntime is None or _version(device.onnxruntime) >= KV8_RUNTIME
    # A byte for each of four; the scales are part of the graph.
    small_cache = replace(
        model,
        kv_bytes_per_token=model.kv_bytes_per_token // 4,
        kv_dtype="int8",
        sliding=replace(model.sliding, bytes_per_token=model.sliding.bytes_per_token // 4),
    )
    if model.kv_dtype == "float32" and model.target == "cpu" and newer and fits(small_cache):
        findings.append(Finding("a cache of 8 bit fits", f"{EXPORT} --bits {model.bits} --kv 8"))
    if size := prune_to(model, device, context):
        change = f"a weights file of {size / MEGABYTE:g} MB (now {model.file_bytes / MEGABYTE:.0f}) fits"
        prune = f"saap prune MODEL -o SLIM --max-bytes {size_option(size)} --bits {model.bits}"
        findings.append(Finding(change, prune))
    return tuple(findings)


def with_bits(model: Model, bits: int, block: int = 32) -> Model:
    """Return the same model with matrices of fewer bits in blocks of ``block`` columns, one float scale each."""

    def per_weight(width: int, group: int) -> float:
        return width / 8 + (4 / group if width != 32 else 0)

    share = per_weight(bits, block) / per_weight(model.bits, model.block or block)
    weights, file = round(model.weight_bytes_per_token * share), round(model.file_bytes * share)
    return replace(model, bits=bits, block=block, weight_bytes_per_token=weights, file_bytes=file)


def prune_to(model: Model, device: Device, context: int) -> int | None:
    """Bytes of the weights file that pruning must reach to fit with this context; None where it need not, or cannot."""
    size = in_units(largest_file(model, device, context))
    return size if 0 < size < model.file_bytes else None


def largest_file(model: Model, device: Device, context: int) -> int:
    """Bytes of the largest weights file of such a model that fits; 0 or less where not even an empty one does.

    Pruning leaves what is looked up, such as rotary tables. The cache and the activations of a pruned model are
    smaller too, so it errs on the safe side.
    """
    memory = memory_of(model, device, context)
    left = device.memory_bytes - (memory.total - memory.weights)
    looked_up = model.file_bytes - model.weight_bytes_per_token
    return int(left / packed_share(model, device)) + looked_up if left > 0 else 0


def in_units(size: int) -> int:
    """Round a size as people give it: to whole megabytes, or kilobytes of a small one."""
    unit = MEGABYTE if size >= FINE * MEGABYTE else KILOBYTE
    return size // unit * unit


def size_option(size: int) -> str:
    """Spell a size in such units, as options take it."""
    size = in_units(size)
    return f"{size // KILOBYTE}kB" if size % MEGABYTE else f"{size // MEGABYTE}MB"
