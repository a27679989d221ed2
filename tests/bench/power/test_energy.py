import time
from collections.abc import Callable, Iterator
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


def iio(chip: str, *rails: tuple[str, int]) -> dict[str, str]:
    """As JetPack 4 shows the rails: milliwatts."""
    files = {}
    for n, (label, milliwatts) in enumerate(rails):
        files |= {f"{I2C}/ina3221x/{chip}/rail_name_{n}": f"{label}\n"}
        files |= {f"{I2C}/ina3221x/{chip}/in_power{n}_input": f"{milliwatts}\n"}
    return files


AGX_ORIN = {
    **hwmon("1-0040", {1: ("VDD_GPU_SOC", 20000, 500), 2: ("VDD_CPU_CV", 20000, 100), 3: ("VIN_SYS_5V0", 5000, 800)}),
    **hwmon("1-0041", {1: ("NC", 5000, 10), 2: ("VDDQ_1V8AO", 5000, 200), 7: ("sum of shunt voltages", 9000, 9000)}),
}
XAVIER_NX = iio("7-0040/iio:device0", ("VDD_IN", 4824), ("VDD_CPU_GPU_CV", 1100), ("NC", 7))
NANO = iio("6-0040/iio:device0", ("POM_5V_IN", 1750), ("POM_5V_GPU", 0), ("POM_5V_CPU", 366))
AGX_XAVIER = {
    **iio("1-0040/iio:device0", ("GPU", 18401), ("CPU", 2301)),
    **iio("1-0041/iio:device1", ("CV", 0), ("VDDRQ", 2914)),
}
THOR = hwmon("2-0040", {1: ("VDD_GPU", 20000, 200), 2: ("VDD_CPU_SOC", 20000, 300), 3: ("VIN_SYS_5V0", 5000, 1000)})
THOR_INPUT = {f"{I2C}/ina238/2-0044/hwmon/hwmon4/power1_input": "16802000\n"}  # a chip of its own


@pytest.mark.parametrize(
    ("files", "rails", "scope", "watts"),
    [
        (hwmon("1-0040", ORIN_NANO), "VDD_IN", "module_input", 5.08),
        (AGX_ORIN, "VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0 + VDDQ_1V8AO", "rails_sum", 10 + 2 + 4 + 1),
        (XAVIER_NX, "VDD_IN", "module_input", 4.824),
        (NANO, "POM_5V_IN", "module_input", 1.75),
        (AGX_XAVIER, "GPU + CPU + CV + VDDRQ", "rails_sum", 18.401 + 2.301 + 2.914),
        (THOR, "VDD_GPU + VDD_CPU_SOC + VIN_SYS_5V0", "rails_sum", 4 + 6 + 5),
        (THOR | THOR_INPUT, "VIN", "module_input", 16.802),
    ],
)
def test_rails_of_jetson_boards(tmp_path: Path, files: dict[str, str], rails: str, scope: str, watts: float) -> None:
    sensor = sensor_of(plant(tmp_path, files))
    assert (sensor.source, sensor.scope, sensor.counts) == (f"INA3221 {rails}", scope, False)
    assert rails.replace(" + ", ", ") in sensor.covers and ("carrier" in sensor.covers) is (scope == "module_input")
    assert sensor.read() == pytest.approx(watts)


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
    assert find_sensor(plant(tmp_path / "chip", THOR_INPUT)) == (None, NO_SENSOR)  # alone it may belong to anything
    with Recorder(tmp_path) as recorder:
        assert recorder.energy(0.0, 1.0) == (None, NO_SENSOR)
        assert recorder.facts() == {"source": None, "reasons": [NO_SENSOR]}


def recorded(root: Path, values: dict[float, float], files: Callable[[float], dict[str, str]]) -> Recorder:
    """A recorder that has read these values at these seconds, from the files that they stand in."""
    moments: Iterator[float] = iter([*values, 1e6])
    recorder = Recorder(plant(root, files(1)), clock=lambda: next(moments))
    for value in values.values():
        plant(root, files(value))
        recorder.take()
    return recorder


def watts(value: float) -> dict[str, str]:
    """On Orin Nano's input rail."""
    return hwmon("1-0040", {1: ("VDD_IN", 5000, round(value * 200))})


def joules(value: float) -> dict[str, str]:
    return rapl(0, "package-0", round(value * 1e6))


def test_power_is_integrated_with_its_ends_interpolated(tmp_path: Path) -> None:
    recorder = recorded(tmp_path, {0.0: 5.0, 1.0: 5.0, 2.0: 10.0, 3.0: 20.0, 4.0: 20.0}, watts)
    energy, reason = recorder.energy(1.5, 3.5, idle=(0.0, 1.0))
    # 7.5 W at 1.5 s, 10 W at 2 s, 20 W from 3 s on
    expected = 0.5 * (7.5 + 10) / 2 + 1.0 * (10 + 20) / 2 + 0.5 * 20
    assert reason is None
    assert energy == Energy(pytest.approx(expected), 2.0, pytest.approx(5.0), "module_input", "INA3221 VDD_IN", 1.0)


def test_windows_without_readings_and_readings_that_fail(tmp_path: Path) -> None:
    recorder = recorded(tmp_path, {0.0: 5.0, 1.0: 5.0, 2.0: 5.0}, watts)
    plant(tmp_path, {f"{I2C}/ina3221/1-0040/hwmon/hwmon3/curr1_input": "\n"})  # from now on every reading is left out
    energy, _ = recorder.energy(0.0, 2.0, idle=(-1.0, -0.5))
    assert energy is not None and energy.idle_w is None and energy.decode_j == pytest.approx(10)
    energy, reason = recorder.energy(0.5, 1.5)
    assert energy is None
    assert reason == "1 power readings in 1.00 s of decode, 2 are the least: generate more tokens"


def test_a_counter_is_interpolated_at_the_ends_and_one_that_a_hypervisor_keeps_still_is_unknown(tmp_path: Path) -> None:
    energy, _ = recorded(tmp_path, {0.0: 0, 1.0: 10, 2.0: 30, 3.0: 60}, joules).energy(0.5, 2.5)
    assert energy is not None and energy.decode_j == pytest.approx(45 - 5)
    assert (energy.scope, energy.rate_hz) == ("package", 1.0)
    energy, reason = recorded(tmp_path / "still", {0.0: 1, 1.0: 1, 2.0: 1}, joules).energy(0.0, 2.0)
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
    times, power = np.cumsum([distance for distance, _ in readings]), np.array([value for _, value in readings])
    begin, stop = (times[0] + share * (times[-1] - times[0]) for share in (start, end))
    found, reason = window_joules(times, power, begin, stop, counts=False)
    if ((times >= begin) & (times <= stop)).sum() < 2:
        assert found is None and "readings" in str(reason)
        return
    grid = np.union1d(np.linspace(begin, stop, 7), times[(times > begin) & (times < stop)])
    middle = np.interp((grid[1:] + grid[:-1]) / 2, times, power)  # exact on every linear piece
    assert found == pytest.approx(float(np.sum(middle * np.diff(grid))), rel=1e-9)
    counter = np.concatenate([[0.0], np.cumsum(np.diff(times) * 7.0)])  # a constant 7 W
    assert window_joules(times, counter, begin, stop, counts=True)[0] == pytest.approx(7.0 * (stop - begin))


def test_a_gap_in_the_readings_is_not_bridged() -> None:
    times = np.array([0.0, 0.1, 0.2, 0.3, 0.4, 2.9, 3.0, 3.1])
    power = np.full(8, 5.0)
    assert window_joules(times, power, 0.0, 0.4, False)[0] == pytest.approx(2.0)
    silent = "the power sensor was silent for 2.50 s of 3.00 s of decode"
    assert window_joules(times, power, 0.0, 3.0, False) == (None, silent)
    assert window_joules(times, power, 2.9, 5.0, False)[0] is None  # nothing after 3.1 s


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
