"""The state of this host at the moment: heat, throttling, memory. Nothing here is part of a fingerprint."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TypedDict

from devices.probe.cpu import hertz, policies
from devices.probe.jetson import Run
from devices.probe.throttling import coolers, firmware_bits, over_current, throttle_count, zones
from saap.base.cgroup import memory_left, memory_limit
from saap.base.tree import fields, first_text, glob, text

# Bits of `vcgencmd get_throttled`; Raspberry Pi documentation, "vcgencmd". The same, 16 higher: since boot.
PI_BITS = {0: "under-voltage", 1: "clock capped", 2: "throttled", 3: "soft temperature limit"}
SINCE_BOOT = 16
_REASONS = {
    "temperatures": "the kernel has no thermal zones",
    "raspberry_pi": "no get_throttled: not a Raspberry Pi, or its firmware cannot be asked",
    "cooling": "no cooling device slows a processor",
    "capped": "no cpufreq",
    "throttle_count": "no thermal_throttle: not x86, or a virtual machine",
    "over_current": "no oc_event_cnt: not a Jetson",
    **dict.fromkeys(("total", "available", "swap_total", "swap_free"), "/proc/meminfo does not tell"),
    "zram": "no compressed swap",
    "cgroup_limit": "no control group limits the memory",
    "cgroup_left": "no control group limits the memory",
}


class FirmwareBits(TypedDict):
    """Bits of a Raspberry Pi's firmware, and the names of those that are set."""

    bits: str
    now: list[str]
    since_boot: list[str]


class CoolingDevice(TypedDict):
    """One that slows a processor or its memory and is at work."""

    type: str
    state: int
    max_state: int | None


class CappedDomain(TypedDict):
    """CPUs whose clock's limit lies below the hardware's; a power mode or a user may have set it too."""

    cpus: str | None
    max_hz: int
    hardware_max_hz: int


class Throttling(TypedDict):
    """Signs of throttling, each None where this host has no such sign."""

    raspberry_pi: FirmwareBits | None
    cooling: list[CoolingDevice] | None
    capped: list[CappedDomain] | None
    throttle_count: int | None  # x86's thermal events since boot, all CPUs together
    over_current: dict[str, int] | None  # a Jetson's events per name since boot


class Zram(TypedDict):
    """Compressed swap, bytes."""

    stored: int
    compressed: int


class MemoryState(TypedDict):
    """Bytes."""

    total: int | None
    available: int | None
    swap_total: int | None
    swap_free: int | None
    zram: Zram | None
    cgroup_limit: int | None
    cgroup_left: int | None


class State(TypedDict):
    """The state of this host; None is unknown, and ``unknown`` says why."""

    temperatures: dict[str, float | None] | None  # degrees Celsius
    throttling: Throttling
    memory: MemoryState
    unknown: dict[str, str]


def probe_state(root: Path, run: Run) -> State:
    heat, slowed, sizes = temperatures(root), throttling(root, run), memory(root)
    flat = {"temperatures": heat, **slowed, **sizes}
    unknown = {name: why for name, why in _REASONS.items() if flat[name] is None}
    return {"temperatures": heat, "throttling": slowed, "memory": sizes, "unknown": unknown}


def temperatures(root: Path) -> dict[str, float | None] | None:
    """Degrees Celsius per thermal zone; a zone that is gated, and so cannot be read, is None."""
    degrees: dict[str, float | None] = {}
    for zone in zones(root):
        degrees[zone.kind if zone.kind not in degrees else f"{zone.kind} ({zone.name})"] = zone.celsius
    return degrees or None


def throttling(root: Path, run: Run) -> Throttling:
    """Signs of throttling; ``run`` asks a Raspberry Pi's firmware where no file tells."""
    return {
        "raspberry_pi": _raspberry_pi(root, run),
        "cooling": _cooling(root),
        "capped": _capped(root),
        "throttle_count": throttle_count(root),
        "over_current": over_current(root) or None,
    }


def memory(root: Path) -> MemoryState:
    limit = memory_limit(root)
    sizes = fields(root / "proc/meminfo")
    total = sizes.get("MemTotal")
    limited = limit is not None and (total is None or limit < total)  # version 1 writes 2^63 for none
    return {
        "total": total,
        "available": sizes.get("MemAvailable"),
        "swap_total": sizes.get("SwapTotal"),
        "swap_free": sizes.get("SwapFree"),
        "zram": _zram(root),
        "cgroup_limit": limit if limited else None,
        "cgroup_left": memory_left(root) if limited else None,
    }


def _raspberry_pi(root: Path, run: Run) -> FirmwareBits | None:
    bits = firmware_bits(root)
    if bits is None:
        match = re.search(r"throttled=(0x[0-9a-fA-F]+)", run(["vcgencmd", "get_throttled"]) or "")
        if match is None:
            return None
        bits = int(match.group(1), 16)
    return {
        "bits": f"{bits:#x}",
        "now": [name for bit, name in PI_BITS.items() if bits >> bit & 1],
        "since_boot": [name for bit, name in PI_BITS.items() if bits >> (bit + SINCE_BOOT) & 1],
    }


def _cooling(root: Path) -> list[CoolingDevice] | None:
    devices = coolers(root)
    if not devices:
        return None
    return [{"type": c.kind, "state": c.state, "max_state": c.max_state} for c in devices if c.state]


def _capped(root: Path) -> list[CappedDomain] | None:
    capped: list[CappedDomain] = []
    known = False
    for policy in policies(root):
        now, hardware = hertz(policy / "scaling_max_freq"), hertz(policy / "cpuinfo_max_freq")
        if now is not None and hardware is not None:
            known = True
            if now < hardware:
                cpus = first_text((policy / "affected_cpus", policy / "related_cpus"))
                capped.append({"cpus": cpus, "max_hz": now, "hardware_max_hz": hardware})
    return capped if known else None


def _zram(root: Path) -> Zram | None:
    """Sum stored and compressed bytes of all compressed swap devices; mm_stat's first two fields (zram.rst)."""
    statistics = [(text(path) or "").split() for path in glob(root / "sys/block", "zram[0-9]*/mm_stat")]
    known = [(int(words[0]), int(words[1])) for words in statistics if len(words) > 1 and "".join(words[:2]).isdigit()]
    if not known:
        return None
    return {"stored": sum(stored for stored, _ in known), "compressed": sum(packed for _, packed in known)}
