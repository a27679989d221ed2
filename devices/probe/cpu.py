"""The processors of this host: which cores, which features, which clocks, read below ``root``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypedDict

from saap.base.tree import cpu_list, field, first_text, glob, number, parse_cpu_list, text

CPU = "sys/devices/system/cpu"

# What decides which int4, int8 and half-precision kernels ONNX Runtime takes.
# Kernel name of a CPU feature (arch/arm64/kernel/cpuinfo.c, arch/x86/include/asm/cpufeatures.h) -> the name used in
# profiles and results.
ISA_FEATURES = {
    **{name: name for name in ("f16c", "fma", "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8")},
    **{name: name for name in ("asimd", "i8mm", "bf16", "sve", "sve2")},
    "asimdhp": "fp16",
    "asimddp": "dotprod",
}

FEATURES = frozenset(ISA_FEATURES.values())

# Names of arm64 cores by (implementer, part number); from Linux arch/arm64/include/asm/cputype.h and Arm's technical
# reference manuals.
PARTS = {
    (0x41, 0xD03): "Cortex-A53", (0x41, 0xD04): "Cortex-A35", (0x41, 0xD05): "Cortex-A55", (0x41, 0xD06): "Cortex-A65",
    (0x41, 0xD07): "Cortex-A57", (0x41, 0xD08): "Cortex-A72", (0x41, 0xD09): "Cortex-A73", (0x41, 0xD0A): "Cortex-A75",
    (0x41, 0xD0B): "Cortex-A76", (0x41, 0xD0C): "Neoverse-N1", (0x41, 0xD0D): "Cortex-A77",
    (0x41, 0xD0E): "Cortex-A76AE", (0x41, 0xD40): "Neoverse-V1", (0x41, 0xD41): "Cortex-A78",
    (0x41, 0xD42): "Cortex-A78AE", (0x41, 0xD44): "Cortex-X1", (0x41, 0xD46): "Cortex-A510",
    (0x41, 0xD47): "Cortex-A710", (0x41, 0xD48): "Cortex-X2", (0x41, 0xD49): "Neoverse-N2",
    (0x41, 0xD4B): "Cortex-A78C", (0x41, 0xD4C): "Cortex-X1C", (0x41, 0xD4D): "Cortex-A715", (0x41, 0xD4E): "Cortex-X3",
    (0x41, 0xD4F): "Neoverse-V2", (0x41, 0xD80): "Cortex-A520", (0x41, 0xD81): "Cortex-A720",
    (0x41, 0xD82): "Cortex-X4", (0x41, 0xD83): "Neoverse-V3AE", (0x41, 0xD84): "Neoverse-V3",
    (0x41, 0xD85): "Cortex-X925", (0x41, 0xD87): "Cortex-A725", (0x41, 0xD88): "Cortex-A520AE",
    (0x41, 0xD89): "Cortex-A720AE", (0x41, 0xD8E): "Neoverse-N3", (0x4E, 0x003): "Denver 2", (0x4E, 0x004): "Carmel",
    (0x51, 0x001): "Oryon", (0xC0, 0xAC3): "Ampere-1", (0xC0, 0xAC4): "Ampere-1a",
}  # fmt: skip


class Cluster(TypedDict):
    """Cores of one kind that share a clock."""

    cpus: str  # the kernel's list
    core: str | None  # its name
    capacity: int | None  # of the kernel: 1024 is the fastest core; None where all are alike
    governor: str | None
    min_hz: int | None  # as set
    max_hz: int | None
    hardware_max_hz: int | None
    current_hz: int | None


class MemoryNode(TypedDict):
    """A NUMA node."""

    cpus: str | None
    memory_bytes: int | None


def cpuinfo(root: Path) -> list[dict[str, str]]:
    """One dictionary per logical CPU; lines that stand apart (``Hardware``, ``Model``) are left out."""
    blocks = []
    for paragraph in (text(root / "proc/cpuinfo") or "").split("\n\n"):
        pairs = (line.partition(":") for line in paragraph.splitlines())
        block = {key.strip(): value.strip() for key, _, value in pairs}
        if "processor" in block:
            blocks.append(block)
    return blocks


def cpu_model(root: Path, cpus: list[dict[str, str]]) -> str | None:
    # Old ARM kernels print a "model name" that says no more than ARMv8.
    names: list[str | None] = [core_name(cpu) or _model_name(cpu) for cpu in cpus]
    if not any(names):
        names = [core_of_midr(text(path)) for path in glob(root / CPU, "cpu[0-9]*/regs/identification/midr_el1")]
    return " + ".join(unique(name for name in names if name)) or None


def _model_name(cpu: dict[str, str]) -> str | None:
    name, family, model = (cpu.get(key) for key in ("model name", "cpu family", "model"))
    # x86 only. Hypervisors call all generations "AMD EPYC": the numbers tell Zen 3 (25, 1) from Zen 5 (26, 2).
    return f"{name} (family {family}, model {model})" if name and family and model else name


def architecture(cpus: list[dict[str, str]]) -> str | None:
    if any("flags" in cpu for cpu in cpus):
        return "x86_64" if any("lm" in cpu.get("flags", "").split() for cpu in cpus) else "i686"
    return "aarch64" if any(cpu.get("CPU architecture") == "8" for cpu in cpus) else None


def isa(cpus: list[dict[str, str]]) -> list[str] | None:
    """Features that every CPU has: on a mixed SoC a kernel must run on all of them."""
    sets = [set((cpu.get("flags") or cpu.get("Features") or "").split()) for cpu in cpus]
    if not any(sets):
        return None
    return sorted(ISA_FEATURES[name] for name in set.intersection(*sets) if name in ISA_FEATURES)


def allowed(root: Path) -> list[int] | None:
    match = re.search(r"^Cpus_allowed_list:\s*(\S+)", text(root / "proc/self/status") or "", re.MULTILINE)
    return parse_cpu_list(match.group(1)) if match else None


def offline(root: Path) -> list[int] | None:
    """Return the CPUs that are switched off, as a power mode does; None where the kernel does not tell."""
    try:
        listed = (root / CPU / "offline").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return parse_cpu_list(listed)  # empty while all are on


def physical_cores(root: Path) -> int | None:
    cores = set()
    for topology in glob(root / CPU, "cpu[0-9]*/topology"):
        core = text(topology / "core_id")
        if core is not None:
            # core_id starts again in every package, and on older ARM kernels in every cluster.
            cores.add((text(topology / "physical_package_id"), text(topology / "cluster_id"), core))
    return len(cores) or None


def last_level_cache(root: Path) -> int | None:
    """Bytes of the caches of the highest level that the allowed CPUs reach, summed."""
    sizes: dict[tuple[int, str], int] = {}
    within = allowed(root)
    for index in glob(root / CPU, "cpu[0-9]*/cache/index[0-9]*"):
        if within is not None and int(index.parent.parent.name.removeprefix("cpu")) not in within:
            continue
        level, size = number(index / "level"), _kibibytes(text(index / "size"))
        if level and size and text(index / "type") != "Instruction":
            shared = first_text((index / "shared_cpu_list", index / "shared_cpu_map")) or ""
            sizes[level, shared] = size
    last = max((level for level, _ in sizes), default=None)
    return sum(size for (level, _), size in sizes.items() if level == last) or None


def policies(root: Path) -> list[Path]:
    """One directory per clock domain; without the policy view each CPU is its own."""
    return glob(root / CPU, "cpufreq/policy[0-9]*") or glob(root / CPU, "cpu[0-9]*/cpufreq")


def governor(root: Path) -> str | None:
    governors = [text(policy / "scaling_governor") for policy in policies(root)]
    return ", ".join(unique(name for name in governors if name)) or None


def clusters(root: Path, cpus: list[dict[str, str]]) -> list[Cluster] | None:
    """Tell the big and little cores of a mixed SoC apart, in the order of their first CPU."""
    counted = [cpu for cpu in cpus if re.fullmatch(r"[0-9]{1,5}", cpu["processor"])]
    names = {int(cpu["processor"]): core_name(cpu) or cpu.get("model name") for cpu in counted}
    domains = {cpu: policy for policy in policies(root) for cpu in _cpus_of(policy)}
    groups: dict[tuple[str | None, int | None, Path | int | None], list[int]] = {}
    for cpu, name in names.items():
        place = root / CPU / f"cpu{cpu}"
        name = name or core_of_midr(text(place / "regs/identification/midr_el1"))
        clock = _clock(domains.get(cpu))
        groups.setdefault((name, number(place / "cpu_capacity"), clock), []).append(cpu)
    clusters = [
        _cluster(members, name, capacity, domains.get(members[0])) for (name, capacity, _), members in groups.items()
    ]
    return sorted(clusters, key=lambda cluster: parse_cpu_list(cluster["cpus"])) or None


def numa_nodes(root: Path) -> list[MemoryNode] | None:
    """Return CPUs and bytes of each memory node; one node is uniform memory."""
    nodes: list[MemoryNode] = []
    for node in glob(root / "sys/devices/system/node", "node[0-9]*"):
        nodes.append({"cpus": text(node / "cpulist"), "memory_bytes": field(node / "meminfo", "MemTotal")})
    return nodes or None


def hertz(path: Path) -> int | None:
    """cpufreq's files are in kHz."""
    khz = number(path)
    return khz * 1000 if khz is not None else None


def unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _cluster(members: list[int], name: str | None, capacity: int | None, policy: Path | None) -> Cluster:
    def clock(file: str) -> int | None:
        return hertz(policy / file) if policy is not None else None

    return {
        "cpus": cpu_list(members),
        "core": name,
        "capacity": capacity,
        "governor": text(policy / "scaling_governor") if policy is not None else None,
        "min_hz": clock("scaling_min_freq"),
        "max_hz": clock("scaling_max_freq"),
        "hardware_max_hz": clock("cpuinfo_max_freq"),
        "current_hz": clock("scaling_cur_freq"),
    }


def _clock(policy: Path | None) -> Path | int | None:
    """Return what tells clusters apart: the clock they share, or the highest of each CPU's own (x86)."""
    if policy is None or len(_cpus_of(policy)) > 1:
        return policy
    return number(policy / "cpuinfo_max_freq")


def _cpus_of(policy: Path) -> list[int]:
    if listed := first_text((policy / "affected_cpus", policy / "related_cpus")):
        return parse_cpu_list(listed)
    return parse_cpu_list(policy.parent.name.removeprefix("cpu"))


def _kibibytes(size: str | None) -> int | None:
    match = re.fullmatch(r"(\d{1,9})([KM])", size or "")
    return int(match.group(1)) * {"K": 1 << 10, "M": 1 << 20}[match.group(2)] if match else None


def core_name(cpu: Mapping[str, str]) -> str | None:
    """Name the core of one paragraph of /proc/cpuinfo; an unknown part is named by its numbers, other CPUs are None."""
    try:
        return part_name(int(cpu["CPU implementer"], 16), int(cpu["CPU part"], 16))
    except (KeyError, ValueError):
        return None


def core_of_midr(text: str | None) -> str | None:
    """Name the core of sysfs' ``regs/identification/midr_el1``, such as ``0x00000000410fd421``; else None."""
    try:
        midr = int(text or "", 16)
    except ValueError:
        return None
    # Arm Architecture Reference Manual, MIDR_EL1: implementer in bits 31-24, part number in bits 15-4.
    return part_name(midr >> 24 & 0xFF, midr >> 4 & 0xFFF)


def part_name(implementer: int, part: int) -> str:
    """Return the name of a part, or its numbers where it is not in the table."""
    return PARTS.get((implementer, part), f"ARM implementer {implementer:#x} part {part:#x}")
