"""Which cores are chosen, what they tell of themselves, and whether they kept their clock."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from support.fake_trees import CPU, capacities, plant, zones

from bench.measure.cores import IDLE_PROBES, board_state, drift, level, probe_clock, temperature
from bench.measure.host_state import counters, snapshot
from saap.base.cores import allowed_cores, choose_cores, physical_cores

PAIRS, SIX = ["0-1", "0-1", "2-3", "2-3"], [str(cpu) for cpu in range(6)]


@pytest.mark.parametrize(
    ("siblings", "speeds", "cpus", "threads", "chosen", "physical"),
    [
        (PAIRS, [], [0, 1, 2, 3], 2, [0, 2], 2),  # one thread per core before its sibling
        (PAIRS, [], [0, 1, 2, 3], 3, [0, 1, 2], 2),
        (SIX, [400, 400, 1024, 1024, 400, 400], [*range(6)], 1, [2], 6),  # big cores first
        (SIX, [400, 400, 1024, 1024, 400, 400], [*range(6)], 3, [0, 2, 3], 6),
        ([], [], [3, 5, 7], 2, [3, 5], 3),  # without topology the first ones
    ],
)
def test_the_cores_that_are_chosen(tmp_path, siblings, speeds, cpus, threads, chosen, physical) -> None:
    shared = {f"{CPU}/cpu{cpu}/topology/thread_siblings_list": f"{text}\n" for cpu, text in enumerate(siblings)}
    root = plant(tmp_path, shared | capacities(speeds)) / CPU
    assert choose_cores(threads, cpus, root) == chosen
    assert physical_cores(cpus, root) == physical


def test_this_host() -> None:
    assert 1 <= physical_cores() <= len(allowed_cores())
    assert set(choose_cores(1)) <= set(allowed_cores())


def clocks(cpu: int, now: int, highest: int, governor: str) -> dict[str, str]:
    base = f"{CPU}/cpu{cpu}/cpufreq"
    return {
        f"{base}/scaling_cur_freq": f"{now}\n",
        f"{base}/scaling_max_freq": f"{highest}\n",
        f"{base}/cpuinfo_max_freq": f"{highest}\n",
        f"{base}/scaling_governor": f"{governor}\n",
    }


def cooling(number: int, kind: str, state: int) -> dict[str, str]:
    base = f"sys/class/thermal/cooling_device{number}"
    return {f"{base}/type": f"{kind}\n", f"{base}/cur_state": f"{state}\n"}


PI_BITS = "sys/devices/platform/soc/soc:firmware/get_throttled"


def happened(root: Path, change: dict[str, str], cpus: list[int]) -> dict[str, float | None]:
    before = snapshot(cpus, root)
    return counters(before, snapshot(cpus, plant(root, change)), len(cpus))


def test_raspberry_pi_5(tmp_path: Path) -> None:
    plant(tmp_path, {PI_BITS: "50000\n", **zones({"cpu-thermal": 61250}), **cooling(0, "pwm-fan", 3)})
    for cpu in range(4):
        plant(tmp_path, clocks(cpu, 2_400_000, 2_400_000, "ondemand"))
    seen = board_state([0, 1, 2, 3], tmp_path)
    assert (seen.clock_share, seen.fixed_clock, seen.temperature_c) == (1.0, False, 61.25)
    assert seen.firmware_bits == 0x50000
    assert seen.cooling_state is None  # a fan is not throttling
    values = happened(tmp_path, clocks(2, 1_500_000, 2_400_000, "ondemand") | zones({"cpu-thermal": 82000}), [0, 2])
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
    hot = {"cpu-thermal": 52031, "tj-thermal": 53312, "PMIC-Die": 100000, "gpu-thermal": 70000, "soc0-thermal": -256000}
    plant(tmp_path, counts | zones(hot))
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
    plant(tmp_path, cooling(0, "Processor", 0) | cooling(1, "intel_powerclamp", -1) | zones({"x86_pkg_temp": 71000}))
    values = happened(tmp_path, {f"{CPU}/cpu1/thermal_throttle/core_throttle_count": "10\n"}, [0, 1])
    assert values["clock_share"] == 1.0  # the boost is not what all cores keep
    assert (values["fixed_clock"], values["smt_siblings"], values["throttle_events"]) == (1, 2, 3)
    assert (values["cooling_state"], values["temperature_c"]) == (0, 71)
    assert board_state([0], tmp_path).smt_siblings == 0


@pytest.mark.parametrize(
    ("kind", "slows"),
    [
        *((kind, False) for kind in ("cpu-fan", "gpu_fan", "Fan", "iwlwifi_1")),
        *((kind, True) for kind in ("thermal-cpufreq-0", "thermal-devfreq-0", "Processor")),
        ("gpu-throttle-alert", True),  # a run with CUDA is slowed by it
    ],
)
def test_devices_that_throttle(tmp_path: Path, kind: str, slows: bool) -> None:
    plant(tmp_path, cooling(0, kind, 2))
    assert board_state([0], tmp_path).cooling_state == (2 if slows else None)
    clamp = plant(tmp_path / "clamp", cooling(0, "intel_powerclamp", -1))  # which is off
    assert board_state([0], clamp).cooling_state == 0


def test_amd_nominal_clock(tmp_path: Path) -> None:
    plant(tmp_path, clocks(0, 3_000_000, 5_200_000, "powersave") | {f"{CPU}/cpu0/acpi_cppc/nominal_freq": "4000\n"})
    assert board_state([0], tmp_path).clock_share == 0.75


def test_big_and_little_cores(tmp_path: Path) -> None:
    plant(tmp_path, capacities((446, 1009, 1024)))
    assert board_state([0, 2], tmp_path).mixed_cores is True
    assert board_state([1, 2], tmp_path).mixed_cores is False  # a favoured core


def test_a_plain_virtual_machine_tells_nothing(tmp_path: Path) -> None:
    seen = board_state([0, 1], tmp_path)
    assert seen.over_current == (None, None, None)
    rest = {name: value for name, value in vars(seen).items() if name != "over_current"}
    assert set(rest.values()) == {None}
    plant(tmp_path, {"sys/class/thermal/thermal_zone0/type": "cpu-thermal\n"})  # which cannot be read
    assert temperature(tmp_path) is None


IDLE = list(1e-3 + 4e-6 * np.random.default_rng(0).standard_normal(IDLE_PROBES))  # a spread of 0.4 %


def test_each_probe_is_timed_by_the_clock_that_was_given() -> None:
    ticks = iter(range(100))
    assert probe_clock(20, lambda: float(next(ticks))) == [1.0] * 20


def test_a_probe_takes_about_a_millisecond_and_allocates_nothing() -> None:
    probe_clock(20)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        probes = probe_clock(20)
        assert tracemalloc.get_traced_memory()[1] - before < 4096  # the list of its times
    finally:
        tracemalloc.stop()
    assert 5e-5 < level(probes) < 1e-2


@pytest.mark.parametrize(("factor", "moved"), [(1.0, False), (1.02, False), (1.04, True), (1 / 0.9, True), (0.9, True)])
def test_drift_beyond_three_percent(factor: float, moved: bool) -> None:
    change, limit = drift(IDLE, [seconds * factor for seconds in IDLE])
    assert change == pytest.approx(factor - 1) and limit == 0.03
    assert (abs(change) > limit) is moved


def test_a_noisy_side_widens_the_limit_and_preempted_probes_are_no_slower_clock() -> None:
    noisy = [1e-3 * (1 + 0.1 * (i % 3)) for i in range(30)]  # median 1.1 ms, half of them 0.1 ms away
    assert drift(IDLE, noisy)[1] == pytest.approx(4 * 0.1 / 1.1)
    assert drift(noisy, IDLE)[1] == drift(IDLE, noisy)[1]
    preempted = [seconds + 4e-3 * (i % 10 < 4) for i, seconds in enumerate(IDLE)]
    change, limit = drift(IDLE, preempted)
    assert abs(change) < 0.005 < limit
