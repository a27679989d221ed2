"""Known facts of boards before they are measured, with unit, source and level: one TOML file a device.

A profile never holds an expected speed: the same board moves by 1.2-4x with power mode, memory and firmware. It holds
what a ceiling can be computed from, and says how sure that is.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from devices.probe.cpu import FEATURES
from saap.base.documents import unknown_fields
from saap.base.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROFILES = Path(__file__).parent

T = TypeVar("T")
Text = Annotated[str, Meta(pattern=r"\S")]  # something that can be read
Level = Annotated[str, Meta(pattern="^(vendor|measured|computed|unknown)$")]

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


class DeviceError(UserError):
    """A device or profile that cannot be used; the message names the file and key and what is allowed."""


@dataclass(frozen=True, kw_only=True)
class Number:
    """One number of a profile; ``value`` is None where ``level`` is unknown."""

    value: Annotated[int, Meta(gt=0)] | Annotated[float, Meta(gt=0)] | None = None
    unit: str
    source: Text
    level: Level


@dataclass(frozen=True)
class Runtime:
    """The versions that install there with the system's own Python, as text."""

    onnxruntime: Annotated[str, Meta(pattern=r"^\d+(\.\d+)+$")]
    python: Text
    system: Text
    source: Text
    level: Level


@dataclass(frozen=True)
class Profile:
    """One device, or a class of them.

    Attributes:
        cuda: the GPU's architecture, such as ``sm_87``; None is no GPU that CUDA runs on.
        isa: features that decide which kernels run, named as :func:`devices.probe.host.probe` names them.
    """

    name: str
    title: Text
    architecture: Annotated[str, Meta(pattern="^(aarch64|x86_64)$")]
    cpu: Text
    gpu: Text | None = None
    isa: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()  # features it is known not to have; one that is in neither is not known
    power_modes: tuple[str, ...] = ()  # names as the board's own tool prints them, with the id where it has one
    notes: tuple[str, ...] = ()  # what a person has to know before trusting a measurement there
    numbers: dict[str, Number] = field(default_factory=dict)
    compatible: tuple[str, ...] = ()  # names in the board's device tree that mean this device; none on x86
    cuda: Annotated[str, Meta(pattern=r"^sm_\d{2,3}$")] | None = None
    runtime: Runtime | None = None  # None where that is not known

    @property
    def sustained(self) -> Number | None:
        """The bandwidth that was reported of decoding, else of copying; None where nobody reported one."""
        return self.numbers.get("decode_bandwidth") or self.numbers.get("copy_bandwidth")


def load_profiles(directory: Path = PROFILES) -> dict[str, Profile]:
    """All profiles, by name. Raises DeviceError: a file that is not a valid profile."""
    return {path.stem: read_profile(path) for path in sorted(directory.glob("*.toml"))}


def profile_names(directory: Path = PROFILES) -> list[str]:
    return sorted(path.stem for path in directory.glob("*.toml"))


def load_profile(name: str, directory: Path = PROFILES) -> Profile:
    """One profile. Raises DeviceError: no such device; lists those with a near name, or all."""
    names = profile_names(directory)
    if name not in names:
        near = [other for other in names if name and name.lower() in other]
        near = near or get_close_matches(name.lower().replace("_", "-").replace(" ", "-"), names, n=4)
        if near:
            raise DeviceError(f"no device {name!r}: is it {' or '.join(near)}? `saap devices list` names all")
        raise DeviceError(f"no device {name!r}: choose one of {', '.join(names)}")
    return read_profile(directory / f"{name}.toml")


def profile_of(compatible: Iterable[str] | None, profiles: Mapping[str, Profile]) -> str | None:
    """Return the profile of the board with these device tree names, which come most exact first; None without one."""
    for model in compatible or ():
        for name, profile in profiles.items():
            if model in profile.compatible:
                return name
    return None


def read_profile(path: Path) -> Profile:
    """Read and check one file. Raises DeviceError: naming the file, the key and what is allowed."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # also of an integer with thousands of digits
        raise DeviceError(f"{path} is not TOML ({error}): mend it") from None
    numbers = _converted(raw.get("numbers", {}), dict[str, object], f"{path}: numbers")
    quantities = {key: _number(key, entry, f"{path}: numbers.{key}") for key, entry in numbers.items()}
    if "runtime" in raw:
        raw["runtime"] = _converted(raw["runtime"], Runtime, f"{path}: runtime")
    profile = _converted({**raw, "name": path.stem, "numbers": quantities}, Profile, f"{path}")
    if both := set(profile.isa) & set(profile.lacks):
        raise DeviceError(f"{path}: {', '.join(sorted(both))} stands in isa and in lacks: keep one")
    if unknown := sorted({*profile.isa, *profile.lacks} - FEATURES):
        raise DeviceError(f"{path}: {', '.join(unknown)} is no feature, allowed are {', '.join(sorted(FEATURES))}")
    return profile


def _number(key: str, entry: object, where: str) -> Number:
    if key not in UNITS:
        raise DeviceError(f"{where} is not known, allowed are {', '.join(UNITS)}")
    number = _converted(entry, Number, where)
    if number.unit != UNITS[key]:
        raise DeviceError(f"{where}.unit is {number.unit!r}, it must be {UNITS[key]!r}")
    if (number.value is None) != (number.level == "unknown"):
        raise DeviceError(f"{where}: a value is left out where level is unknown, and only there")
    if number.value is not None and not math.isfinite(number.value):
        raise DeviceError(f"{where}.value is {number.value}, it must be a positive number")
    return number


def _converted(raw: object, kind: type[T], where: str) -> T:
    if isinstance(raw, dict) and is_dataclass(kind) and (unknown := unknown_fields(raw, kind)):
        allowed = sorted(each.name for each in fields(kind))
        raise DeviceError(f"{where} has {', '.join(unknown)}, allowed are {', '.join(allowed)}")
    try:
        return msgspec.convert(raw, kind)
    except ValueError as error:
        raise DeviceError(f"{where}: {error}") from None
