"""What this host is: board, CPU, caches, memory, clocks and runtime versions, read from /proc and /sys.

Every path hangs below ``root``, so a recorded tree is read like the machine it came from. A fact that cannot be
read is None, never a guess.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from devices.cgroup import memory_limit

# Kernel name of a CPU feature -> the name used in profiles and results. Those that decide which int4, int8 and
# half-precision kernels ONNX Runtime takes.
ISA_FEATURES = {
    "f16c": "f16c",
    "fma": "fma",
    "avx2": "avx2",
    "avx512f": "avx512f",
    "avx512_vnni": "avx512_vnni",
    "avx512_bf16": "avx512_bf16",
    "avx_vnni": "avx_vnni",
    "amx_int8": "amx_int8",
    "asimd": "asimd",
    "asimdhp": "fp16",
    "asimddp": "dotprod",
    "i8mm": "i8mm",
    "bf16": "bf16",
    "sve": "sve",
    "sve2": "sve2",
}

# (implementer, part) of MIDR as /proc/cpuinfo prints them; from Linux arch/arm64/include/asm/cputype.h.
ARM_PARTS = {
    (0x41, 0xD03): "Cortex-A53",
    (0x41, 0xD05): "Cortex-A55",
    (0x41, 0xD07): "Cortex-A57",
    (0x41, 0xD08): "Cortex-A72",
    (0x41, 0xD0B): "Cortex-A76",
    (0x41, 0xD0C): "Neoverse-N1",
    (0x41, 0xD40): "Neoverse-V1",
    (0x41, 0xD42): "Cortex-A78AE",
    (0x41, 0xD49): "Neoverse-N2",
    (0x41, 0xD4F): "Neoverse-V2",
    (0x41, 0xD80): "Cortex-A520",
    (0x41, 0xD81): "Cortex-A720",
    (0x41, 0xD82): "Cortex-X4",
    (0x41, 0xD83): "Neoverse-V3AE",
    (0x4E, 0x004): "Carmel",
}

# What firmware says when nobody filled the field in.
_PLACEHOLDERS = {"", "to be filled by o.e.m.", "default string", "system product name", "system manufacturer"}
_GIB = 1 << 30


def probe(root: Path = Path("/")) -> dict[str, Any]:
    """Describe the host whose /proc, /sys and /etc lie below ``root``.

    Returns:
        board, cpu_model, architecture, isa (sorted feature names), cores {physical, logical, allowed},
        last_level_cache_bytes (summed over the caches that the allowed CPUs reach), memory_bytes (the smaller of RAM
        and cgroup limit), governor, frequencies (per clock domain, Hz), os, kernel, python, onnxruntime and
        fingerprint (16 hex digits, the same after a reboot). Python and ONNX Runtime are those of this process.
    """
    host = root.resolve() == Path("/")
    cpus = _cpuinfo(root)
    facts: dict[str, Any] = {
        "board": _board(root),
        "cpu_model": _cpu_model(cpus),
        "architecture": platform.machine() or None if host else _architecture(cpus),
        "isa": _isa(cpus),
        "cores": _cores(root, cpus, host),
        "last_level_cache_bytes": _last_level_cache(root),
        "memory_bytes": _memory(root, host),
        "governor": _governor(root),
        "frequencies": _frequencies(root),
        "os": _os_name(root),
        "kernel": _text(root / "proc/sys/kernel/osrelease"),
        "python": platform.python_version(),
        "onnxruntime": _installed("onnxruntime", "onnxruntime-gpu"),
    }
    facts["fingerprint"] = fingerprint(facts)
    return facts


def fingerprint(facts: dict[str, Any]) -> str:
    """16 hex digits over what makes two measurements comparable and survives a reboot.

    Left out: clocks of the moment, kernel build, CPU affinity (a property of the run). Memory is rounded because the
    kernel's reserved part moves by some megabytes between boots.
    """
    kept = {name: facts[name] for name in ("board", "cpu_model", "architecture", "isa", "governor", "os")}
    kept["cores"] = {name: facts["cores"][name] for name in ("physical", "logical")}
    kept["memory"] = _rounded(facts["memory_bytes"])
    kept["versions"] = [facts["python"], facts["onnxruntime"]]
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def parse_cpu_list(text: str) -> list[int]:
    """The kernel's list format, ``0-3,6`` -> [0, 1, 2, 3, 6]."""
    cpus: list[int] = []
    for piece in filter(None, (part.strip() for part in text.split(","))):
        first, _, last = piece.partition("-")
        cpus.extend(range(int(first), int(last or first) + 1))
    return cpus


def _text(path: Path) -> str | None:
    try:
        raw = path.read_bytes()
    except OSError:
        return None
    return raw.decode("utf-8", "replace").strip("\0 \t\r\n") or None


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text and text.isdigit() else None


def _cpuinfo(root: Path) -> list[dict[str, str]]:
    """One dictionary per logical CPU; lines that stand apart (``Hardware``, ``Model``) are left out."""
    blocks = []
    for paragraph in (_text(root / "proc/cpuinfo") or "").split("\n\n"):
        pairs = (line.partition(":") for line in paragraph.splitlines())
        block = {key.strip(): value.strip() for key, _, value in pairs}
        if "processor" in block:
            blocks.append(block)
    return blocks


def _board(root: Path) -> str | None:
    for name in ("proc/device-tree/model", "sys/firmware/devicetree/base/model"):
        if model := _text(root / name):
            return model
    dmi = root / "sys/class/dmi/id"
    words = [_text(dmi / name) or "" for name in ("sys_vendor", "product_name")]
    known = [word for word in words if word.lower() not in _PLACEHOLDERS]
    return " ".join(known) or None


def _cpu_model(cpus: list[dict[str, str]]) -> str | None:
    # Old ARM kernels print a "model name" that says no more than ARMv8.
    names = [_arm_part(cpu) or cpu.get("model name") for cpu in cpus]
    return " + ".join(_unique(name for name in names if name)) or None


def _arm_part(cpu: dict[str, str]) -> str | None:
    try:
        key = (int(cpu["CPU implementer"], 16), int(cpu["CPU part"], 16))
    except (KeyError, ValueError):
        return None
    return ARM_PARTS.get(key, f"ARM implementer {key[0]:#x} part {key[1]:#x}")


def _architecture(cpus: list[dict[str, str]]) -> str | None:
    if any("flags" in cpu for cpu in cpus):
        return "x86_64" if any("lm" in cpu.get("flags", "").split() for cpu in cpus) else "i686"
    return "aarch64" if any(cpu.get("CPU architecture") == "8" for cpu in cpus) else None


def _isa(cpus: list[dict[str, str]]) -> list[str] | None:
    """Features that every CPU has: on a mixed SoC a kernel must run on all of them."""
    sets = [set((cpu.get("flags") or cpu.get("Features") or "").split()) for cpu in cpus]
    if not any(sets):
        return None
    return sorted(ISA_FEATURES[name] for name in set.intersection(*sets) if name in ISA_FEATURES)


def _cores(root: Path, cpus: list[dict[str, str]], host: bool) -> dict[str, int | None]:
    logical = len(cpus) or (psutil.cpu_count() if host else None)
    physical = _physical_cores(root) or (psutil.cpu_count(logical=False) if host else None)
    allowed = _allowed(root)
    return {"physical": physical, "logical": logical, "allowed": len(allowed) if allowed else None}


def _allowed(root: Path) -> list[int] | None:
    """The CPUs this process may run on."""
    match = re.search(r"^Cpus_allowed_list:\s*(\S+)", _text(root / "proc/self/status") or "", re.MULTILINE)
    return parse_cpu_list(match.group(1)) if match else None


def _physical_cores(root: Path) -> int | None:
    cores = set()
    for topology in (root / "sys/devices/system/cpu").glob("cpu[0-9]*/topology"):
        core = _text(topology / "core_id")
        if core is not None:
            # core_id starts again in every package, and on older ARM kernels in every cluster.
            cores.add((_text(topology / "physical_package_id"), _text(topology / "cluster_id"), core))
    return len(cores) or None


def _last_level_cache(root: Path) -> int | None:
    sizes: dict[tuple[int, str], int] = {}
    allowed = _allowed(root)
    for index in (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cache/index[0-9]*"):
        if allowed is not None and int(index.parent.parent.name.removeprefix("cpu")) not in allowed:
            continue
        level, size = _number(index / "level"), _kibibytes(_text(index / "size"))
        if level and size and _text(index / "type") != "Instruction":
            shared = _text(index / "shared_cpu_list") or _text(index / "shared_cpu_map") or ""
            sizes[level, shared] = size
    last = max((level for level, _ in sizes), default=None)
    return sum(size for (level, _), size in sizes.items() if level == last) or None


def _kibibytes(text: str | None) -> int | None:
    match = re.fullmatch(r"(\d+)([KM])", text or "")
    return int(match.group(1)) * {"K": 1 << 10, "M": 1 << 20}[match.group(2)] if match else None


def _memory(root: Path, host: bool) -> int | None:
    match = re.search(r"^MemTotal:\s*(\d+) kB", _text(root / "proc/meminfo") or "", re.MULTILINE)
    total = int(match.group(1)) * 1024 if match else (int(psutil.virtual_memory().total) if host else None)
    return min((size for size in (total, memory_limit(root)) if size), default=None)


def _policies(root: Path) -> list[Path]:
    """One directory per clock domain; without the policy view each CPU is its own."""
    base = root / "sys/devices/system/cpu"
    found = list((base / "cpufreq").glob("policy[0-9]*")) or list(base.glob("cpu[0-9]*/cpufreq"))
    return sorted(found, key=lambda path: int(re.findall(r"\d+", path.relative_to(base).as_posix())[0]))


def _governor(root: Path) -> str | None:
    governors = [_text(policy / "scaling_governor") for policy in _policies(root)]
    return ", ".join(_unique(name for name in governors if name)) or None


def _frequencies(root: Path) -> list[dict[str, Any]] | None:
    def hertz(path: Path) -> int | None:
        khz = _number(path)
        return khz * 1000 if khz is not None else None

    domains: list[dict[str, Any]] = [
        {
            "cpus": _text(policy / "affected_cpus") or _text(policy / "related_cpus"),
            "min_hz": hertz(policy / "scaling_min_freq"),
            "max_hz": hertz(policy / "scaling_max_freq"),
            "current_hz": hertz(policy / "scaling_cur_freq"),
        }
        for policy in _policies(root)
    ]
    return domains or None


def _os_name(root: Path) -> str | None:
    match = re.search(r'^PRETTY_NAME="?([^"\n]*)"?', _text(root / "etc/os-release") or "", re.MULTILINE)
    return match.group(1) if match else None


def _installed(*packages: str) -> str | None:
    """Version of the first of ``packages`` that is installed."""
    for package in packages:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return None


def _rounded(memory_bytes: int | None) -> float | None:
    """GiB in steps of a half from 4 GiB on, of an eighth below."""
    if memory_bytes is None:
        return None
    step = _GIB // 2 if memory_bytes >= 4 * _GIB else _GIB // 8
    return round(memory_bytes / step) * step / _GIB


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
