"""Power sensors that are told by a program: tegrastats on Jetson boards, vcgencmd on a Raspberry Pi 5.

A program costs the board that is measured more than reading a file does, so these come after files.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Generator, Iterator, Sequence

from bench.power.sensors import Lookup, Sensor, is_input, of_rails, scope_of
from devices.probe.tegrastats import parse_tegrastats

INTERVAL_MS = 100
PMIC_RATE_HZ = 2.0  # every reading starts a process
ANSWER_S = 3.0  # a healthy board answers in a fraction of it
MOST_LINE = 1 << 16
LINES_TO_TRY = 3  # the first one may lack its power

_ADC = re.compile(r"^\s*(\w+)_([AV])\s+(?:current|volt)\(\d+\)=(\d+(?:\.\d+)?)[AV]\s*$", re.MULTILINE | re.ASCII)


class Commands:
    """Runs programs without a shell. ``path`` is searched for them, in the form of $PATH, which is the default."""

    def __init__(self, path: str | None = None) -> None:
        self._path = path

    def find(self, name: str) -> str | None:
        return shutil.which(name, path=self._path)

    def run(self, command: Sequence[str]) -> str:
        """Return the program's output. OSError, whose message is its last line, where it fails or takes too long."""
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=ANSWER_S
            )
        except subprocess.TimeoutExpired:
            raise OSError(f"no answer within {ANSWER_S:g} s") from None
        text = done.stdout.decode(errors="replace")
        if done.returncode:
            raise OSError((text.strip().splitlines() or [f"exit {done.returncode}"])[-1][:200])
        return text

    def start(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start a program whose lines are read while it runs."""
        nothing = subprocess.DEVNULL
        return subprocess.Popen(command, stdin=nothing, stdout=subprocess.PIPE, stderr=nothing, start_new_session=True)


def tegrastats(commands: Commands) -> Lookup:
    program = commands.find("tegrastats")
    if program is None:
        return None, None
    command = [program, "--interval", str(INTERVAL_MS)]
    try:
        labels = _labels(commands.start(command))
    except OSError as error:
        return None, f"tegrastats cannot be started ({error.strerror or error})"
    if not labels:
        return None, f"tegrastats printed no power within {ANSWER_S:g} s"
    scope, covers = scope_of(labels)
    sensor = Sensor(
        f"tegrastats {' + '.join(labels)}",
        scope,
        covers,
        follow=lambda: TegrastatsStream(commands.start(command), labels),
        rate_hz=1000 / INTERVAL_MS,
    )
    return sensor, None


class TegrastatsStream:
    """Watts of the chosen rails, one number per line that has all of them."""

    def __init__(self, process: subprocess.Popen[bytes], labels: Sequence[str]) -> None:
        self._process, self._labels = process, labels

    def __iter__(self) -> Iterator[float]:
        for line in _lines(self._process):
            rails = parse_tegrastats(line).rails
            if all(label in rails for label in self._labels):  # the sum of the others would be another number
                yield sum(rails[label].now_w for label in self._labels)

    def close(self) -> None:
        """End the process; an iteration that runs in another thread ends with it."""
        end(self._process)


def pmic(commands: Commands) -> Lookup:
    """Read the rails of a Raspberry Pi 5's power chip, whose input current is not measured."""
    program = commands.find("vcgencmd")
    if program is None:
        return None, None

    def read() -> float:
        return pmic_watts(commands.run([program, "pmic_read_adc"]))

    try:
        read()
    except OSError as error:
        return None, f"vcgencmd pmic_read_adc failed ({error}): on a Raspberry Pi 5, the group video may read it"
    except ValueError:
        return None, "vcgencmd pmic_read_adc tells no power here: only the power chip of a Raspberry Pi 5 measures it"
    covers = "the rails of the power chip; what hangs on 5 V (USB, HATs, its own losses) is missing"
    return Sensor("PMIC", "pmic_rails", covers, read, rate_hz=PMIC_RATE_HZ, estimate=True), None


def pmic_watts(text: str) -> float:
    """Sum of volts times amperes over the rails that have both; ValueError without any."""
    values = {(name, unit): float(number) for name, unit, number in _ADC.findall(text)}
    products = [amperes * values[name, "V"] for (name, unit), amperes in values.items()
                if unit == "A" and (name, "V") in values]  # fmt: skip
    if not products:
        raise ValueError("no rail with volts and amperes")
    return sum(products)


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process of ``Commands.start`` and what it started, and wait for it."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _lines(process: subprocess.Popen[bytes]) -> Generator[bytes, None, None]:
    assert process.stdout is not None
    with process.stdout as stdout:
        while (line := stdout.readline(MOST_LINE)).endswith(b"\n"):
            yield line


def _labels(process: subprocess.Popen[bytes]) -> list[str]:
    """Return those rails of a starting tegrastats that count; empty: it printed none in time. The process is ended.

    Thor leaves its input rail out of some lines: one without it is not the last word.
    """
    labels: list[str] = []
    timer = threading.Timer(ANSWER_S, end, [process])
    timer.start()
    try:
        with contextlib.closing(_lines(process)) as lines:
            for line in itertools.islice(lines, LINES_TO_TRY):
                rails = of_rails(parse_tegrastats(line).rails)
                if not labels or is_input(rails):
                    labels = rails
                if is_input(labels):
                    break
        return labels
    finally:
        timer.cancel()
        timer.join()
        end(process)
