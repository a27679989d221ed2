"""Energy of a measurement, from a sensor of the board that is read beside it.

What a sensor sees is its *scope*, and numbers of different scopes do not compare. docs/board.md lists the sensors in
the order in which they are trusted, with their scopes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.power.commands import Commands, pmic, tegrastats
from bench.power.sensors import NO_SENSOR, Energy, Lookup, Stream, ina3221, rapl

SILENCE = 5  # times the usual distance of readings; a longer gap is one ...
SILENT_SHARE = 0.1  # ... where it is also more than this share of the window


def find_sensor(root: Path = Path("/"), commands: Commands | None = None) -> Lookup:
    """Return the most trusted sensor below ``root`` that can be read, or None and why.

    Args:
        root: holds the /sys that is read.
        commands: runs the programs that tell power; None: those of this host, and none for a recorded tree.
    """
    if commands is None and root.resolve() == Path("/"):
        commands = Commands()
    programs = [] if commands is None else [partial(tegrastats, commands), partial(pmic, commands)]
    reasons: list[str] = []
    for look in (partial(ina3221, root), *programs, partial(rapl, root)):
        sensor, reason = look()
        if sensor is not None:
            return replace(sensor, passed_over=(*reasons, *sensor.passed_over)), None
        reasons += [reason] if reason else []
    return None, "; ".join(reasons) or NO_SENSOR


class Recorder:
    """Reads the sensor at its rate in a thread of its own, from ``with`` to its end.

    Runs beside the process that is measured, not inside, and costs it nothing but those reads. Times are those of
    ``time.monotonic``, which all processes of a Linux host share.
    """

    def __init__(
        self,
        root: Path = Path("/"),
        rate_hz: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        commands: Commands | None = None,
    ) -> None:
        """``root`` and ``commands`` as in ``find_sensor``; without a sensor there is no thread."""
        self.sensor, self._missing = find_sensor(root, commands)
        self._clock = clock
        self._period = 1 / (rate_hz or (self.sensor.rate_hz if self.sensor else 1.0))
        self._times: list[float] = []
        self._values: list[float] = []
        self._stream: Stream | None = None
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="power", daemon=True)

    def __enter__(self) -> Recorder:
        if self.sensor and self.sensor.follow:
            try:
                self._stream = self.sensor.follow()
            except OSError as error:
                self._missing = f"{self.sensor.source} cannot be started ({error})"
                self.sensor = None
        if self.sensor:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._stream is not None:
            self._stream.close()
        if self.sensor:
            self._thread.join()

    def facts(self) -> dict[str, object]:
        """Describe the sensor for a result: source, scope, covers, rate_hz, estimate, and why not something better."""
        if self.sensor is None:
            return {"source": None, "reasons": [self._missing]}
        kept = {name: getattr(self.sensor, name) for name in ("source", "scope", "covers", "rate_hz", "estimate")}
        return {**kept, "reasons": list(self.sensor.passed_over)}

    def take(self) -> None:
        """One reading now. A reading that fails is left out, and a stream gives its own."""
        if self.sensor is None or self.sensor.read is None:
            return
        with self._lock:
            try:
                value = self.sensor.read()
            except (OSError, ValueError):
                return
            self._keep(value)

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
        joules, reason = window_joules(times, values, start, end, self.sensor.counts)
        if joules is None:
            return None, reason
        resting = window_joules(times, values, *idle, self.sensor.counts)[0] if idle else None
        return Energy(
            decode_j=joules,
            window_s=end - start,
            idle_w=None if idle is None or resting is None else resting / (idle[1] - idle[0]),
            scope=self.sensor.scope,
            source=self.sensor.source,
            rate_hz=float(np.sum((times >= start) & (times <= end))) / (end - start),
            estimate=self.sensor.estimate,
        ), None

    def _run(self) -> None:
        if self._stream is not None:
            for watts in self._stream:
                with self._lock:
                    self._keep(watts)
            return
        while not self._ended.is_set():
            self.take()
            self._ended.wait(self._period)

    def _keep(self, value: float) -> None:
        self._times.append(self._clock())
        self._values.append(value)


def window_joules(
    times: NDArray[np.float64], values: NDArray[np.float64], start: float, end: float, counts: bool
) -> tuple[float | None, str | None]:
    """Joules of a window, or None and why.

    Args:
        times: seconds, ascending.
        values: watts at those times, or joules of a counter.
        start, end: of the window.
        counts: whether the values are a counter's.
    """
    inside = (times >= start) & (times <= end)
    count = int(inside.sum())
    if count < 2:
        return None, f"{count} power readings in {end - start:.2f} s of decode, 2 are the least: generate more tokens"
    x = np.concatenate([[start], times[inside], [end]])
    silent, usual = float(np.max(np.diff(x))), float(np.median(np.diff(times)))
    if silent > max(SILENCE * usual, SILENT_SHARE * (end - start)):
        return None, f"the power sensor was silent for {silent:.2f} s of {end - start:.2f} s of decode"
    at_ends = np.interp([start, end], times, values)
    y = np.concatenate([at_ends[:1], values[inside], at_ends[1:]])
    joules = float(y[-1] - y[0]) if counts else float(np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2))
    if joules <= 0:  # a counter that a hypervisor keeps at zero, an unconnected rail
        return None, f"the power sensor told {joules:g} J in {end - start:.2f} s of decode: it does not work here"
    return joules, None
