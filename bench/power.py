"""Energy of a measurement, from a sensor of the board that is read beside it.

What a sensor sees is its *scope*, and numbers of different scopes do not compare: ``module_input`` is all that the
module draws, ``rails_sum`` leaves out what no rail measures (on one board more than half of a wall meter's reading),
``package`` is the CPU with its caches. Rails are never summed where an input rail exists, which holds them all.
"""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.result import Energy

RATE_HZ = 10.0
INPUT_RAILS = ("VDD_IN", "VIN", "POM_5V_IN", "5V_IN")  # of Jetson modules, by label: numbers differ per release
NO_SENSOR = "no power sensor was found: neither INA3221 rails nor RAPL"
NOT_ALLOWED = "the kernel lets only root read RAPL: run as root, or allow reading energy_uj"


@dataclass(frozen=True)
class Sensor:
    """``read`` gives watts now, or, where it ``counts``, joules since some moment. It raises OSError or ValueError."""

    source: str
    scope: str  # as in bench.result.Energy
    read: Callable[[], float]
    counts: bool = False


def find_sensor(root: Path = Path("/")) -> tuple[Sensor | None, str | None]:
    """The sensor of widest scope below ``root``, or None and why."""
    rails = dict(_ina3221_hwmon(root)) or dict(_ina3221_iio(root))
    if rails:
        return _of_rails(rails), None
    return _rapl(root)


class Recorder:
    """Reads the sensor some ten times a second in a thread of its own, from ``with`` to its end.

    Runs beside the process that is measured, not inside, and costs it nothing but those reads. Times are those of
    ``time.monotonic``, which all processes of a Linux host share.
    """

    def __init__(
        self,
        root: Path = Path("/"),
        rate_hz: float = RATE_HZ,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``root`` holds the /sys that is read; without a sensor there is no thread."""
        self.sensor, self._missing = find_sensor(root)
        self._clock, self._period = clock, 1 / rate_hz
        self._times: list[float] = []
        self._values: list[float] = []
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="power", daemon=True)

    def __enter__(self) -> Recorder:
        """Start reading."""
        if self.sensor:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop reading; what was read stays."""
        self._ended.set()
        if self.sensor:
            self._thread.join()

    def take(self) -> None:
        """One reading now. A reading that fails is left out."""
        if self.sensor is None:
            return
        with self._lock:
            try:
                value = self.sensor.read()
            except (OSError, ValueError):
                return
            self._times.append(self._clock())
            self._values.append(value)

    def energy(
        self, start: float, end: float, idle: tuple[float, float] | None = None
    ) -> tuple[Energy | None, str | None]:
        """Joules from ``start`` to ``end``, or None and why.

        Power is integrated by the trapezoid rule between its readings, a counter's difference is taken; both are
        interpolated linearly at the ends of the window.

        Args:
            start, end: of the window, seconds of the recorder's clock.
            idle: such a window before the process began: its mean power is ``Energy.idle_w``.
        """
        if self.sensor is None:
            return None, self._missing
        self.take()  # so that the end of a window that has just closed is covered
        with self._lock:
            times, values = np.array(self._times), np.array(self._values)
        joules, count = self._joules(times, values, start, end)
        if joules is None:
            return (
                None,
                f"{count} power readings in {end - start:.2f} s of decode, 2 are the least: generate more tokens",
            )
        resting = self._joules(times, values, *idle)[0] if idle else None
        idle_w = None if idle is None or resting is None else resting / (idle[1] - idle[0])
        rate = count / (end - start)
        return Energy(joules, end - start, idle_w, self.sensor.scope, self.sensor.source, rate), None

    def _joules(
        self, times: NDArray[np.float64], values: NDArray[np.float64], start: float, end: float
    ) -> tuple[float | None, int]:
        """(joules, readings inside the window)."""
        inside = (times >= start) & (times <= end)
        count = int(inside.sum())
        if count < 2 or self.sensor is None:
            return None, count
        at_ends = np.interp([start, end], times, values)
        if self.sensor.counts:
            return float(at_ends[1] - at_ends[0]), count
        x = np.concatenate([[start], times[inside], [end]])
        y = np.concatenate([at_ends[:1], values[inside], at_ends[1:]])
        return float(np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2)), count

    def _run(self) -> None:
        while not self._ended.is_set():
            self.take()
            self._ended.wait(self._period)


def _of_rails(rails: dict[str, Callable[[], float]]) -> Sensor:
    for label in INPUT_RAILS:
        if label in rails:
            return Sensor(f"INA3221 {label}", "module_input", rails[label])
    reads = list(rails.values())
    return Sensor(f"INA3221 {' + '.join(rails)}", "rails_sum", lambda: sum(read() for read in reads))


def _ina3221_hwmon(root: Path) -> Iterator[tuple[str, Callable[[], float]]]:
    """(label, watts) of every connected rail, as JetPack 5 and newer show them: millivolts and milliamperes."""
    for named in sorted(root.glob("sys/bus/i2c/drivers/ina3221/*/hwmon/hwmon*/in*_label")):
        number = re.fullmatch(r"in(\d+)_label", named.name)
        label = named.read_text().strip()
        if number is None or not _connected(label):
            continue
        volts, amperes = named.with_name(f"in{number[1]}_input"), named.with_name(f"curr{number[1]}_input")
        if volts.exists() and amperes.exists():
            yield label, partial(_watts, volts, amperes)


def _ina3221_iio(root: Path) -> Iterator[tuple[str, Callable[[], float]]]:
    """The same as JetPack 4 shows them: milliwatts."""
    for named in sorted(root.glob("sys/bus/i2c/drivers/ina3221x/*/iio:device*/rail_name_*")):
        label, power = named.read_text().strip(), named.with_name(f"in_power{named.name.rpartition('_')[2]}_input")
        if _connected(label) and power.exists():
            yield label, partial(_watts, power)


def _connected(label: str) -> bool:
    return label not in ("", "NC") and "sum of shunt" not in label.lower()


def _rapl(root: Path) -> tuple[Sensor | None, str | None]:
    """All CPU packages together (Linux power capping framework; AMD's counters go by Intel's name)."""
    domains = [
        domain
        for domain in sorted(root.glob("sys/class/powercap/intel-rapl:*"))
        if (domain / "name").read_text().startswith("package")  # not its parts, nor psys, which holds it
    ]
    if not domains:
        return None, NO_SENSOR
    counters = [_Counter(domain) for domain in domains]
    sensor = Sensor("RAPL", "package", lambda: sum(counter.joules() for counter in counters), counts=True)
    try:
        sensor.read()
    except PermissionError:
        return None, NOT_ALLOWED
    return sensor, None


class _Counter:
    """An energy counter that starts again at its range: read more often than it wraps, which takes a minute or more."""

    def __init__(self, domain: Path) -> None:
        self._energy, self._range = domain / "energy_uj", domain / "max_energy_range_uj"
        self._last: int | None = None
        self._total = 0

    def joules(self) -> float:
        """Joules since the first call."""
        now = _integer(self._energy)
        if self._last is not None:
            # The counter goes from its range to 0 (powercap's documentation).
            self._total += now - self._last + (_integer(self._range) if now < self._last else 0)
        self._last = now
        return self._total * 1e-6


def _watts(*millis: Path) -> float:
    """Of milliwatts, or of millivolts and milliamperes."""
    return math.prod(_integer(path) * 1e-3 for path in millis)


def _integer(path: Path) -> int:
    return int(path.read_text())
