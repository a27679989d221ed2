"""Memory and clocks of the GPU, by NVML on discrete boards and from the kernel's files on Jetson.

Where a GPU has memory of its own, NVML tells what a process holds (in a container it may not: it knows the host's
process numbers only). A Jetson shares one memory, and there CUDA's part is not in any resident set: boards with the
nvgpu driver (Orin and older) count it in nvmap, Thor's answers to NVML per process and reads 0 in nvmap. What cannot
be told is None with a reason; a sum over all processes is handed out as what it is.

Tried on fake NVML modules and fake trees laid out as the boards' are; on no board and no GPU.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path("/")
NVMAP_CLIENTS = "sys/kernel/debug/nvmap/iovmm/clients"  # root only
NVMAP_TOTAL = "NvMapMemUsed:"
# gm20b is of Nano, gp10b of TX2, gv11b of Xavier; Orin's folder is called 17000000.gpu or .ga10b, Thor's gpu-gpc-0.
DEVFREQ = ("*gpu*", "*.ga10b", "*.gv11b", "*.gp10b", "*.gm20b")
MEMORY_CLOCKS = ("sys/kernel/debug/bpmp/debug/clk/emc/rate", "sys/kernel/debug/clk/emc/clk_rate")  # root only
VISIBLE = "CUDA_VISIBLE_DEVICES"
MHZ, KIB = 1_000_000, 1024

Answer = TypeVar("Answer")


def open_nvml() -> Any | None:
    """The NVML module (pip install nvidia-ml-py), ready to be asked; None without it or without NVIDIA's driver."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


def gpu_facts(root: Path = ROOT, nvml: Any | None = None) -> dict[str, float | None]:
    """Clocks and load of the GPU at this moment; to be read while it works, since clocks fall soon after.

    Args:
        root: of /proc and /sys.
        nvml: what ``open_nvml`` gave.

    Returns:
        ``gpu_clock_hz``, ``gpu_memory_clock_hz`` and ``gpu_busy`` (share of the last moments in which something ran,
        0 to 1); None where it is not told.
    """
    folder = _devfreq(root)
    board = _number(folder / "cur_freq") if folder else None
    load = _number(folder / "device/load") if folder else None  # in thousandths
    memory = next((rate for name in MEMORY_CLOCKS if (rate := _number(root / name)) is not None), None)
    return {
        "gpu_clock_hz": board if board is not None else _nvml_clock(nvml, "NVML_CLOCK_SM"),
        "gpu_memory_clock_hz": memory if memory is not None else _nvml_clock(nvml, "NVML_CLOCK_MEM"),
        "gpu_busy": load / 1000 if load is not None else _nvml_busy(nvml),
    }


def gpu_in_use(root: Path = ROOT, nvml: Any | None = None) -> int | None:
    """Bytes that all processes hold on the GPU; to be read before a process starts, as its baseline."""
    used = _nvmap_total(root)
    return used if used else _ask(nvml, lambda n, device: int(n.nvmlDeviceGetMemoryInfo(device).used))


def gpu_memory(
    pid: int, root: Path = ROOT, nvml: Any | None = None, baseline: int | None = None
) -> tuple[int | None, str | None]:
    """Bytes that a process holds on the GPU.

    Args:
        pid: the process.
        root: of /proc and /sys.
        nvml: what ``open_nvml`` gave.
        baseline: what ``gpu_in_use`` told before the process started.

    Returns:
        The bytes and None; or, where only all processes together are known, their growth over the baseline (without
        one, all of it) and a sentence that says so; or None and the reason.
    """
    own = _nvmap_client(root, pid)
    if own is None:
        own = _nvml_process(nvml, pid)
    if own is not None:
        return own, None
    everything = gpu_in_use(root, nvml)
    if everything is None:
        return None, _why(root, nvml)
    if baseline is None:
        return everything, "of all processes on the GPU: it does not tell what this one holds"
    grown = max(0, everything - baseline)
    return grown, "growth since before the process, of all on the GPU: it does not tell what this one holds"


class GpuWatch:
    """The GPU of this process: made before a model is loaded, asked once it has run."""

    def __init__(self, root: Path = ROOT) -> None:
        self._root, self._nvml = root, open_nvml()
        self._held = gpu_in_use(root, self._nvml)

    def clocks(self) -> dict[str, float | None]:
        """As ``gpu_facts``."""
        return gpu_facts(self._root, self._nvml)

    def memory(self) -> tuple[int | None, str | None]:
        """As ``gpu_memory``, over what was held before."""
        return gpu_memory(os.getpid(), self._root, self._nvml, self._held)


def _why(root: Path, nvml: Any | None) -> str:
    if nvml is not None:
        return "NVML of this GPU tells neither what a process holds nor all of it"
    if _devfreq(root) is not None:
        return "this board's nvmap tells nothing, and NVML is not there: pip install nvidia-ml-py"
    return "no NVML: pip install nvidia-ml-py, and NVIDIA's driver must be there"


def _nvmap_total(root: Path) -> int | None:
    for line in _lines(root / "proc/meminfo"):
        if line.startswith(NVMAP_TOTAL):
            return int(line.split()[1]) * KIB
    return None


def _nvmap_client(root: Path, pid: int) -> int | None:
    """What nvmap lists for a process: lines of client, name, process and size such as ``8372K``."""
    sizes = [
        int(found[2]) * KIB
        for line in _lines(root / NVMAP_CLIENTS)
        if (found := re.search(r"\s(\d+)\s+(\d+)K\s*$", line)) and int(found[1]) == pid
    ]
    return sum(sizes) or None  # Thor lists processes with 0


def _nvml_process(nvml: Any | None, pid: int) -> int | None:
    def held(n: Any, device: Any) -> int | None:
        sizes = [p.usedGpuMemory for p in n.nvmlDeviceGetComputeRunningProcesses(device) if p.pid == pid]
        return None if not sizes or None in sizes else sum(sizes)

    return _ask(nvml, held)


def _nvml_clock(nvml: Any | None, kind: str) -> float | None:
    return _ask(nvml, lambda n, device: float(n.nvmlDeviceGetClockInfo(device, getattr(n, kind)) * MHZ))


def _nvml_busy(nvml: Any | None) -> float | None:
    return _ask(nvml, lambda n, device: float(n.nvmlDeviceGetUtilizationRates(device).gpu / 100))


def _ask(nvml: Any | None, question: Callable[[Any, Any], Answer]) -> Answer | None:
    """The answer for the GPU that CUDA takes first, None where NVML has none."""
    if nvml is None:
        return None
    try:
        return question(nvml, _device(nvml))
    except nvml.NVMLError:
        return None


def _device(nvml: Any) -> Any:
    first = os.environ.get(VISIBLE, "").split(",")[0].strip()
    if first.startswith(("GPU-", "MIG-")):
        return nvml.nvmlDeviceGetHandleByUUID(first)
    # CUDA counts as NVML does, by bus: bench.runtimes.providers has asked it to.
    return nvml.nvmlDeviceGetHandleByIndex(int(first) if first.isdigit() else 0)


def _devfreq(root: Path) -> Path | None:
    folders = (path for pattern in DEVFREQ for path in sorted((root / "sys/class/devfreq").glob(pattern)))
    return next(folders, None)


def _number(path: Path) -> int | None:
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].strip().isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not there, root only, or the GPU sleeps
        return []
