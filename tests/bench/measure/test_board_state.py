from __future__ import annotations

from pathlib import Path

import pytest
from support.fake_trees import plant

from bench.measure.cores import board_state, temperature
from bench.measure.host_state import counters, snapshot
from devices.probe.host import nobody
from devices.probe.state import throttling

CPU = "sys/devices/system/cpu"


def clocks(cpu: int, now: int, highest: int, governor: str) -> dict[str, str]:
    base = f"{CPU}/cpu{cpu}/cpufreq"
    return {
        f"{base}/scaling_cur_freq": f"{now}\n",
        f"{base}/scaling_max_freq": f"{highest}\n",
        f"{base}/cpuinfo_max_freq": f"{highest}\n",
        f"{base}/scaling_governor": f"{governor}\n",
    }


def zone(number: int, kind: str, millidegrees: str) -> dict[str, str]:
    base = f"sys/class/thermal/thermal_zone{number}"
    return {f"{base}/type": f"{kind}\n", f"{base}/temp": f"{millidegrees}\n"}


def cooling(number: int, kind: str, state: int) -> dict[str, str]:
    base = f"sys/class/thermal/cooling_device{number}"
    return {f"{base}/type": f"{kind}\n", f"{base}/cur_state": f"{state}\n"}


PI_BITS = "sys/devices/platform/soc/soc:firmware/get_throttled"


def happened(root: Path, change: dict[str, str], cpus: list[int]) -> dict[str, float | None]:
    before = snapshot(cpus, root)
    return counters(before, snapshot(cpus, plant(root, change)), len(cpus))


def test_raspberry_pi_5(tmp_path: Path) -> None:
    plant(tmp_path, {PI_BITS: "50000\n", **zone(0, "cpu-thermal", "61250"), **cooling(0, "pwm-fan", 3)})
    for cpu in range(4):
        plant(tmp_path, clocks(cpu, 2_400_000, 2_400_000, "ondemand"))
    seen = board_state([0, 1, 2, 3], tmp_path)
    assert (seen.clock_share, seen.fixed_clock, seen.temperature_c) == (1.0, False, 61.25)
    assert seen.firmware_bits == 0x50000
    assert seen.cooling_state is None  # a fan is not throttling
    values = happened(tmp_path, clocks(2, 1_500_000, 2_400_000, "ondemand") | zone(0, "cpu-thermal", "82000"), [0, 2])
    assert (values["clock_share"], values["fixed_clock"]) == (0.625, 0)
    assert (values["temperature_start_c"], values["temperature_c"]) == (61.25, 82)
    assert values["firmware_throttled"] == 0  # both lasting bits are from before


@pytest.mark.parametrize(
    ("before", "after", "bits"),
    [
        ("0", "0", 0),
        ("50005", "50000", 5),  # at the start
        ("0", "80008", 8),  # at the end
        ("50000", "70000", 2),  # in between only
        ("0", "0x20000", 2),
        ("0", "broken", None),
    ],
)
def test_firmware_bits_at_the_ends_or_new(tmp_path: Path, before: str, after: str, bits: int | None) -> None:
    plant(tmp_path, {PI_BITS: before})
    assert happened(tmp_path, {PI_BITS: after}, [0])["firmware_throttled"] == bits


@pytest.mark.parametrize(
    "place",
    [
        "sys/class/hwmon/hwmon4",
        "sys/devices/platform/soctherm-oc-event",
        "sys/devices/platform/soctherm_oc/hwmon/hwmon3",
    ],
)
def test_jetson_orin_nano(tmp_path: Path, place: str) -> None:
    counts = {f"{place}/oc{n}_event_cnt": f"{count}\n" for n, count in ((1, 2), (2, 0), (3, 40))}
    plant(tmp_path, counts | zone(0, "cpu-thermal", "52031") | zone(1, "tj-thermal", "53312"))
    plant(
        tmp_path, zone(2, "PMIC-Die", "100000") | zone(3, "gpu-thermal", "70000") | zone(4, "soc0-thermal", "-256000")
    )
    plant(tmp_path, clocks(0, 1_510_400, 1_510_400, "schedutil") | cooling(0, "cpu-throttle-alert", 0))
    change = {f"{place}/oc1_event_cnt": "3\n", f"{place}/oc3_event_cnt": "45\n", **cooling(0, "cpu-throttle-alert", 1)}
    values = happened(tmp_path, change, [0])
    assert [values[f"oc{n}_events"] for n in (1, 2, 3)] == [1, 0, 5]
    assert values["temperature_c"] == 53.312 and values["cooling_state"] == 1


def test_x86_with_boost_and_throttling(tmp_path: Path) -> None:
    for cpu in (0, 1):
        plant(tmp_path, clocks(cpu, 2_800_000, 4_700_000, "performance"))
        plant(tmp_path, {f"{CPU}/cpu{cpu}/cpufreq/base_frequency": "2800000\n"})
        plant(tmp_path, {f"{CPU}/cpu{cpu}/topology/thread_siblings_list": "0-1\n"})
        plant(tmp_path, {f"{CPU}/cpu{cpu}/thermal_throttle/core_throttle_count": "7\n"})
    plant(tmp_path, {f"{CPU}/cpu0/thermal_throttle/package_throttle_count": "9\n"})
    plant(tmp_path, cooling(0, "Processor", 0) | cooling(1, "intel_powerclamp", -1) | zone(0, "x86_pkg_temp", "71000"))
    values = happened(tmp_path, {f"{CPU}/cpu1/thermal_throttle/core_throttle_count": "10\n"}, [0, 1])
    assert values["clock_share"] == 1.0  # the boost is not what all cores keep
    assert (values["fixed_clock"], values["smt_siblings"], values["throttle_events"]) == (1, 2, 3)
    assert (values["cooling_state"], values["temperature_c"]) == (0, 71)
    assert board_state([0], tmp_path).smt_siblings == 0


def test_a_power_clamp_that_is_off(tmp_path: Path) -> None:
    assert board_state([0], plant(tmp_path, cooling(0, "intel_powerclamp", -1))).cooling_state == 0


@pytest.mark.parametrize(
    ("kind", "slows"),
    [
        ("cpu-fan", False),
        ("gpu_fan", False),
        ("Fan", False),
        ("gpu-throttle-alert", True),  # a run with CUDA is slowed by it
        ("thermal-cpufreq-0", True),
        ("thermal-devfreq-0", True),
        ("Processor", True),
        ("iwlwifi_1", False),
    ],
)
def test_the_bench_and_the_probe_take_the_same_devices_for_throttling(tmp_path: Path, kind: str, slows: bool) -> None:
    plant(tmp_path, cooling(0, kind, 2))
    assert board_state([0], tmp_path).cooling_state == (2 if slows else None)
    told = [{"type": kind, "state": 2, "max_state": None}]
    assert throttling(tmp_path, nobody)["cooling"] == (told if slows else None)


def test_amd_nominal_clock(tmp_path: Path) -> None:
    plant(tmp_path, clocks(0, 3_000_000, 5_200_000, "powersave") | {f"{CPU}/cpu0/acpi_cppc/nominal_freq": "4000\n"})
    assert board_state([0], tmp_path).clock_share == 0.75


def test_big_and_little_cores(tmp_path: Path) -> None:
    plant(tmp_path, {f"{CPU}/cpu{cpu}/cpu_capacity": f"{c}\n" for cpu, c in enumerate((446, 1009, 1024))})
    assert board_state([0, 2], tmp_path).mixed_cores is True
    assert board_state([1, 2], tmp_path).mixed_cores is False  # a favoured core


def test_a_plain_virtual_machine_tells_nothing(tmp_path: Path) -> None:
    seen = board_state([0, 1], tmp_path)
    assert seen.over_current == (None, None, None)
    rest = {name: value for name, value in vars(seen).items() if name != "over_current"}
    assert set(rest.values()) == {None}


def test_a_zone_that_cannot_be_read(tmp_path: Path) -> None:
    plant(tmp_path, {"sys/class/thermal/thermal_zone0/type": "cpu-thermal\n"})
    assert temperature(tmp_path) is None
