"""Will a bundle run on a device: does it load, how much memory does it take, how fast could it be at most.

Numbers in, numbers out: whoever calls reads the bundle and the device.
"""

from __future__ import annotations

from dataclasses import dataclass

from devices.fit.facts import Device, Finding, Memory, Model
from devices.fit.kernels import kernels, refusals, remarks
from devices.fit.memory import largest_context, memory_of
from devices.fit.remedies import for_loading, for_memory
from devices.profiles.profile import DeviceError

CACHES = 2  # a model below so many last-level caches may run from them, and memory is then no ceiling
TIGHT = 0.9  # of the memory, from where a fit is called tight


@dataclass(frozen=True)
class Fit:
    """The verdict.

    Attributes:
        loads: None of ``refusals`` stands against it.
        fits: it loads, and the memory suffices at ``context``.
        largest_context: tokens that fit in the memory, at most the model's; 0 where not even one does.
        ceiling: tokens per second that reading the memory allows, with an empty cache and with a full one; None is
            unknown, and ``remarks`` say why.
        remedies: what would make it fit.
    """

    context: int
    memory: Memory
    available: int
    loads: bool
    fits: bool
    largest_context: int
    ceiling: tuple[float | None, float | None]
    kernels: tuple[str, ...]
    refusals: tuple[Finding, ...]
    remarks: tuple[str, ...]
    remedies: tuple[Finding, ...]


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
    fits = not against and memory.total <= device.memory_bytes
    ceiling, why = _ceiling(model, device, context)
    told = remarks(model, device) + why
    if fits and memory.total > TIGHT * device.memory_bytes:
        told += ("tight: less than a tenth of the memory is left, and other processes want some",)
    return Fit(
        context, memory, device.memory_bytes, not against, fits, largest, ceiling, kernels(model, device),
        against, told, () if fits else _remedies(model, device, context, largest, against),
    )  # fmt: skip


def _ceiling(model: Model, device: Device, context: int) -> tuple[tuple[float | None, float | None], tuple[str, ...]]:
    if device.bandwidth is None:
        return (None, None), (f"ceiling unknown: the bandwidth is not known ({device.bandwidth_source})",)
    empty = model.weight_bytes_per_token
    if device.last_level_cache and empty <= CACHES * device.last_level_cache:
        why = f"ceiling unknown: {_mb(empty)} per token may be read from a cache of {_mb(device.last_level_cache)}"
        return (None, None), (why,)
    full = empty + model.kv_bytes_per_token * context
    return (device.bandwidth / empty, device.bandwidth / full), ()


def _remedies(
    model: Model, device: Device, context: int, largest: int, against: tuple[Finding, ...]
) -> tuple[Finding, ...]:
    found = for_loading(against)
    if memory_of(model, device, context).total > device.memory_bytes:
        found += for_memory(model, device, context, largest)
    return found


def _mb(size: float) -> str:
    return f"{size / 1e6:.0f} MB"
