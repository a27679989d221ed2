"""The facts of this host: board, CPU, caches, memory, clocks, power mode and versions, read from /proc, /sys and /etc.

Every path hangs below ``root``, so a recorded tree is read like the machine it came from. A fact that cannot be
read is None, never a guess or 0, and ``unknown`` says why.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TypedDict, cast

import psutil

from devices.probe import cpu as probe_cpu
from devices.probe import jetson
from devices.probe.jetson import Run
from saap.base.cgroup import memory_limit
from saap.base.tree import field, first_text, strings, text, why_unreadable

# What firmware says when nobody filled the field in.
_PLACEHOLDERS = {"", "to be filled by o.e.m.", "default string", "system product name", "system manufacturer"}
_GIB = 1 << 30
_TREES = ("proc/device-tree", "sys/firmware/devicetree/base")
_DMI = "sys/class/dmi/id"
_CPUINFO = ("proc/cpuinfo",)

# What is said of a fact that is not known, and the files whose permissions may be the reason.
_REASONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "board": ("no device tree, and no names in DMI", (f"{_TREES[0]}/model", f"{_DMI}/product_name")),
    "compatible": ("no device tree", (f"{_TREES[0]}/compatible",)),
    "cpu_model": ("/proc/cpuinfo names none", _CPUINFO),
    "architecture": ("/proc/cpuinfo does not tell", _CPUINFO),
    "isa": ("/proc/cpuinfo lists no features", _CPUINFO),
    "clusters": ("/proc/cpuinfo lists no processors", _CPUINFO),
    "last_level_cache_bytes": ("the kernel describes no caches", ()),
    "numa": ("the kernel describes no memory nodes", ()),
    "memory_bytes": ("neither /proc/meminfo nor a control group tells", ("proc/meminfo",)),
    "governor": ("no cpufreq: the clock is the firmware's or a hypervisor's", ()),
    "power_mode": ("no nvpmodel: not a Jetson, or not its own system", (jetson.STATUS, jetson.MODES)),
    "clocks": ("not Jetson Linux", (jetson.RELEASE,)),
    "l4t": ("not Jetson Linux", (jetson.RELEASE,)),
    "jetpack": ("not Jetson Linux, or a release that is not in the table", (jetson.RELEASE,)),
    "os": ("no /etc/os-release", ("etc/os-release",)),
    "kernel": ("no /proc/sys/kernel/osrelease", ("proc/sys/kernel/osrelease",)),
    "onnxruntime": ("not installed for this Python", ()),
}

# Besides ONNX Runtime itself, what a result may depend on.
_PACKAGES = ("numpy", "onnxruntime-genai", "tokenizers", "psutil")


class Cores(TypedDict):
    """Counts of cores; ``allowed`` are those this process may run on, ``offline`` those that are switched off."""

    physical: int | None
    logical: int | None
    allowed: int | None
    offline: int | None


class HostFacts(TypedDict):
    """The known facts of a host, as JSON holds them; None is unknown, and ``unknown`` says why."""

    board: str | None
    compatible: list[str] | None  # device tree names, most exact first
    cpu_model: str | None
    architecture: str | None
    isa: list[str] | None  # sorted feature names
    cores: Cores
    clusters: list[probe_cpu.Cluster] | None
    last_level_cache_bytes: int | None  # summed over the caches that the allowed CPUs reach
    numa: list[probe_cpu.MemoryNode] | None
    memory_bytes: int | None  # the smaller of RAM and cgroup limit
    governor: str | None
    power_mode: jetson.PowerMode | None
    clocks: jetson.Clocks | None  # of a Jetson
    l4t: str | None
    jetpack: str | None
    os: str | None
    kernel: str | None
    python: str  # of this process, as the packages
    onnxruntime: str | None
    packages: dict[str, str]
    unknown: dict[str, str]
    fingerprint: str  # 16 hex digits, the same after a reboot


def probe(root: Path = Path("/"), run: Run | None = None) -> HostFacts:
    """Describe the host whose /proc, /sys and /etc lie below ``root``.

    Args:
        run: runs nvpmodel where its file is not there; None asks this host's, and nobody for a recorded tree.
    """
    host = root.resolve() == Path("/")
    run = run or (run_here if host else nobody)
    cpus = probe_cpu.cpuinfo(root)
    l4t = jetson.l4t_release(root)
    system = re.search(r'^PRETTY_NAME="?([^"\n]*)"?', text(root / "etc/os-release") or "", re.MULTILINE)
    facts: HostFacts = {
        "board": _board(root),
        "compatible": next(filter(None, (strings(root / tree / "compatible") for tree in _TREES)), None),
        "cpu_model": probe_cpu.cpu_model(root, cpus),
        "architecture": platform.machine() or None if host else probe_cpu.architecture(cpus),
        "isa": probe_cpu.isa(cpus),
        "cores": _cores(root, cpus, host),
        "clusters": probe_cpu.clusters(root, cpus),
        "last_level_cache_bytes": probe_cpu.last_level_cache(root),
        "numa": probe_cpu.numa_nodes(root),
        "memory_bytes": _memory(root, host),
        "governor": probe_cpu.governor(root),
        "power_mode": jetson.power_mode(root, run),
        "clocks": None if l4t is None else jetson.clocks(root),
        "l4t": l4t,
        "jetpack": jetson.jetpack(l4t),
        "os": None if system is None else system.group(1),
        "kernel": text(root / "proc/sys/kernel/osrelease"),
        "python": platform.python_version(),
        "onnxruntime": installed_version("onnxruntime") or installed_version("onnxruntime-gpu"),
        "packages": {name: version for name in _PACKAGES if (version := installed_version(name))},
        "unknown": {},
        "fingerprint": "",
    }
    facts["unknown"] = {
        name: why_unreadable(root / file for file in files) or usual
        for name, (usual, files) in _REASONS.items()
        if facts[name] is None  # type: ignore[literal-required]
    }
    facts["fingerprint"] = fingerprint(facts)
    return facts


def fingerprint(facts: Mapping[str, object]) -> str:
    """16 hex digits over what makes two measurements comparable and survives a reboot.

    It counts board, CPU model, architecture, ISA features, numbers of physical and logical cores that are on,
    governor, memory, operating system, versions of Python and ONNX Runtime and, on a Jetson, power mode, release of
    Jetson Linux, whether clocks are fixed (``jetson_clocks``, which a reboot loses) and the fan's profile. Left out:
    clocks, temperatures and limits of the moment, kernel build, CPU affinity (a property of the run). Memory is rounded
    because the kernel's reserved part moves by some megabytes between boots. What only some hosts have counts where it
    is known, so that documents from before it was read keep theirs.
    """
    kept = {name: facts[name] for name in ("board", "cpu_model", "architecture", "isa", "governor", "os")}
    cores = cast("Cores", facts["cores"])
    kept["cores"] = {"physical": cores["physical"], "logical": cores["logical"]}
    kept["memory"] = _rounded(cast("int | None", facts["memory_bytes"]))
    kept["versions"] = [facts["python"], facts["onnxruntime"]]
    kept |= {name: facts[name] for name in ("power_mode", "clocks", "l4t") if facts.get(name) is not None}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def run_here(command: Sequence[str]) -> str | None:
    """Return the output of a short command of this host; None where it is not there, fails or takes longer than 5 s."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout


def nobody(command: Sequence[str]) -> str | None:
    """No command: a recorded tree is not the machine that it came from."""
    return None


def _board(root: Path) -> str | None:
    if model := first_text(root / tree / "model" for tree in _TREES):
        return model
    words = [text(root / _DMI / name) or "" for name in ("sys_vendor", "product_name")]
    known = [word for word in words if word.lower() not in _PLACEHOLDERS]
    return " ".join(known) or None


def _cores(root: Path, cpus: list[dict[str, str]], host: bool) -> Cores:
    logical = len(cpus) or (psutil.cpu_count() if host else None)
    physical = probe_cpu.physical_cores(root) or (psutil.cpu_count(logical=False) if host else None)
    allowed, offline = probe_cpu.allowed(root), probe_cpu.offline(root)
    return {
        "physical": physical,
        "logical": logical,
        "allowed": len(allowed) if allowed else None,
        "offline": None if offline is None else len(offline),
    }


def _memory(root: Path, host: bool) -> int | None:
    total = field(root / "proc/meminfo", "MemTotal") or (int(psutil.virtual_memory().total) if host else None)
    return min((size for size in (total, memory_limit(root)) if size), default=None)


def installed_version(package: str) -> str | None:
    """Return the version of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _rounded(memory_bytes: int | None) -> float | None:
    """GiB in steps of a half from 4 GiB on, of an eighth below."""
    if memory_bytes is None:
        return None
    step = _GIB // 2 if memory_bytes >= 4 * _GIB else _GIB // 8
    return round(memory_bytes / step) * step / _GIB
