"""GPU memory on fake boards: their trees, and NVML modules that answer as their drivers do."""

import sys
from types import SimpleNamespace

import pytest
from support.fake_trees import plant

from bench.measure.gpu import GpuWatch, open_nvml

MIB = 1 << 20
CLIENTS = """\
CLIENT                        PROCESS      PID        SIZE
user                         gnome-shell     2324      8372K
user                    python3 -m bench     4711    204800K
user                    python3 -m bench     4711      1024K
user                             python3    14711      4096K
total                                                218292K
"""


class Nvml:
    """An NVML module; an answer of None is a driver that does not support the question."""

    class NVMLError(Exception):
        pass

    def __init__(self, processes=None, used=None, count=1) -> None:
        self.processes, self.used, self.count = processes, used, count
        self.asked: list[object] = []

    def _answer(self, value):
        if value is None:
            raise self.NVMLError("not supported")
        return value

    def nvmlDeviceGetHandleByIndex(self, index):  # noqa: N802
        self.asked.append(index)
        return self._answer(index if index < self.count else None)

    def nvmlDeviceGetHandleByUUID(self, uuid):  # noqa: N802
        self.asked.append(uuid)
        return uuid

    def nvmlDeviceGetComputeRunningProcesses(self, _):  # noqa: N802
        return [SimpleNamespace(pid=p, usedGpuMemory=m) for p, m in self._answer(self.processes)]

    def nvmlDeviceGetMemoryInfo(self, _):  # noqa: N802
        return SimpleNamespace(used=self._answer(self.used))


ORIN = {
    "proc/meminfo": "MemTotal: 7802040 kB\nNvMapMemFree:  0 kB\nNvMapMemUsed:  218292 kB\n",
}
ROOT_ONLY = {"sys/kernel/debug/nvmap/iovmm/clients": CLIENTS}


def test_a_discrete_gpu_tells_what_the_process_holds(tmp_path) -> None:
    nvml = Nvml([(7, 100 * MIB), (4711, 900 * MIB)], used=1200 * MIB)
    gpu = GpuWatch(tmp_path, nvml)
    assert gpu.memory(4711) == (900 * MIB, None) and gpu.in_use() == 1200 * MIB


@pytest.mark.parametrize("processes", [[(99, 5 * MIB)], [(4711, None)], None])  # a container, no answer, no support
def test_where_the_process_is_not_told_the_growth_of_all_is(tmp_path, processes) -> None:
    nvml = Nvml(processes)
    new = GpuWatch(tmp_path, nvml)  # nothing is known of what was held before
    nvml.used = 300 * MIB
    gpu = GpuWatch(tmp_path, nvml)
    for used, grown in ((1200, 900), (100, 0)):
        nvml.used = used * MIB
        size, why = gpu.memory(4711)
        assert size == grown * MIB and "growth since before the process" in why
    size, why = new.memory(4711)
    assert size == 100 * MIB and "of all processes" in why


def test_orin_lists_its_clients_to_root_and_to_others_the_board_only(tmp_path) -> None:
    gpu = GpuWatch(plant(tmp_path / "root", ORIN | ROOT_ONLY))
    assert gpu.memory(4711) == (201 * MIB, None)
    gpu = GpuWatch(plant(tmp_path, ORIN))
    assert gpu.in_use() == 218292 * 1024
    plant(tmp_path, {"proc/meminfo": "NvMapMemUsed:  418292 kB\n"})
    size, why = gpu.memory(4711)
    assert size == 200000 * 1024 and "of all on the GPU" in why


def test_thor_reads_0_in_nvmap_and_answers_per_process(tmp_path) -> None:
    files = {
        "proc/meminfo": "MemTotal: 128000000 kB\nNvMapMemUsed:  0 kB\n",
        "sys/kernel/debug/nvmap/iovmm/clients": "user  python3  4711  0K\ntotal  0K\n",
    }
    gpu = GpuWatch(plant(tmp_path, files), Nvml([(4711, 3000 * MIB)]))
    assert gpu.memory(4711) == (3000 * MIB, None) and gpu.in_use() is None
    size, why = gpu.memory(1)
    assert size is None and "neither what a process holds" in why


def test_a_host_without_a_gpu_says_why_it_knows_nothing(tmp_path) -> None:
    gpu = GpuWatch(tmp_path)
    size, why = gpu.memory(1)
    assert size is None and "pip install nvidia-ml-py" in why


@pytest.mark.parametrize(
    "name", ["57000000.gpu", "17000000.gp10b", "17000000.gv11b", "17000000.ga10b", "57000000.gm20b", "gpu-gpc-0"]
)
def test_every_jetson_calls_its_gpu_something_else(tmp_path, name) -> None:
    size, why = GpuWatch(plant(tmp_path, {f"sys/class/devfreq/{name}/cur_freq": "1"})).memory(1)
    assert size is None and "this board's nvmap tells nothing" in why


@pytest.mark.parametrize(("visible", "asked"), [("", 0), ("1,0", 1), ("GPU-8a5f", "GPU-8a5f"), ("-1", 0)])
def test_the_gpu_is_the_first_that_cuda_may_see(tmp_path, monkeypatch, visible, asked) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    nvml = Nvml(used=MIB, count=2)
    assert GpuWatch(tmp_path, nvml).in_use() == MIB
    assert set(nvml.asked) == {asked}


def test_nvml_is_optional(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert open_nvml() is None

    class NoDriver(Nvml):
        def nvmlInit(self) -> None:  # noqa: N802
            raise self.NVMLError("driver not loaded")

    monkeypatch.setitem(sys.modules, "pynvml", NoDriver())
    assert open_nvml() is None
    working = SimpleNamespace(nvmlInit=lambda: None, NVMLError=Nvml.NVMLError)
    monkeypatch.setitem(sys.modules, "pynvml", working)
    assert open_nvml() is working
