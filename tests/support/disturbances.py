"""What disturbs a measurement on a real host, begun in the middle of a bench run, and what the bench then says."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from bench.measure import BenchOptions, measure
from bench.measure.result import INVALID, OK, WARN

SPIN = "print(flush=True)\nwhile True: pass"
HOG = """
import time
block = bytearray(4 << 30)
block[::4096] = bytes(len(block[::4096]))
print(flush=True)
time.sleep(600)
"""
MIDDLE = 3  # rounds before it begins
ROUNDS = 6


@contextlib.contextmanager
def neighbours(root: Path) -> Iterator[None]:
    """Two processes that spin."""
    with _running(SPIN, 2):
        yield


@contextlib.contextmanager
def memory_hog(root: Path) -> Iterator[None]:
    """A process that takes 4 GiB."""
    with _running(HOG, 1):
        yield


@contextlib.contextmanager
def throttled_clock(root: Path) -> Iterator[None]:
    """A clock at half of its highest, in a fake /sys."""
    set_clock(root, 900_000)
    yield


DISTURBANCES = {"neighbours": neighbours, "memory hog": memory_hog, "throttled clock": throttled_clock}
WORDS = {
    "neighbours": ("other processes used", "of other processes were running"),
    "memory hog": ("memory",),
    "throttled clock": ("of its highest clock",),
}


def judged_under(kind: str, bundle: str, generate: int = 64) -> tuple[str, list[str]]:
    """Status and the reasons that speak of this disturbance, of a run whose second half it disturbs."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        root = fake_sys(Path(folder)) if kind == "throttled clock" else Path("/")
        begun = threading.Event()

        def watch(label: str, done: float, total: float) -> None:
            if done >= MIDDLE and not begun.is_set():
                begun.set()
                stack.enter_context(DISTURBANCES[kind](root))

        plan = BenchOptions(prompt=16, generate=generate, threads=1, repetitions=ROUNDS, cold=False, root=root)
        (m,) = measure([bundle], plan, progress=watch).measurements
    assert begun.is_set() and m.status in (OK, WARN, INVALID)
    return m.status, [reason for reason in m.reasons if any(word in reason for word in WORDS[kind])]


def fake_sys(root: Path) -> Path:
    """The host's own /proc, and a /sys of cores at their highest clock."""
    (root / "proc").symlink_to("/proc")
    set_clock(root, 1_800_000)
    return root


def set_clock(root: Path, khz: int) -> None:
    for cpu in range(64):
        folder = root / f"sys/devices/system/cpu/cpu{cpu}/cpufreq"
        folder.mkdir(parents=True, exist_ok=True)
        values = {"scaling_cur_freq": khz, "scaling_max_freq": 1_800_000, "cpuinfo_max_freq": 1_800_000}
        for name, value in values.items():
            (folder / name).write_text(f"{value}\n")
        (folder / "scaling_governor").write_text("performance\n")


@contextlib.contextmanager
def _running(code: str, count: int) -> Iterator[None]:
    """Processes that have said that they are where they shall be."""
    started = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(count)]
    try:
        for process in started:
            assert process.stdout is not None and process.stdout.readline()
        yield
    finally:
        for process in started:
            process.kill()
            process.communicate()
