"""What disturbs a measurement on a real host, begun in the middle of a bench run, and what the bench then says."""

import contextlib
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
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


def neighbours(root: Path) -> AbstractContextManager[None]:
    """Two processes that spin."""
    return _running(SPIN, 2)


def memory_hog(root: Path) -> AbstractContextManager[None]:
    """A process that takes 4 GiB."""
    return _running(HOG, 1)


def throttled_clock(root: Path) -> AbstractContextManager[None]:
    """A clock at half of its highest, in a fake /sys."""
    set_clock(root, 900_000)
    return contextlib.nullcontext()


def memory_taken(root: Path) -> AbstractContextManager[None]:
    """2 GB less are available, in a fake /proc."""
    set_memory(root, 1_000_000)
    return contextlib.nullcontext()


DISTURBANCES = {"neighbours": neighbours, "memory hog": memory_hog, "throttled clock": throttled_clock}
CHEAP = {"neighbours": neighbours, "memory taken": memory_taken, "throttled clock": throttled_clock}
WORDS = {
    "neighbours": ("other processes used", "of other processes ran"),
    "memory hog": ("memory",),
    "memory taken": ("other processes took or freed",),
    "throttled clock": ("of its highest clock",),
}


def judged_under(kind: str, bundle: str, rounds: int = 6) -> tuple[str, list[str]]:
    """Status and the reasons that speak of this disturbance, of a run whose second half it disturbs."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        root = fake_host(Path(folder)) if kind in ("throttled clock", "memory taken") else Path("/")
        begun = threading.Event()

        def watch(label: str, done: float, total: float) -> None:
            if label.startswith("bench") and done >= rounds // 2 and not begun.is_set():
                begun.set()
                stack.enter_context((DISTURBANCES | CHEAP)[kind](root))

        plan = BenchOptions(prompt=16, generate=64, threads=1, repetitions=rounds, cold=False, root=root)
        (m,) = measure([bundle], plan, progress=watch).measurements
    assert begun.is_set() and m.status in (OK, WARN, INVALID)
    return m.status, [reason for reason in m.reasons if any(word in reason for word in WORDS[kind])]


def fake_host(root: Path) -> Path:
    """The host's own /proc but for its memory, and a /sys of cores at their highest clock."""
    (root / "proc").mkdir()
    for name in ("self", "stat", "vmstat", "pressure", "sys"):
        (root / "proc" / name).symlink_to(f"/proc/{name}")
    set_memory(root, 3_000_000)
    set_clock(root, 1_800_000)
    return root


def set_memory(root: Path, available_kb: int) -> None:
    (root / "proc/meminfo").write_text(f"MemTotal: 4000000 kB\nMemAvailable: {available_kb} kB\n")


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
