from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fake_trees import plant

from bench.measure.result import Energy, Sample
from bench.power.energy import Recorder, find_sensor, window_joules
from bench.power.sensors import NO_SENSOR, NOT_ALLOWED, Sensor

I2C = "sys/bus/i2c/drivers"
RAPL = "sys/class/powercap/intel-rapl:{n}"


def hwmon(chip: str, rails: dict[int, tuple[str, int, int]]) -> dict[str, str]:
    files = {}
    for number, (label, millivolts, milliamperes) in rails.items():
        base = f"{I2C}/ina3221/{chip}/hwmon/hwmon3"
        files[f"{base}/in{number}_label"] = f"{label}\n"
        files[f"{base}/in{number}_input"] = f"{millivolts}\n"
        files[f"{base}/curr{number}_input"] = f"{milliamperes}\n"
    return files


def rapl(number: int, name: str, microjoules: int, reach: int = 262_143_328_850) -> dict[str, str]:
    base = RAPL.format(n=number)
    return {
        f"{base}/name": f"{name}\n",
        f"{base}/energy_uj": f"{microjoules}\n",
        f"{base}/max_energy_range_uj": f"{reach}\n",
    }


def sensor_of(root: Path) -> Sensor:
    sensor, reason = find_sensor(root)
    assert sensor is not None and reason is None
    return sensor


ORIN_NANO = {
    1: ("VDD_IN", 5080, 1000),
    2: ("VDD_CPU_GPU_CV", 5080, 300),
    3: ("VDD_SOC", 5072, 200),
    7: ("sum of shunt voltages", 9, 9),
}


def test_jetson_orin_nano_has_an_input_rail(tmp_path: Path) -> None:
    sensor = sensor_of(plant(tmp_path, hwmon("1-0040", ORIN_NANO)))
    assert (sensor.source, sensor.scope, sensor.counts) == ("INA3221 VDD_IN", "module_input", False)
    assert sensor.read() == pytest.approx(5.08)


def test_jetson_agx_orin_has_rails_only(tmp_path: Path) -> None:
    first = {1: ("VDD_GPU_SOC", 20000, 500), 2: ("VDD_CPU_CV", 20000, 100), 3: ("VIN_SYS_5V0", 5000, 800)}
    second = {1: ("NC", 5000, 10), 2: ("VDDQ_VDD2_1V8AO", 5000, 200), 7: ("sum of shunt voltages", 9000, 9000)}
    sensor = sensor_of(plant(tmp_path, hwmon("1-0040", first) | hwmon("1-0041", second)))
    assert sensor.scope == "rails_sum" and "VIN_SYS_5V0" in sensor.source and "NC" not in sensor.source
    assert sensor.read() == pytest.approx(10 + 2 + 4 + 1)


def test_jetson_xavier_nx_on_jetpack_4(tmp_path: Path) -> None:
    base = f"{I2C}/ina3221x/7-0040/iio:device0"
    rails = {"rail_name_0": "VDD_IN\n", "in_power0_input": "4824\n", "rail_name_1": "VDD_CPU_GPU_CV\n"}
    rails |= {"in_power1_input": "1100\n", "rail_name_2": "NC\n"}
    sensor = sensor_of(plant(tmp_path, {f"{base}/{name}": text for name, text in rails.items()}))
    assert sensor.source == "INA3221 VDD_IN" and sensor.read() == pytest.approx(4.824)


def test_jetson_nano_and_agx_xavier_on_jetpack_4(tmp_path: Path) -> None:
    nano = {"rail_name_0": "POM_5V_IN\n", "in_power0_input": "1750\n", "rail_name_1": "POM_5V_GPU\n"}
    nano |= {"in_power1_input": "0\n", "rail_name_2": "POM_5V_CPU\n", "in_power2_input": "366\n"}
    root = plant(tmp_path / "nano", {f"{I2C}/ina3221x/6-0040/iio:device0/{name}": text for name, text in nano.items()})
    sensor = sensor_of(root)
    assert (sensor.source, sensor.scope) == ("INA3221 POM_5V_IN", "module_input")
    assert sensor.read() == pytest.approx(1.75)
    xavier = {"1-0040/iio:device0": ("GPU", 18401, "CPU", 2301), "1-0041/iio:device1": ("CV", 0, "VDDRQ", 2914)}
    for chip, (first, one, second, two) in xavier.items():
        base = f"{I2C}/ina3221x/{chip}"
        plant(tmp_path / "agx", {f"{base}/rail_name_0": first, f"{base}/in_power0_input": str(one)})
        plant(tmp_path / "agx", {f"{base}/rail_name_1": second, f"{base}/in_power1_input": str(two)})
    sensor = sensor_of(tmp_path / "agx")
    assert sensor.scope == "rails_sum" and "GPU, CPU, CV, VDDRQ" in sensor.covers
    assert sensor.read() == pytest.approx(18.401 + 2.301 + 2.914)


def test_jetson_thor_has_a_chip_of_its_own_at_the_input(tmp_path: Path) -> None:
    rails = {1: ("VDD_GPU", 20000, 200), 2: ("VDD_CPU_SOC_MSS", 20000, 300), 3: ("VIN_SYS_5V0", 5000, 1000)}
    plant(tmp_path, hwmon("2-0040", rails))
    assert sensor_of(tmp_path).scope == "rails_sum"
    plant(tmp_path, {f"{I2C}/ina238/2-0044/hwmon/hwmon4/power1_input": "16802000\n"})
    sensor = sensor_of(tmp_path)
    assert (sensor.source, sensor.scope) == ("INA3221 VIN", "module_input")
    assert "carrier" in sensor.covers
    assert sensor.read() == pytest.approx(16.802)


def test_an_input_chip_alone_may_belong_to_anything(tmp_path: Path) -> None:
    plant(tmp_path, {f"{I2C}/ina238/2-0044/hwmon/hwmon4/power1_input": "16802000\n"})
    assert find_sensor(tmp_path) == (None, NO_SENSOR)


def test_a_channel_that_is_switched_off_is_left_out_and_told(tmp_path: Path) -> None:
    plant(tmp_path, hwmon("1-0040", {1: ("VDD_GPU_SOC", 20000, 500), 2: ("VDD_CPU_CV", 20000, 100)}))
    current = tmp_path / f"{I2C}/ina3221/1-0040/hwmon/hwmon3/curr2_input"
    current.write_text("\n")
    sensor = sensor_of(tmp_path)
    assert sensor.source == "INA3221 VDD_GPU_SOC" and sensor.read() == pytest.approx(10)
    assert sensor.passed_over == ("INA3221 rail VDD_CPU_CV cannot be read (no number)",)
    assert Recorder(tmp_path).facts()["reasons"] == list(sensor.passed_over)


def test_x86_packages_without_their_parts(tmp_path: Path) -> None:
    plant(tmp_path, rapl(0, "package-0", 5_000_000) | rapl(1, "package-1", 7_000_000) | rapl(2, "psys", 1_000_000))
    plant(tmp_path, {f"{RAPL.format(n='0')}:0/name": "core\n", f"{RAPL.format(n='0:0')}/energy_uj": "1\n"})
    sensor = sensor_of(tmp_path)
    assert (sensor.source, sensor.scope, sensor.counts) == ("RAPL", "package", True)
    plant(tmp_path, rapl(0, "package-0", 6_500_000) | rapl(1, "package-1", 7_250_000) | rapl(2, "psys", 9_000_000))
    assert sensor.read() == pytest.approx(1.75)
    assert sensor.read() == pytest.approx(1.75)


def test_a_counter_that_starts_again(tmp_path: Path) -> None:
    sensor = sensor_of(plant(tmp_path, rapl(0, "package-0", 9_000_000, reach=10_000_000)))
    plant(tmp_path, rapl(0, "package-0", 500_000, reach=10_000_000))
    assert sensor.read() == pytest.approx(1.5)
    plant(tmp_path, rapl(0, "package-0", 2_500_000, reach=10_000_000))
    assert sensor.read() == pytest.approx(3.5)


def test_a_counter_that_only_root_may_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(tmp_path, rapl(0, "package-0", 1))
    read = Path.read_text

    def guarded(path: Path, *args: object, **more: object) -> str:
        if path.name == "energy_uj":
            raise PermissionError(path)
        return read(path)

    monkeypatch.setattr(Path, "read_text", guarded)
    assert find_sensor(tmp_path) == (None, NOT_ALLOWED)


def test_a_plain_virtual_machine(tmp_path: Path) -> None:
    assert find_sensor(tmp_path) == (None, NO_SENSOR)
    with Recorder(tmp_path) as recorder:
        assert recorder.energy(0.0, 1.0) == (None, NO_SENSOR)
        assert recorder.facts() == {"source": None, "reasons": [NO_SENSOR]}


def recorded(root: Path, watts: dict[float, float]) -> Recorder:
    """A recorder of Orin Nano's input rail that has read these watts at these seconds."""
    moments: Iterator[float] = iter([*watts, 1e6])
    recorder = Recorder(plant(root, hwmon("1-0040", ORIN_NANO)), clock=lambda: next(moments))
    for value in watts.values():
        plant(root, hwmon("1-0040", {1: ("VDD_IN", 5000, round(value * 200))}))
        recorder.take()
    return recorder


def test_power_is_integrated_with_its_ends_interpolated(tmp_path: Path) -> None:
    recorder = recorded(tmp_path, {0.0: 5.0, 1.0: 5.0, 2.0: 10.0, 3.0: 20.0, 4.0: 20.0})
    energy, reason = recorder.energy(1.5, 3.5, idle=(0.0, 1.0))
    # 7.5 W at 1.5 s, 10 W at 2 s, 20 W from 3 s on
    joules = 0.5 * (7.5 + 10) / 2 + 1.0 * (10 + 20) / 2 + 0.5 * 20
    assert reason is None
    assert energy == Energy(pytest.approx(joules), 2.0, pytest.approx(5.0), "module_input", "INA3221 VDD_IN", 1.0)


def test_a_window_shorter_than_two_readings(tmp_path: Path) -> None:
    recorder = recorded(tmp_path, {0.0: 5.0, 1.0: 5.0, 2.0: 5.0})
    assert recorder.energy(0.5, 1.5) == (
        None,
        "1 power readings in 1.00 s of decode, 2 are the least: generate more tokens",
    )


def test_an_idle_window_without_readings_leaves_idle_power_unknown(tmp_path: Path) -> None:
    energy, _ = recorded(tmp_path, {0.0: 5.0, 1.0: 5.0, 2.0: 5.0}).energy(0.0, 2.0, idle=(-1.0, -0.5))
    assert energy is not None and energy.idle_w is None and energy.decode_j == pytest.approx(10)


def test_a_reading_that_fails_is_left_out(tmp_path: Path) -> None:
    recorder = recorded(tmp_path, {0.0: 5.0, 1.0: 5.0})
    plant(tmp_path, {f"{I2C}/ina3221/1-0040/hwmon/hwmon3/curr1_input": "\n"})
    recorder.take()
    energy, _ = recorder.energy(0.0, 1.0)
    assert energy is not None and energy.decode_j == pytest.approx(5.0)


def test_a_counter_is_interpolated_at_the_ends(tmp_path: Path) -> None:
    moments = iter([0.0, 1.0, 2.0, 3.0, 9.0])
    plant(tmp_path, rapl(0, "package-0", 0))
    recorder = Recorder(tmp_path, clock=lambda: next(moments))
    for joules in (0, 10, 30, 60):
        plant(tmp_path, rapl(0, "package-0", joules * 1_000_000))
        recorder.take()
    energy, _ = recorder.energy(0.5, 2.5)
    assert energy is not None and energy.decode_j == pytest.approx(45 - 5)
    assert (energy.scope, energy.rate_hz) == ("package", 1.0)


def test_a_counter_that_a_hypervisor_keeps_still_is_unknown_and_not_zero(tmp_path: Path) -> None:
    moments = iter([0.0, 1.0, 2.0, 9.0])
    recorder = Recorder(plant(tmp_path, rapl(0, "package-0", 0)), clock=lambda: next(moments))
    for _ in range(3):
        recorder.take()
    energy, reason = recorder.energy(0.0, 2.0)
    assert energy is None and reason == "the power sensor told 0 J in 2.00 s of decode: it does not work here"


def test_a_counter_without_its_range_is_told(tmp_path: Path) -> None:
    plant(tmp_path, rapl(0, "package-0", 1))
    (tmp_path / RAPL.format(n=0) / "max_energy_range_uj").unlink()
    assert find_sensor(tmp_path) == (None, "RAPL is there, but its counters cannot be read")


@given(
    st.lists(st.tuples(st.floats(0.05, 0.15), st.floats(1, 50)), min_size=8, max_size=40),
    st.floats(0.1, 0.4),
    st.floats(0.6, 0.9),
)
@settings(deadline=None, max_examples=100)
def test_the_integral_is_exact_for_power_that_changes_linearly(
    readings: list[tuple[float, float]], start: float, end: float
) -> None:
    times = np.cumsum([distance for distance, _ in readings])
    watts = np.array([value for _, value in readings])
    begin, stop = (times[0] + share * (times[-1] - times[0]) for share in (start, end))
    joules, reason = window_joules(times, watts, begin, stop, counts=False)
    if ((times >= begin) & (times <= stop)).sum() < 2:
        assert joules is None and "readings" in str(reason)
        return
    grid = np.union1d(np.linspace(begin, stop, 7), times[(times > begin) & (times < stop)])
    middle = np.interp((grid[1:] + grid[:-1]) / 2, times, watts)  # exact on every linear piece
    assert joules == pytest.approx(float(np.sum(middle * np.diff(grid))), rel=1e-9)
    counter = np.concatenate([[0.0], np.cumsum(np.diff(times) * 7.0)])  # a constant 7 W
    assert window_joules(times, counter, begin, stop, counts=True)[0] == pytest.approx(7.0 * (stop - begin))


def test_a_gap_in_the_readings_is_not_bridged() -> None:
    times = np.array([0.0, 0.1, 0.2, 0.3, 0.4, 2.9, 3.0, 3.1])
    watts = np.full(8, 5.0)
    assert window_joules(times, watts, 0.0, 0.4, False)[0] == pytest.approx(2.0)
    assert window_joules(times, watts, 0.0, 3.0, False) == (
        None,
        "the power sensor was silent for 2.50 s of 3.00 s of decode",
    )
    assert window_joules(times, watts, 2.9, 5.0, False)[0] is None  # nothing after 3.1 s


def test_results_from_before_estimates(tmp_path: Path) -> None:
    sample = {"started_at": "", "order": 0, "load_s": 1.0, "warmup_s": [], "prefill_s": None, "ttft_s": None}
    sample |= {"token_s": [0.1], "peak_load_bytes": None, "peak_decode_bytes": None, "anonymous_bytes": None}
    energy = {"decode_j": 1.0, "window_s": 1.0, "idle_w": None, "scope": "package", "source": "RAPL", "rate_hz": 9.0}
    made = msgspec.convert({**sample, "file_bytes": None, "energy": energy}, Sample)
    assert made.energy == Energy(**energy, estimate=False)


def test_the_thread_reads_at_its_rate_and_ends(tmp_path: Path) -> None:
    start = time.monotonic()
    with Recorder(plant(tmp_path, hwmon("1-0040", ORIN_NANO)), rate_hz=100) as recorder:
        time.sleep(0.3)
    end = time.monotonic()
    energy, _ = recorder.energy(start, end)
    assert energy is not None
    assert energy.decode_j == pytest.approx(5.08 * (end - start), rel=1e-3)
    assert 20 < energy.rate_hz < 101
    count = len(recorder._times)
    time.sleep(0.03)
    assert len(recorder._times) == count


def test_this_host_has_a_sensor_or_says_why_not() -> None:
    sensor, reason = find_sensor()
    assert (sensor is None) is bool(reason)
    if sensor and sensor.read:
        assert np.isfinite(sensor.read())
