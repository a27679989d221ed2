"""What this host is like at the moment: heat, throttling, memory. Nothing here is part of a fingerprint."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from devices.cgroup import memory_left, memory_limit
from devices.jetson import Run
from devices.probe_cpu import CPU, hertz, policies
from devices.tree import first_text, glob, number, text

# Bits of `vcgencmd get_throttled`; Raspberry Pi documentation, "vcgencmd". The same, 16 higher: since boot.
PI_BITS = {
    0: "under-voltage",
    1: "clock capped",
    2: "throttled",
    3: "soft temperature limit",
}
SINCE_BOOT = 16
_FIRMWARE = "sys/devices/platform"
_REASONS = {
    "temperatures": "the kernel has no thermal zones",
    "raspberry_pi": "no get_throttled: not a Raspberry Pi, or its firmware cannot be asked",
    "cooling": "no cooling device slows a processor",
    "capped": "no cpufreq",
    "throttle_count": "no thermal_throttle: not x86, or a virtual machine",
    "over_current": "no oc_event_cnt: not a Jetson",
    "total": "/proc/meminfo does not tell",
    "available": "/proc/meminfo does not tell",
    "swap_total": "/proc/meminfo does not tell",
    "swap_free": "/proc/meminfo does not tell",
    "zram": "no compressed swap",
    "cgroup_limit": "no control group limits the memory",
    "cgroup_left": "no control group limits the memory",
}
_SLOWING = re.compile(r"cpu|processor|devfreq|gpu|powerclamp", re.IGNORECASE)


def probe_state(root: Path, run: Run) -> dict[str, Any]:
    """temperatures (degrees Celsius), throttling and memory (bytes), as JSON types.

    What is None is unknown, and ``unknown`` says why.
    """
    state: dict[str, Any] = {
        "temperatures": temperatures(root),
        "throttling": throttling(root, run),
        "memory": memory(root),
    }
    flat = {"temperatures": state["temperatures"], **state["throttling"], **state["memory"]}
    state["unknown"] = {name: why for name, why in _REASONS.items() if flat[name] is None}
    return state


def temperatures(root: Path) -> dict[str, float | None] | None:
    """Degrees Celsius per thermal zone; a zone that is gated, and so cannot be read, is None."""
    zones: dict[str, float | None] = {}
    for zone in glob(root / "sys/class/thermal", "thermal_zone[0-9]*"):
        name = text(zone / "type") or zone.name
        millidegrees = number(zone / "temp")
        if millidegrees is not None and not -40_000 < millidegrees < 150_000:
            millidegrees = None  # what a sensor without power tells
        key = name if name not in zones else f"{name} ({zone.name})"
        zones[key] = millidegrees / 1000 if millidegrees is not None else None
    return zones or None


def throttling(root: Path, run: Run) -> dict[str, Any]:
    """Signs of throttling, each None where this host has no such sign.

    Returns:
        raspberry_pi: bits (of the firmware), now and since_boot (their names).
        cooling: type and state of each device that slows a processor or its memory and is at work.
        capped: clock domains whose limit lies below the hardware's: cpus, max_hz, hardware_max_hz. A power mode or a
            user may have set it too.
        throttle_count: x86's thermal events since boot, all CPUs together.
        over_current: events per name since boot, of a Jetson.
    """
    return {
        "raspberry_pi": _raspberry_pi(root, run),
        "cooling": _cooling(root),
        "capped": _capped(root),
        "throttle_count": _throttle_count(root),
        "over_current": _over_current(root),
    }


def memory(root: Path) -> dict[str, Any]:
    """Bytes: total, available, swap_total, swap_free, zram (stored and compressed), cgroup_limit, cgroup_left."""
    limit = memory_limit(root)
    sizes = {key: int(kb) * 1024 for key, kb in re.findall(r"^(\w+):\s*(\d+) kB", _meminfo(root), re.MULTILINE)}
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


def available(root: Path) -> int | None:
    """Bytes that a process may still take: MemAvailable, or what a control group leaves where that is less."""
    found = memory(root)
    return min((size for size in (found["available"], found["cgroup_left"]) if size is not None), default=None)


def _raspberry_pi(root: Path, run: Run) -> dict[str, Any] | None:
    said = first_text(glob(root / _FIRMWARE, "soc*/soc*firmware/get_throttled"))
    if said is None:
        match = re.search(r"throttled=(0x[0-9a-fA-F]+)", run(["vcgencmd", "get_throttled"]) or "")
        said = match.group(1) if match else None
    try:
        bits = int(said or "", 16)
    except ValueError:
        return None
    return {
        "bits": f"{bits:#x}",
        "now": [name for bit, name in PI_BITS.items() if bits >> bit & 1],
        "since_boot": [name for bit, name in PI_BITS.items() if bits >> (bit + SINCE_BOOT) & 1],
    }


def _cooling(root: Path) -> list[dict[str, Any]] | None:
    slowing = []
    for device in glob(root / "sys/class/thermal", "cooling_device[0-9]*"):
        kind, state = text(device / "type") or "", number(device / "cur_state")
        if _SLOWING.search(kind) and state is not None:
            # powerclamp tells -1 while it is off
            slowing.append({"type": kind, "state": max(0, state), "max_state": number(device / "max_state")})
    return [device for device in slowing if device["state"]] if slowing else None


def _capped(root: Path) -> list[dict[str, Any]] | None:
    capped: list[dict[str, Any]] = []
    known = False
    for policy in policies(root):
        now, hardware = hertz(policy / "scaling_max_freq"), hertz(policy / "cpuinfo_max_freq")
        if now is not None and hardware is not None:
            known = True
            if now < hardware:
                cpus = first_text((policy / "affected_cpus", policy / "related_cpus"))
                capped.append({"cpus": cpus, "max_hz": now, "hardware_max_hz": hardware})
    return capped if known else None


def _throttle_count(root: Path) -> int | None:
    found = [
        number(path)
        for path in glob(root / CPU, "cpu[0-9]*/thermal_throttle/*_throttle_count")
        if path.name in ("core_throttle_count", "package_throttle_count")
    ]
    known = [count for count in found if count is not None]
    return sum(known) if known else None


def _over_current(root: Path) -> dict[str, int] | None:
    places = ("sys/class/hwmon/hwmon*", "sys/devices/platform/soctherm*", "sys/devices/platform/soctherm*/hwmon/hwmon*")
    counts: dict[str, int] = {}
    for place in places:
        for path in glob(root, f"{place}/oc[0-9]_event_cnt"):
            if (count := number(path)) is not None:
                counts.setdefault(path.name.split("_")[0].upper(), count)
    return counts or None


def _zram(root: Path) -> dict[str, int] | None:
    """Stored and compressed bytes of all compressed swap devices; mm_stat's first two fields (zram.rst)."""
    found = [(text(path) or "").split() for path in glob(root / "sys/block", "zram[0-9]*/mm_stat")]
    known = [(int(words[0]), int(words[1])) for words in found if len(words) > 1 and "".join(words[:2]).isdigit()]
    if not known:
        return None
    return {"stored": sum(stored for stored, _ in known), "compressed": sum(packed for _, packed in known)}


def _meminfo(root: Path) -> str:
    return text(root / "proc/meminfo") or ""
