"""What would make a bundle fit: less context, fewer bits, a smaller cache, a smaller model."""

from __future__ import annotations

from dataclasses import replace

from devices.fit.facts import Device, Finding, Model
from devices.fit.kernels import dotprod
from devices.fit.memory import memory_of, packed_share

KV8_RUNTIME = (1, 27)  # ONNX Runtime whose attention takes an int8 cache on a CPU
MEGABYTE = 10**6


def for_loading(against: tuple[Finding, ...]) -> tuple[Finding, ...]:
    """The remedy that each refusal carries."""
    return tuple(Finding("so that it loads", finding.command) for finding in against if finding.command)


def for_memory(model: Model, device: Device, context: int, largest: int) -> tuple[Finding, ...]:
    """What would bring it below the device's memory, each by itself; empty where nothing would."""
    found = []
    if largest:
        found.append(Finding(f"a context of {largest} tokens fits", f"saap generate BUNDLE --context {largest}"))
    for bits in (8, 4):
        if bits < model.bits and (bits == 4 or dotprod(device) is not False):
            smaller = with_bits(model, bits)
            if _fits(smaller, device, context):
                found.append(Finding(f"weights of {bits} bit fit", f"saap export MODEL -o BUNDLE --bits {bits}"))
    if model.kv_dtype == "float32" and model.target == "cpu" and _takes_int8_cache(device):
        # A byte for each of four; the scales are part of the graph.
        smaller = replace(model, kv_bytes_per_token=model.kv_bytes_per_token // 4, kv_dtype="int8")
        if _fits(smaller, device, context):
            found.append(Finding("a cache of 8 bit fits", f"saap export MODEL -o BUNDLE --bits {model.bits} --kv 8"))
    if size := prune_to(model, device, context):
        found.append(
            Finding(
                f"a weights file of {size // MEGABYTE} MB (now {model.file_bytes / 1e6:.0f}) fits",
                f"saap prune MODEL -o SLIM --max-bytes {size // MEGABYTE}MB --bits {model.bits}",
            )
        )
    return tuple(found)


def with_bits(model: Model, bits: int, block: int = 32) -> Model:
    """The same model with matrices of fewer bits in blocks of ``block`` columns, one float scale each."""

    def per_weight(width: int, group: int) -> float:
        return width / 8 + (4 / group if width != 32 else 0)

    share = per_weight(bits, block) / per_weight(model.bits, model.block or block)
    return replace(
        model,
        bits=bits,
        block=block,
        weight_bytes_per_token=round(model.weight_bytes_per_token * share),
        file_bytes=round(model.file_bytes * share),
    )


def prune_to(model: Model, device: Device, context: int) -> int | None:
    """Bytes of the weights file that would fit with this context, in whole megabytes; None where none would.

    The cache and the activations of a pruned model are smaller too, so it errs on the safe side.
    """
    memory = memory_of(model, device, context)
    left = device.memory_bytes - (memory.total - memory.weights)
    size = int(left / packed_share(model, device) * model.file_bytes / model.weight_bytes_per_token)
    size = size // MEGABYTE * MEGABYTE
    return size if 0 < size < model.file_bytes else None


def _fits(model: Model, device: Device, context: int) -> bool:
    return memory_of(model, device, context).total <= device.memory_bytes


def _takes_int8_cache(device: Device) -> bool:
    if device.onnxruntime is None:
        return True
    major, minor = (int(part) for part in device.onnxruntime.split(".")[:2])
    return (major, minor) >= KV8_RUNTIME
