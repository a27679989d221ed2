"""Memory of the GPU, by NVML on discrete boards and from the kernel's files on Jetson.

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
from types import ModuleType
from typing import TypeVar

from devices.probe.jetson import GPUS
from saap.base.tree import field, text

NVMAP_CLIENTS = "sys/kernel/debug/nvmap/iovmm/clients"  # root only
KIB = 1024

Answer = TypeVar("Answer")


def open_nvml() -> ModuleType | None:
    """Return the initialised NVML module (pip install nvidia-ml-py); None without it or without NVIDIA's driver."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml  # type: ignore[no-any-return]


class GpuWatch:
    """The GPU of this process: made before a model is loaded, asked once it has run.

    Args:
        root: of /proc and /sys.
        nvml: what ``open_nvml`` gave.
    """

    def __init__(self, root: Path = Path("/"), nvml: ModuleType | None = None) -> None:
        self._root, self._nvml = root, nvml
        self._on_board = any(any((root / "sys/class/devfreq").glob(pattern)) for pattern in GPUS)
        self._before = self.in_use()

    def in_use(self) -> int | None:
        """Bytes that all processes hold on the GPU."""
        nvmap = field(self._root / "proc/meminfo", "NvMapMemUsed")
        return nvmap or self._ask(lambda nvml, device: int(nvml.nvmlDeviceGetMemoryInfo(device).used))

    def memory(self, pid: int | None = None) -> tuple[int | None, str | None]:
        """Bytes that a process, by default this one, holds on the GPU.

        Returns:
            The bytes and None; or, where only all processes together are known, their growth since this object was
            made (all of it where nothing was known then) and a sentence that says so; or None and the reason.
        """
        pid = os.getpid() if pid is None else pid
        own = self._nvmap_client(pid) or self._nvml_process(pid)
        if own is not None:
            return own, None
        everything = self.in_use()
        if everything is None:
            return None, self._why()
        if self._before is None:
            return everything, "of all processes on the GPU: it does not tell what this one holds"
        grown = max(0, everything - self._before)
        return grown, "growth since before the process, of all on the GPU: it does not tell what this one holds"

    def _why(self) -> str:
        if self._nvml is not None:
            return "NVML of this GPU tells neither what a process holds nor all of it"
        if self._on_board:
            return "this board's nvmap tells nothing, and NVML is not there: pip install nvidia-ml-py"
        return "no NVML: pip install nvidia-ml-py, and NVIDIA's driver must be there"

    def _nvmap_client(self, pid: int) -> int | None:
        """Sum nvmap's bytes of a process: lines of client, name, process and size such as ``8372K``."""
        lines = (text(self._root / NVMAP_CLIENTS) or "").splitlines()
        matches = [match for line in lines if (match := re.search(r"\s(\d+)\s+(\d+)K\s*$", line))]
        return (
            sum(int(size) * KIB for owner, size in (match.groups() for match in matches) if int(owner) == pid) or None
        )

    def _nvml_process(self, pid: int) -> int | None:
        def used(nvml: ModuleType, device: object) -> int | None:
            sizes = [p.usedGpuMemory for p in nvml.nvmlDeviceGetComputeRunningProcesses(device) if p.pid == pid]
            return None if not sizes or None in sizes else sum(sizes)

        return self._ask(used)

    def _ask(self, question: Callable[[ModuleType, object], Answer]) -> Answer | None:
        """Ask about the GPU that CUDA takes first; None where NVML has no answer."""
        if (nvml := self._nvml) is None:
            return None
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
        try:
            if first.startswith(("GPU-", "MIG-")):
                return question(nvml, nvml.nvmlDeviceGetHandleByUUID(first))
            # CUDA counts as NVML does, by bus: bench.runtimes.providers has asked it to.
            return question(nvml, nvml.nvmlDeviceGetHandleByIndex(int(first) if first.isdigit() else 0))
        except nvml.NVMLError:
            return None
