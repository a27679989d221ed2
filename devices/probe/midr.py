"""Names of arm64 cores, from the main ID register (MIDR_EL1) or from /proc/cpuinfo, which prints its fields."""

from __future__ import annotations

from collections.abc import Mapping

# (implementer, part number); from Linux arch/arm64/include/asm/cputype.h and Arm's technical reference manuals.
PARTS = {
    (0x41, 0xD03): "Cortex-A53",
    (0x41, 0xD04): "Cortex-A35",
    (0x41, 0xD05): "Cortex-A55",
    (0x41, 0xD06): "Cortex-A65",
    (0x41, 0xD07): "Cortex-A57",
    (0x41, 0xD08): "Cortex-A72",
    (0x41, 0xD09): "Cortex-A73",
    (0x41, 0xD0A): "Cortex-A75",
    (0x41, 0xD0B): "Cortex-A76",
    (0x41, 0xD0C): "Neoverse-N1",
    (0x41, 0xD0D): "Cortex-A77",
    (0x41, 0xD0E): "Cortex-A76AE",
    (0x41, 0xD40): "Neoverse-V1",
    (0x41, 0xD41): "Cortex-A78",
    (0x41, 0xD42): "Cortex-A78AE",
    (0x41, 0xD44): "Cortex-X1",
    (0x41, 0xD46): "Cortex-A510",
    (0x41, 0xD47): "Cortex-A710",
    (0x41, 0xD48): "Cortex-X2",
    (0x41, 0xD49): "Neoverse-N2",
    (0x41, 0xD4B): "Cortex-A78C",
    (0x41, 0xD4C): "Cortex-X1C",
    (0x41, 0xD4D): "Cortex-A715",
    (0x41, 0xD4E): "Cortex-X3",
    (0x41, 0xD4F): "Neoverse-V2",
    (0x41, 0xD80): "Cortex-A520",
    (0x41, 0xD81): "Cortex-A720",
    (0x41, 0xD82): "Cortex-X4",
    (0x41, 0xD83): "Neoverse-V3AE",
    (0x41, 0xD84): "Neoverse-V3",
    (0x41, 0xD85): "Cortex-X925",
    (0x41, 0xD87): "Cortex-A725",
    (0x41, 0xD88): "Cortex-A520AE",
    (0x41, 0xD89): "Cortex-A720AE",
    (0x41, 0xD8E): "Neoverse-N3",
    (0x4E, 0x003): "Denver 2",
    (0x4E, 0x004): "Carmel",
    (0x51, 0x001): "Oryon",
    (0xC0, 0xAC3): "Ampere-1",
    (0xC0, 0xAC4): "Ampere-1a",
}


def core_name(cpu: Mapping[str, str]) -> str | None:
    """The core of one paragraph of /proc/cpuinfo; an unknown part is named by its numbers, other CPUs are None."""
    try:
        return part_name(int(cpu["CPU implementer"], 16), int(cpu["CPU part"], 16))
    except (KeyError, ValueError):
        return None


def core_of_midr(text: str | None) -> str | None:
    """The core of sysfs' ``regs/identification/midr_el1``, such as ``0x00000000410fd421``; None for anything else."""
    try:
        midr = int(text or "", 16)
    except ValueError:
        return None
    # Arm Architecture Reference Manual, MIDR_EL1: implementer in bits 31-24, part number in bits 15-4.
    return part_name(midr >> 24 & 0xFF, midr >> 4 & 0xFFF)


def part_name(implementer: int, part: int) -> str:
    """The name of a part, or its numbers where it is not in the table."""
    return PARTS.get((implementer, part), f"ARM implementer {implementer:#x} part {part:#x}")
