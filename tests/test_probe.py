from __future__ import annotations

import json
import platform
from pathlib import Path

import pytest

from devices.probe import fingerprint, parse_cpu_list, probe
from tests.fake_trees import plant

A76 = """processor\t: {n}
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x4
CPU part\t: 0xd0b
CPU revision\t: 1
"""

EPYC = """processor\t: {n}
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R) Processor @ 2.60GHz
physical id\t: 0
core id\t\t: {core}
flags\t\t: fpu lm sse2 fma f16c avx2 avx512f avx512_vnni avx_vnni
"""


@pytest.fixture
def raspberry_pi_5(tmp_path: Path) -> Path:
    cpu = "sys/devices/system/cpu"
    files = {
        "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
        "proc/cpuinfo": "\n".join(A76.format(n=n) for n in range(4))
        + "\nRevision\t: d04170\nModel\t\t: Raspberry Pi 5\n",
        "proc/meminfo": "MemTotal:        8256512 kB\nMemFree:         5000000 kB\n",
        "proc/sys/kernel/osrelease": "6.6.31+rpt-rpi-2712\n",
        "proc/self/status": "Name:\tpython3\nCpus_allowed:\tf\nCpus_allowed_list:\t0-3\n",
        "proc/self/cgroup": "0::/user.slice/user-1000.slice\n",
        "etc/os-release": 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nID=debian\n',
        f"{cpu}/cpufreq/policy0/affected_cpus": "0 1 2 3\n",
        f"{cpu}/cpufreq/policy0/scaling_governor": "ondemand\n",
        f"{cpu}/cpufreq/policy0/scaling_min_freq": "1500000\n",
        f"{cpu}/cpufreq/policy0/scaling_max_freq": "2400000\n",
        f"{cpu}/cpufreq/policy0/scaling_cur_freq": "1500000\n",
    }
    for n in range(4):
        files |= {
            f"{cpu}/cpu{n}/topology/core_id": f"{n}\n",
            f"{cpu}/cpu{n}/topology/physical_package_id": "0\n",
            f"{cpu}/cpu{n}/cache/index0/level": "1\n",
            f"{cpu}/cpu{n}/cache/index0/size": "64K\n",
            f"{cpu}/cpu{n}/cache/index0/type": "Data\n",
            f"{cpu}/cpu{n}/cache/index0/shared_cpu_list": f"{n}\n",
            f"{cpu}/cpu{n}/cache/index3/level": "3\n",
            f"{cpu}/cpu{n}/cache/index3/size": "2048K\n",
            f"{cpu}/cpu{n}/cache/index3/type": "Unified\n",
            f"{cpu}/cpu{n}/cache/index3/shared_cpu_list": "0-3\n",
        }
    return plant(tmp_path / "pi5", files)


@pytest.fixture
def x86_vm(tmp_path: Path) -> Path:
    """Two hardware threads of one core, a cgroup limit below the RAM, no cpufreq, DMI of a cloud."""
    cpu = "sys/devices/system/cpu"
    files = {
        "proc/cpuinfo": "\n".join(EPYC.format(n=n, core=0) for n in range(2)),
        "proc/meminfo": "MemTotal:       16000000 kB\n",
        "proc/self/status": "Cpus_allowed_list:\t1\n",
        "proc/self/cgroup": "0::/box/inner\n",
        "sys/fs/cgroup/box/memory.max": "1073741824\n",
        "sys/fs/cgroup/box/inner/memory.max": "max\n",
        "sys/class/dmi/id/sys_vendor": "QEMU\n",
        "sys/class/dmi/id/product_name": "To Be Filled By O.E.M.\n",
    }
    for n in range(2):
        files |= {
            f"{cpu}/cpu{n}/topology/core_id": "0\n",
            f"{cpu}/cpu{n}/topology/physical_package_id": "0\n",
            f"{cpu}/cpu{n}/cache/index0/level": "2\n",
            f"{cpu}/cpu{n}/cache/index0/size": "1M\n",
            f"{cpu}/cpu{n}/cache/index0/type": "Unified\n",
            f"{cpu}/cpu{n}/cache/index0/shared_cpu_list": f"{n}\n",
        }
    return plant(tmp_path / "vm", files)


def test_raspberry_pi_5(raspberry_pi_5: Path) -> None:
    facts = probe(raspberry_pi_5)
    assert facts["board"] == "Raspberry Pi 5 Model B Rev 1.0"
    assert facts["cpu_model"] == "Cortex-A76"
    assert facts["architecture"] == "aarch64"
    assert facts["isa"] == ["asimd", "dotprod", "fp16"]
    assert facts["cores"] == {"physical": 4, "logical": 4, "allowed": 4}
    assert facts["last_level_cache_bytes"] == 2 << 20
    assert facts["memory_bytes"] == 8256512 * 1024
    assert facts["governor"] == "ondemand"
    assert facts["frequencies"] == [
        {"cpus": "0 1 2 3", "min_hz": 1_500_000_000, "max_hz": 2_400_000_000, "current_hz": 1_500_000_000}
    ]
    assert facts["os"] == "Debian GNU/Linux 12 (bookworm)"
    assert facts["kernel"] == "6.6.31+rpt-rpi-2712"


def test_x86_virtual_machine_in_a_cgroup(x86_vm: Path) -> None:
    facts = probe(x86_vm)
    assert facts["board"] == "QEMU"
    assert facts["architecture"] == "x86_64"
    assert facts["isa"] == ["avx2", "avx512_vnni", "avx512f", "avx_vnni", "f16c", "fma"]
    assert facts["cores"] == {"physical": 1, "logical": 2, "allowed": 1}
    assert facts["last_level_cache_bytes"] == 1 << 20  # CPU 0's own cache is out of reach
    assert facts["memory_bytes"] == 1 << 30
    assert facts["governor"] is None and facts["frequencies"] is None and facts["kernel"] is None


def test_cgroup_version_1_limit(x86_vm: Path) -> None:
    plant(
        x86_vm,
        {
            "proc/self/cgroup": "4:cpu,memory:/job\n1:cpuset:/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "536870912\n",
        },
    )
    assert probe(x86_vm)["memory_bytes"] == 512 << 20


def test_features_of_a_mixed_soc_are_those_of_its_smallest_core(raspberry_pi_5: Path) -> None:
    big = A76.format(n=1).replace("0xd0b", "0xd42").replace("asimddp", "asimddp i8mm")
    plant(raspberry_pi_5, {"proc/cpuinfo": A76.format(n=0) + "\n" + big})
    facts = probe(raspberry_pi_5)
    assert facts["cpu_model"] == "Cortex-A76 + Cortex-A78AE"
    assert facts["isa"] == ["asimd", "dotprod", "fp16"]


def test_unknown_arm_part_is_named_by_its_numbers(raspberry_pi_5: Path) -> None:
    plant(raspberry_pi_5, {"proc/cpuinfo": A76.format(n=0).replace("0xd0b", "0xfff")})
    assert probe(raspberry_pi_5)["cpu_model"] == "ARM implementer 0x41 part 0xfff"


def test_empty_tree_is_unknown_not_zero(tmp_path: Path) -> None:
    facts = probe(tmp_path)
    unknown = {name for name, value in facts.items() if value is None}
    assert unknown >= {"board", "cpu_model", "architecture", "isa", "last_level_cache_bytes", "memory_bytes", "os"}
    assert facts["cores"] == {"physical": None, "logical": None, "allowed": None}
    assert len(facts["fingerprint"]) == 16


def test_fingerprint_survives_a_reboot_and_sees_a_governor(raspberry_pi_5: Path) -> None:
    before = probe(raspberry_pi_5)
    policy = "sys/devices/system/cpu/cpufreq/policy0"
    plant(
        raspberry_pi_5,
        {
            "proc/meminfo": "MemTotal:        8255900 kB\n",
            f"{policy}/scaling_cur_freq": "2400000\n",
            "proc/self/status": "Cpus_allowed_list:\t0-1\n",
        },
    )
    assert probe(raspberry_pi_5)["fingerprint"] == before["fingerprint"]
    plant(raspberry_pi_5, {f"{policy}/scaling_governor": "performance\n"})
    assert probe(raspberry_pi_5)["fingerprint"] != before["fingerprint"]
    assert fingerprint({**before, "onnxruntime": "0.0"}) != before["fingerprint"]


@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc")
def test_this_host() -> None:
    facts = probe()
    json.dumps(facts)
    assert facts["architecture"] == platform.machine()
    assert facts["kernel"] == platform.release()
    assert facts["cores"]["logical"] >= facts["cores"]["allowed"] >= 1
    assert facts["memory_bytes"] > 100 << 20
    assert facts["isa"]
    assert probe()["fingerprint"] == facts["fingerprint"]


def test_cpu_lists() -> None:
    assert parse_cpu_list("0-3,6") == [0, 1, 2, 3, 6]
    assert parse_cpu_list("2") == [2]
    assert parse_cpu_list("\n") == []
