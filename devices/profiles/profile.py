"""What is known of a board before it is measured: facts with unit, source and level, one TOML file a device.

A profile never holds an expected speed: the same board moves by 1.2-4x with power mode, memory and firmware. It holds
what a ceiling can be computed from, and says how sure that is.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, cast, get_args

from devices.common.errors import UserError
from devices.probe.cpu import FEATURES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROFILES = Path(__file__).parent

Level = Literal["vendor", "measured", "computed", "unknown"]

# Every number a profile may hold, and its unit (base units; 1 is a count).
UNITS = {
    "cores": "1",
    "big_cores": "1",  # of a mixed SoC: more threads than these cost speed
    "max_frequency": "Hz",
    "memory_bandwidth": "B/s",  # the interface's peak: the ceiling
    "copy_bandwidth": "B/s",  # reported from copy benchmarks; reading alone may be faster
    "decode_bandwidth": "B/s",  # reported bytes per token x tokens per second
    "memory_capacity": "B",
    "memory_smallest": "B",  # of a board that is sold with several sizes
    "memory_largest": "B",
    "memory_visible": "B",  # MemTotal of a running system: the firmware keeps the rest
    "last_level_cache": "B",
}

ARCHITECTURES = ("aarch64", "x86_64")


class DeviceError(UserError):
    """A device or profile that cannot be used; the message names the file and key and what is allowed."""


@dataclass(frozen=True)
class Number:
    """One number of a profile; ``value`` is None where ``level`` is unknown."""

    value: float | None
    unit: str
    source: str
    level: Level


@dataclass(frozen=True)
class Runtime:
    """What installs there with the system's own Python: versions as text."""

    onnxruntime: str
    python: str
    system: str
    source: str
    level: Level


@dataclass(frozen=True)
class Profile:
    """One device, or a class of them.

    Attributes:
        compatible: names in the board's device tree that mean this device; none on x86.
        cuda: the GPU's architecture, such as ``sm_87``; None is no GPU that CUDA runs on.
        runtime: None where that is not known.
        isa: features that decide which kernels run, named as :func:`devices.probe.host.probe` names them.
        lacks: features it is known not to have; one that is in neither is not known.
        power_modes: names as the board's own tool prints them, with the id where it has one.
        notes: what a person has to know before trusting a measurement there.
    """

    name: str
    title: str
    architecture: str
    cpu: str
    gpu: str | None
    isa: tuple[str, ...]
    lacks: tuple[str, ...]
    power_modes: tuple[str, ...]
    notes: tuple[str, ...]
    numbers: dict[str, Number]
    compatible: tuple[str, ...] = ()
    cuda: str | None = None
    runtime: Runtime | None = None


def load_profiles(directory: Path = PROFILES) -> dict[str, Profile]:
    """All profiles, by name.

    Raises:
        DeviceError: a file that is not a valid profile.
    """
    return {path.stem: read_profile(path) for path in sorted(directory.glob("*.toml"))}


def load_profile(name: str, directory: Path = PROFILES) -> Profile:
    """One profile.

    Raises:
        DeviceError: no such device; lists those with a near name, or all.
    """
    names = sorted(path.stem for path in directory.glob("*.toml"))
    if name not in names:
        near = [other for other in names if name and name.lower() in other]
        near = near or get_close_matches(name.lower().replace("_", "-").replace(" ", "-"), names, n=4)
        if near:
            raise DeviceError(f"no device {name!r}: is it {' or '.join(near)}? `saap devices list` names all")
        raise DeviceError(f"no device {name!r}: choose one of {', '.join(names)}")
    return read_profile(directory / f"{name}.toml")


def profile_of(compatible: Iterable[str] | None, profiles: Mapping[str, Profile]) -> str | None:
    """The profile of the board with these device tree names, which come most exact first; None without one."""
    for wanted in compatible or ():
        for name, profile in profiles.items():
            if wanted in profile.compatible:
                return name
    return None


def read_profile(path: Path) -> Profile:
    """Read and check one file.

    Raises:
        DeviceError: naming the file, the key and what is allowed.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # also of an integer with thousands of digits
        raise DeviceError(f"{path} is not TOML ({error}): mend it") from None
    allowed = {field.name for field in fields(Profile)} - {"name"}
    _only(raw, allowed, f"{path}")
    architecture = _string(raw, "architecture", path)
    if architecture not in ARCHITECTURES:
        raise DeviceError(f"{path}: architecture is {architecture!r}, allowed are {', '.join(ARCHITECTURES)}")
    numbers = raw.get("numbers", {})
    if not isinstance(numbers, dict):
        raise DeviceError(f"{path}: numbers must be a table")
    isa, lacks = _features(raw, path)
    return Profile(
        name=path.stem,
        title=_string(raw, "title", path),
        architecture=architecture,
        cpu=_string(raw, "cpu", path),
        gpu=_string(raw, "gpu", path) if "gpu" in raw else None,
        isa=isa,
        lacks=lacks,
        power_modes=_strings(raw, "power_modes", path),
        notes=_strings(raw, "notes", path),
        numbers={key: _number(path, key, entry) for key, entry in numbers.items()},
        compatible=_strings(raw, "compatible", path),
        cuda=_cuda(raw, path),
        runtime=_runtime(raw, path),
    )


def _features(raw: dict[str, Any], path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    isa, lacks = _strings(raw, "isa", path), _strings(raw, "lacks", path)
    if both := set(isa) & set(lacks):
        raise DeviceError(f"{path}: {', '.join(sorted(both))} stands in isa and in lacks: keep one")
    if unknown := sorted({*isa, *lacks} - FEATURES):
        raise DeviceError(f"{path}: {', '.join(unknown)} is no feature, allowed are {', '.join(sorted(FEATURES))}")
    return isa, lacks


def _cuda(raw: dict[str, Any], path: Path) -> str | None:
    if "cuda" not in raw:
        return None
    if not re.fullmatch(r"sm_\d{2,3}", str(raw["cuda"])):
        raise DeviceError(f"{path}: cuda is {raw['cuda']!r}, write it as 'sm_87'")
    return str(raw["cuda"])


def _runtime(raw: dict[str, Any], path: Path) -> Runtime | None:
    if "runtime" not in raw:
        return None
    table, where = raw["runtime"], f"{path}: runtime"
    if not isinstance(table, dict):
        raise DeviceError(f"{where} must be a table of {', '.join(field.name for field in fields(Runtime))}")
    names = [field.name for field in fields(Runtime)]
    _only(table, set(names), where)
    for name in names:
        if not isinstance(table.get(name), str) or not table[name].strip():
            raise DeviceError(f"{where}.{name} must be a text, it is {table.get(name)!r}")
    if table["level"] not in get_args(Level):
        raise DeviceError(f"{where}.level is {table['level']!r}, allowed are {', '.join(get_args(Level))}")
    if not re.fullmatch(r"\d+(\.\d+)+", table["onnxruntime"]):
        raise DeviceError(f"{where}.onnxruntime is {table['onnxruntime']!r}, write a version such as '1.23.2'")
    return Runtime(**table)


def _number(path: Path, key: str, entry: Any) -> Number:
    where = f"{path}: numbers.{key}"
    if key not in UNITS:
        raise DeviceError(f"{where} is not known, allowed are {', '.join(UNITS)}")
    if not isinstance(entry, dict):
        raise DeviceError(f"{where} must be a table of value, unit, source and level")
    _only(entry, {field.name for field in fields(Number)}, where)
    level, value, unit, source = (entry.get(name) for name in ("level", "value", "unit", "source"))
    if level not in get_args(Level):
        raise DeviceError(f"{where}.level is {level!r}, allowed are {', '.join(get_args(Level))}")
    if unit != UNITS[key]:
        raise DeviceError(f"{where}.unit is {unit!r}, it must be {UNITS[key]!r}")
    if not isinstance(source, str) or not source.strip():
        raise DeviceError(f"{where}.source must say where the number comes from")
    if (value is None) != (level == "unknown"):
        raise DeviceError(f"{where}: a value is left out where level is unknown, and only there")
    if value is not None and not _positive(value):
        raise DeviceError(f"{where}.value is {value!r}, it must be a positive number")
    return Number(value, UNITS[key], source, cast(Level, level))


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _only(table: dict[str, Any], allowed: set[str], where: str) -> None:
    if unknown := sorted(set(table) - allowed):
        raise DeviceError(f"{where} has {', '.join(unknown)}, allowed are {', '.join(sorted(allowed))}")


def _string(raw: dict[str, Any], key: str, path: Path) -> str:
    value = raw.get(key)
    if not isinstance(value, str) or not value.strip():
        raise DeviceError(f"{path}: {key} must be a text, it is {value!r}")
    return value


def _strings(raw: dict[str, Any], key: str, path: Path) -> tuple[str, ...]:
    value = raw.get(key, [])
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise DeviceError(f"{path}: {key} must be a list of texts, it is {value!r}")
    return tuple(value)
