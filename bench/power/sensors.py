"""Power sensors that are files: INA3221 monitors of Jetson boards in both layouts, and the CPU's counters (RAPL)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from saap.base.tree import text

RATE_HZ = 10.0  # an INA3221 with NVIDIA's averaging has a new value more often than that; RAPL every millisecond
INPUT_RAILS = ("VDD_IN", "VIN", "POM_5V_IN", "5V_IN")  # of Jetson modules, by label: numbers differ per release
NO_SENSOR = "no power sensor was found: neither INA3221 rails, tegrastats, a Raspberry Pi 5's power chip nor RAPL"
NOT_ALLOWED = "the kernel lets only root read RAPL: run as root, or allow reading energy_uj"

Lookup = tuple["Sensor | None", str | None]  # a sensor, or None and why there is none; no reason: no such hardware
Reading = Callable[[], float]


class Stream(Protocol):
    """Watts as a program reports them."""

    def __iter__(self) -> Iterator[float]: ...

    def close(self) -> None:
        """End it, also from another thread than the one that reads."""


@dataclass(frozen=True)
class Energy:
    """Energy of one decode window. ``idle_w`` was taken before the run, and is never subtracted."""

    decode_j: float
    window_s: float
    idle_w: float | None
    scope: str  # what the sensor sees: module_input | rails_sum | package | pmic_rails | wall | estimate
    source: str  # the sensor's name
    rate_hz: float  # readings per second in the window
    estimate: bool = False  # whether it stands for more than was measured


@dataclass(frozen=True)
class Sensor:
    """Either ``read`` or ``follow`` gives power; both raise OSError where they cannot, ``read`` ValueError too."""

    source: str  # its name
    scope: str  # as in Energy
    covers: str  # what the number holds and what it lacks, in words
    read: Reading | None = None  # watts now, or, where it ``counts``, joules since some moment
    follow: Callable[[], Stream] | None = None  # starts a stream of watts
    rate_hz: float = RATE_HZ  # readings that are possible without disturbing what is measured
    counts: bool = False
    estimate: bool = False  # the number stands for more than was measured
    passed_over: tuple[str, ...] = ()  # why sensors that are trusted more, or some of its rails, were not used


def ina3221(root: Path) -> Lookup:
    """Rails of a Jetson board: its input rail, else the sum of all."""
    places = [*_hwmon(root), *_ina238(root)] or list(_iio(root))
    rails: dict[str, Reading] = {}
    refused: list[str] = []
    for label, read in places:
        try:
            read()
        except (OSError, ValueError) as error:  # also a channel that is switched off
            why = error.strerror if isinstance(error, OSError) and error.strerror else "no number"
            refused.append(f"INA3221 rail {label} cannot be read ({why})")
        else:
            rails.setdefault(label, read)
    if not rails:
        return None, "; ".join(refused) or None
    labels = of_rails(rails)
    source = f"INA3221 {' + '.join(labels)}"
    reads = [rails[label] for label in labels]
    scope, covers = scope_of(labels)
    sensor = Sensor(source, scope, covers, lambda: sum(read() for read in reads), passed_over=tuple(refused))
    return sensor, None


def of_rails(rails: Mapping[str, object]) -> list[str]:
    """Labels to add up: the input rail alone where there is one, which holds all others."""
    return next(([label] for label in INPUT_RAILS if label in rails), list(rails))


def is_input(labels: Sequence[str]) -> bool:
    return len(labels) == 1 and labels[0] in INPUT_RAILS


def scope_of(labels: Sequence[str]) -> tuple[str, str]:
    """(scope, words) of the rails that ``of_rails`` chose."""
    if is_input(labels):
        covered = "the board with its carrier" if labels[0] == "VIN" else "the module; not its carrier board"
        return "module_input", f"all that goes in at {labels[0]}: {covered}"
    return "rails_sum", f"the rails {', '.join(labels)}; what no rail measures is missing"


def _connected(label: str) -> bool:
    """Whether a label names a rail: not a free channel, nor the chip's sum of shunt voltages."""
    return label not in ("", "NC") and "sum of shunt" not in label.lower()


def rapl(root: Path) -> Lookup:
    """All CPU packages together (Linux power capping framework; AMD's counters go by Intel's name)."""
    domains = [
        domain
        for domain in sorted(root.glob("sys/class/powercap/intel-rapl:*"))
        if (text(domain / "name") or "").startswith("package")  # not its parts, nor psys, which holds it
    ]
    if not domains:
        return None, None
    try:
        counters = [_Counter(domain) for domain in domains]
        sum(counter.joules() for counter in counters)
    except PermissionError:
        return None, NOT_ALLOWED
    except (OSError, ValueError):
        return None, "RAPL is there, but its counters cannot be read"
    covers = "CPU packages with their caches and memory controllers; neither memory chips nor the board"
    return Sensor("RAPL", "package", covers, lambda: sum(counter.joules() for counter in counters), counts=True), None


class _Counter:
    """An energy counter that starts again at its range: read more often than it wraps, which takes a minute or more."""

    def __init__(self, domain: Path) -> None:
        self._energy, self._range = domain / "energy_uj", _integer(domain / "max_energy_range_uj")
        self._last: int | None = None
        self._total = 0

    def joules(self) -> float:
        """Return the joules since the first call."""
        now = _integer(self._energy)
        if self._last is not None:
            # The counter goes from its range to 0 (powercap's documentation).
            self._total += now - self._last + (self._range if now < self._last else 0)
        self._last = now
        return self._total * 1e-6


def _hwmon(root: Path) -> Iterator[tuple[str, Reading]]:
    """(label, watts) of every connected rail, as JetPack 5 and newer show them: millivolts and milliamperes."""
    for named in sorted(root.glob("sys/bus/i2c/drivers/ina3221/*/hwmon/hwmon*/in*_label")):
        number, label = re.fullmatch(r"in(\d+)_label", named.name), text(named)
        if number is None or label is None or not _connected(label):
            continue
        volts, amperes = named.with_name(f"in{number[1]}_input"), named.with_name(f"curr{number[1]}_input")
        if volts.exists() and amperes.exists():
            yield label, partial(_watts, volts, amperes)


def _ina238(root: Path) -> Iterator[tuple[str, Reading]]:
    """Yield the input of Thor's board, in microwatts (kernel documentation of hwmon/ina238); only beside an INA3221."""
    beside = next(root.glob("sys/bus/i2c/drivers/ina3221/*/hwmon"), None)
    power = next(root.glob("sys/bus/i2c/drivers/ina238/*/hwmon/hwmon*/power1_input"), None)
    if beside is not None and power is not None:
        yield "VIN", lambda: _integer(power) * 1e-6


def _iio(root: Path) -> Iterator[tuple[str, Reading]]:
    """Yield the rails as JetPack 4 shows them, in milliwatts."""
    for named in sorted(root.glob("sys/bus/i2c/drivers/ina3221x/*/iio:device*/rail_name_*")):
        label, power = text(named), named.with_name(f"in_power{named.name.rpartition('_')[2]}_input")
        if label is not None and _connected(label) and power.exists():
            yield label, partial(_watts, power)


def _watts(*millis: Path) -> float:
    """Watts from milliwatts, or from millivolts and milliamperes."""
    return math.prod(_integer(path) * 1e-3 for path in millis)


def _integer(path: Path) -> int:
    return int(path.read_text())
