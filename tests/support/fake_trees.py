"""Trees of /proc, /sys and /etc, laid out below a folder, and boards made after public recordings.

The processors' paragraphs are what users of those boards posted (hrw/arm-socs-table and lscpu listings), names are the
boards' own device trees, memory and zones follow tegrastats lines; a cpu_capacity is the kernel's binding times the
share of the highest clock. Frequency limits, some sizes in kB, the nvpmodel lists of Orin NX and Xavier and some
of Thor's feature flags are filled in, plausible and not recorded.
"""

from collections.abc import Iterable
from pathlib import Path

CPU = "sys/devices/system/cpu"

A53_ON = "fp asimd evtstrm crc32 cpuid"
A57_ON = "fp asimd evtstrm aes pmull sha1 sha2 crc32"
CARMEL_ON = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm dcpop"
A76_ON = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
A78AE_ON = A76_ON + " uscat ilrcpc flagm paca pacg"
V3AE_ON = (
    "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm jscvt fcma lrcpc dcpop sha3 "
    "asimddp sha512 sve asimdfhm dit uscat ilrcpc flagm sb paca pacg dcpodp sve2 flagm2 frint svei8mm svebf16 i8mm bf16"
)


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def arm_cpu(
    number: int, part: int, features: str, *, implementer: int = 0x41, variant: int = 0, revision: int = 1
) -> str:
    return (
        f"processor\t: {number}\nBogoMIPS\t: 62.50\nFeatures\t: {features}\n"
        f"CPU implementer\t: {implementer:#04x}\nCPU architecture: 8\nCPU variant\t: {variant:#x}\n"
        f"CPU part\t: {part:#05x}\nCPU revision\t: {revision}\n"
    )


def policy(
    cpus: list[int], governor: str, low: int, high: int, now: int, hardware: int | None = None
) -> dict[str, str]:
    """A clock domain, kHz."""
    base = f"{CPU}/cpufreq/policy{cpus[0]}"
    return {
        f"{base}/affected_cpus": " ".join(map(str, cpus)) + "\n",
        f"{base}/scaling_governor": f"{governor}\n",
        f"{base}/scaling_min_freq": f"{low}\n",
        f"{base}/scaling_max_freq": f"{high}\n",
        f"{base}/scaling_cur_freq": f"{now}\n",
        f"{base}/cpuinfo_max_freq": f"{high if hardware is None else hardware}\n",
    }


def zones(temperatures: dict[str, int | None]) -> dict[str, str]:
    """Thermal zones, millidegrees; None is a zone whose file is empty, as one that is gated reads."""
    files = {}
    for number, (kind, value) in enumerate(temperatures.items()):
        base = f"sys/class/thermal/thermal_zone{number}"
        files |= {f"{base}/type": f"{kind}\n", f"{base}/temp": "" if value is None else f"{value}\n"}
    return files


def capacities(values: Iterable[int]) -> dict[str, str]:
    return {f"{CPU}/cpu{n}/cpu_capacity": f"{value}\n" for n, value in enumerate(values)}


def machine(model: str, compatible: list[str], cpus: list[str], memory_kb: int, os: str, kernel: str) -> dict[str, str]:
    """What every board with a device tree has."""
    last = len(cpus) - 1
    return {
        "proc/device-tree/model": model + "\0",
        "proc/device-tree/compatible": "".join(name + "\0" for name in compatible),
        "proc/cpuinfo": "\n".join(cpus),
        "proc/meminfo": f"MemTotal:  {memory_kb} kB\nMemAvailable:  {memory_kb * 3 // 4} kB\nSwapTotal:  0 kB\n",
        "proc/sys/kernel/osrelease": kernel + "\n",
        "proc/self/status": f"Name:\tpython3\nCpus_allowed_list:\t0-{last}\n",
        "etc/os-release": f'PRETTY_NAME="{os}"\n',
        f"{CPU}/offline": "\n",
        **{f"{CPU}/cpu{n}/topology/core_id": f"{n}\n" for n in range(len(cpus))},
        **{f"{CPU}/cpu{n}/topology/physical_package_id": "0\n" for n in range(len(cpus))},
    }


def jetson(release: str, modes: list[str], mode: int | None) -> dict[str, str]:
    """nvpmodel's files, and the release line of Jetson Linux."""
    major, _, revision = release.partition(".")
    files = {
        "etc/nv_tegra_release": f"# R{major} (release), REVISION: {revision}, GCID: 38968081, BOARD: generic, EABI: "
        "aarch64, DATE: Wed Jan  8 01:49:37 UTC 2025\n",
        "etc/nvpmodel.conf": "< PARAM TYPE=FILE NAME=CPU_ONLINE >\n"
        + "".join(f"< POWER_MODEL ID={n} NAME={name} >\nCPU_ONLINE CORE_0 1\n" for n, name in enumerate(modes))
        + "< PM_CONFIG DEFAULT=0 >\n",
    }
    return files | ({} if mode is None else {"var/lib/nvpmodel/status": f"pmode:{mode:04d} fmode:quiet"})


def raspberry_pi_4() -> dict[str, str]:
    return {
        **machine(
            "Raspberry Pi 4 Model B Rev 1.4", ["raspberrypi,4-model-b", "brcm,bcm2711"],
            [arm_cpu(n, 0xD08, A53_ON, revision=3) for n in range(4)], 3884304,
            "Debian GNU/Linux 12 (bookworm)", "6.6.31+rpt-rpi-v8",
        ),
        **policy([0, 1, 2, 3], "ondemand", 600000, 1800000, 600000),
        **zones({"cpu-thermal": 48686}),
        "sys/devices/platform/soc/soc:firmware/get_throttled": "50005\n",
    }  # fmt: skip


def raspberry_pi_5() -> dict[str, str]:
    files = {
        **machine(
            "Raspberry Pi 5 Model B Rev 1.0", ["raspberrypi,5-model-b", "brcm,bcm2712"],
            [arm_cpu(n, 0xD0B, A76_ON, variant=4) for n in range(4)], 8256512,
            "Debian GNU/Linux 12 (bookworm)", "6.6.31+rpt-rpi-2712",
        ),
        **policy([0, 1, 2, 3], "ondemand", 1500000, 2400000, 1500000),
        **zones({"cpu-thermal": 51250}),
        "sys/devices/platform/soc/soc:firmware/get_throttled": "0\n",
    }  # fmt: skip
    for n in range(4):
        cache = f"{CPU}/cpu{n}/cache"
        for index, level, size, kind, shared in ((0, 1, "64K", "Data", str(n)), (3, 3, "2048K", "Unified", "0-3")):
            files |= {
                f"{cache}/index{index}/level": f"{level}\n",
                f"{cache}/index{index}/size": f"{size}\n",
                f"{cache}/index{index}/type": f"{kind}\n",
                f"{cache}/index{index}/shared_cpu_list": f"{shared}\n",
            }
    return files


def rk3588() -> dict[str, str]:
    little = [arm_cpu(n, 0xD05, A76_ON, variant=2, revision=0) for n in range(4)]
    return {
        **machine(
            "Radxa ROCK 5B", ["radxa,rock-5b", "rockchip,rk3588"],
            little + [arm_cpu(n, 0xD0B, A76_ON, variant=4, revision=0) for n in range(4, 8)], 16214912,
            "Debian GNU/Linux 12 (bookworm)", "6.1.43-15-rk2312",
        ),
        **capacities([397] * 4 + [1024] * 4),  # 530 and 1024 of the binding, 1.8 and 2.4 GHz
        **policy([0, 1, 2, 3], "ondemand", 408000, 1800000, 408000),
        **policy([4, 5], "performance", 408000, 2400000, 2400000),
        **policy([6, 7], "performance", 408000, 2256000, 2256000, hardware=2400000),
        **zones({"soc-thermal": 38846, "bigcore0-thermal": 38846, "littlecore-thermal": 37923}),
        "sys/class/thermal/cooling_device0/type": "cpufreq-cpu6\n",
        "sys/class/thermal/cooling_device0/cur_state": "1\n",
        "sys/class/thermal/cooling_device1/type": "pwm-fan\n",
        "sys/class/thermal/cooling_device1/cur_state": "3\n",
    }  # fmt: skip


def orin_nano(mode: int | None = 1) -> dict[str, str]:
    """JetPack 6.2.1, Super firmware."""
    return {
        **machine(
            "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
            ["nvidia,p3768-0000+p3767-0005-super", "nvidia,p3767-0005", "nvidia,tegra234"],
            [arm_cpu(n, 0xD42, A78AE_ON) for n in range(6)], 7802880, "Ubuntu 22.04.5 LTS", "5.15.148-tegra",
        ),
        **jetson("36.4.4", ["15W", "25W", "MAXN_SUPER", "7W"], mode),
        **policy([0, 1, 2, 3], "schedutil", 729600, 1344000, 729600, hardware=1728000),
        **policy([4, 5], "schedutil", 729600, 1344000, 729600, hardware=1728000),
        **zones({"cpu-thermal": 48468, "gpu-thermal": 48562, "cv0-thermal": None, "tj-thermal": 49156}),
        "sys/class/hwmon/hwmon2/oc1_event_cnt": "0\n",
        "sys/class/hwmon/hwmon2/oc3_event_cnt": "4\n",
    }  # fmt: skip


def orin_nx() -> dict[str, str]:
    """JetPack 7.2 in a mode that switches two of eight cores off."""
    on = [0, 1, 2, 3, 6, 7]
    return {
        **machine(
            "NVIDIA Jetson Orin NX Engineering Reference Developer Kit",
            ["nvidia,p3768-0000+p3767-0000", "nvidia,p3767-0000", "nvidia,tegra234"],
            [arm_cpu(n, 0xD42, A78AE_ON) for n in on], 15972352, "Ubuntu 24.04.3 LTS", "6.8.12-tegra",
        ),
        **jetson("39.2.0", ["MAXN", "10W", "15W", "25W"], 2),
        f"{CPU}/offline": "4-5\n",
        **policy([0, 1, 2, 3], "schedutil", 729600, 1420800, 1036800),
        **policy([6, 7], "schedutil", 729600, 1420800, 729600),
        **zones({"cpu-thermal": 57156, "gpu-thermal": 55343, "tj-thermal": 59687}),
    }  # fmt: skip


def agx_orin() -> dict[str, str]:
    return {
        **machine(
            "NVIDIA Jetson AGX Orin Developer Kit",
            ["nvidia,p3737-0000+p3701-0005", "nvidia,p3701-0005", "nvidia,tegra234"],
            [arm_cpu(n, 0xD42, A78AE_ON) for n in range(12)], 64349184, "Ubuntu 22.04.5 LTS", "5.15.148-tegra",
        ),
        **jetson("36.4.4", ["MAXN", "MODE_15W", "MODE_30W", "MODE_50W"], 0),
        **policy([0, 1, 2, 3], "schedutil", 729600, 2201600, 2188800),
        **policy([4, 5, 6, 7], "schedutil", 729600, 2201600, 1267200),
        **policy([8, 9, 10, 11], "schedutil", 729600, 2201600, 1036800),
        **zones({"cpu-thermal": 52562, "soc0-thermal": 49093, "tj-thermal": 52562}),
    }  # fmt: skip


def xavier_nx() -> dict[str, str]:
    files = {
        **machine(
            "NVIDIA Jetson Xavier NX Developer Kit",
            ["nvidia,p3509-0000+p3668-0001", "nvidia,p3668-0001", "nvidia,tegra194"],
            [arm_cpu(n, 0x004, CARMEL_ON, implementer=0x4E, revision=0) for n in range(6)], 7015424,
            "Ubuntu 20.04.6 LTS", "5.10.120-tegra",
        ),
        **jetson("35.4.1", ["MODE_15W_2CORE", "MODE_15W_4CORE", "MODE_15W_6CORE"], 2),
        **zones({"CPU-therm": 46500, "GPU-therm": 45500, "PMIC-Die": 50000}),
    }  # fmt: skip
    for first in (0, 2, 4):
        files |= policy([first, first + 1], "schedutil", 1190400, 1420800, 1190400)
    return files


def nano() -> dict[str, str]:
    """JetPack 4.6.1: no reading of the mode without root, so no status file here."""
    return {
        **machine(
            "NVIDIA Jetson Nano Developer Kit",
            ["nvidia,p3449-0000-b00+p3448-0000-b00", "nvidia,jetson-nano", "nvidia,tegra210"],
            [arm_cpu(n, 0xD07, A57_ON, variant=1) for n in range(4)], 4059376, "Ubuntu 18.04.6 LTS", "4.9.253-tegra",
        ),
        **jetson("32.7.1", ["MAXN", "5W"], None),
        **policy([0, 1, 2, 3], "schedutil", 102000, 1479000, 1224000),
        **zones({"PLL-therm": 37000, "CPU-therm": 40000, "PMIC-Die": 50000}),
    }  # fmt: skip


def thor() -> dict[str, str]:
    files = {
        **machine(
            "NVIDIA Jetson AGX Thor Developer Kit",
            ["nvidia,p4071-0000+p3834-0008", "nvidia,p3834-0008", "nvidia,tegra264"],
            [arm_cpu(n, 0xD83, V3AE_ON) for n in range(14)], 128830464, "Ubuntu 24.04.3 LTS", "6.8.12-tegra",
        ),
        **jetson("38.2.0", ["MAXN", "120W", "90W", "70W"], 1),
        **zones({"cpu-thermal": 30468, "tj-thermal": 31218, "soc012-thermal": 30218}),
    }  # fmt: skip
    for first in range(0, 14, 2):
        files |= policy([first, first + 1], "schedutil", 972000, 2601000, 972000)
    return files


def x86_vm() -> dict[str, str]:
    """Two hardware threads of one core, a cgroup limit below the RAM, no cpufreq, DMI of a cloud."""
    cpu = (
        "processor\t: {n}\nvendor_id\t: GenuineIntel\nmodel name\t: Intel(R) Xeon(R) Processor @ 2.60GHz\n"
        "physical id\t: 0\ncore id\t\t: 0\nflags\t\t: fpu lm sse2 fma f16c avx2 avx512f avx512_vnni avx_vnni\n"
    )
    files = {
        "proc/cpuinfo": "\n".join(cpu.format(n=n) for n in range(2)),
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
            f"{CPU}/cpu{n}/topology/core_id": "0\n",
            f"{CPU}/cpu{n}/topology/physical_package_id": "0\n",
            f"{CPU}/cpu{n}/cache/index0/level": "2\n",
            f"{CPU}/cpu{n}/cache/index0/size": "1M\n",
            f"{CPU}/cpu{n}/cache/index0/type": "Unified\n",
            f"{CPU}/cpu{n}/cache/index0/shared_cpu_list": f"{n}\n",
        }
    return files
