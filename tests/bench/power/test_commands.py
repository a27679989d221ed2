"""Power that programs tell: real processes under the names of tegrastats and vcgencmd, on a path of their own."""

import os
import threading
import time
from pathlib import Path

import psutil
import pytest
from support.fake_trees import plant

from bench.power import commands as power_commands
from bench.power.commands import Commands, TegrastatsStream, pmic, pmic_watts, tegrastats
from bench.power.energy import Recorder, find_sensor
from bench.power.sensors import NO_SENSOR, Sensor

ORIN = "RAM 3452/7620MB (lfb 25x4MB) CPU [1%@1420] VDD_IN 5000mW/4824mW VDD_CPU_GPU_CV 518mW/518mW"
XAVIER = "RAM 5246/7771MB (lfb 7x4MB) VDD_IN 6140/5510 VDD_SOC 1074/1051"
AGX_ORIN = "RAM 18207/62841MB VDD_GPU_SOC 2412mW/2412mW VDD_CPU_CV 1607mW/1607mW VIN_SYS_5V0 4707mW/4707mW"
THOR = "RAM 17842/125772MB (lfb 79x4MB) VDD_GPU 0mW/0mW VIN_SYS_5V0 5040mW/5040mW"

PI_5 = """\
 3V7_WL_SW_A current(0)=0.00000000A
   3V3_SYS_A current(1)=0.06245952A
  VDD_CORE_A current(7)=2.50000000A
   3V3_ADC_A current(18)=0.00042735A
 3V7_WL_SW_V volt(8)=3.79999600V
   3V3_SYS_V volt(9)=3.30632200V
  VDD_CORE_V volt(15)=0.89745940V
     EXT5V_V volt(24)=5.06788000V
      BATT_V volt(25)=3.01110800V
"""


def install(root: Path, name: str, script: str) -> Commands:
    """A shell script under a program's name; the commands of a host that has it."""
    program = plant(root, {f"bin/{name}": f"#!/bin/sh\n{script}\n"}) / "bin" / name
    program.chmod(0o755)
    return Commands(str(root / "bin"))


def endless(root: Path, line: str) -> Commands:
    loop = f"while :; do echo '{line}'; sleep 0.02; done"
    return install(root, "tegrastats", f'echo $$ >> "{root}/pids"; echo "$@" > "{root}/arguments"\n{loop}')


def alive(root: Path) -> list[int]:
    return [pid for pid in map(int, (root / "pids").read_text().split()) if psutil.pid_exists(pid)]


def found(sensor: Sensor | None, reason: str | None) -> Sensor:
    assert sensor is not None and reason is None
    return sensor


def test_a_stream_is_read_from_start_to_end_and_its_process_killed(tmp_path: Path) -> None:
    commands = endless(tmp_path, ORIN)
    recorder = Recorder(tmp_path / "empty", commands=commands)
    assert (tmp_path / "arguments").read_text() == "--interval 100\n"
    assert recorder.facts() == {
        "source": "tegrastats VDD_IN",
        "scope": "module_input",
        "covers": "all that goes in at VDD_IN: the module; not its carrier board",
        "rate_hz": 10.0,
        "estimate": False,
        "reasons": [],
    }
    with recorder:
        time.sleep(0.1)
        start = time.monotonic()
        time.sleep(0.2)
        end = time.monotonic()
        time.sleep(0.1)
        assert len(alive(tmp_path)) == 1
    assert alive(tmp_path) == [] and not recorder._thread.is_alive()
    energy, reason = recorder.energy(start, end)
    assert energy is not None, reason
    assert energy.decode_j == pytest.approx(5.0 * (end - start))
    assert (energy.scope, energy.source, energy.estimate) == ("module_input", "tegrastats VDD_IN", False)
    assert energy.rate_hz > 4


@pytest.mark.parametrize(
    ("lines", "rails", "scope", "watts"),
    [
        ([XAVIER] * 2, "VDD_IN", "module_input", [6.14] * 2),
        ([AGX_ORIN] * 2, "VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0", "rails_sum", [2.412 + 1.607 + 4.707] * 2),
        ([f"{THOR} VIN 16802mW/16802mW"] * 2, "VIN", "module_input", [16.802] * 2),
        (["RAM 1/2MB", ORIN], "VDD_IN", "module_input", [5.0]),  # a first line without power is not the last word
        ([THOR, f"{THOR} VIN 16802mW/16802mW", THOR], "VIN", "module_input", [16.802]),  # nor one without the input
    ],
)
def test_rails_of_boards(tmp_path: Path, lines: list[str], rails: str, scope: str, watts: list[float]) -> None:
    sensor = found(*tegrastats(install(tmp_path, "tegrastats", "; ".join(f"echo '{line}'" for line in lines))))
    assert (sensor.source, sensor.scope, sensor.read) == (f"tegrastats {rails}", scope, None)
    assert sensor.follow is not None
    assert list(sensor.follow()) == pytest.approx(watts)


def test_lines_without_the_rail_and_lines_that_are_cut_are_left_out(tmp_path: Path) -> None:
    script = f"echo '{THOR} VIN 9000mW/1mW'; echo '{THOR}'; echo '{THOR} VIN 8000mW/1mW'; printf '{THOR} VIN 80mW/1mW'"
    commands = install(tmp_path, "tegrastats", script)
    process = commands.start([str(tmp_path / "bin/tegrastats")])
    assert list(TegrastatsStream(process, ["VIN"])) == [9.0, 8.0]
    process.wait()


@pytest.mark.parametrize("script", ["sleep 30", "echo 'RAM 1/2MB'; sleep 30", "exit 3", "echo; echo; echo; echo"])
def test_no_power_in_time_is_a_reason_and_nothing_keeps_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    monkeypatch.setattr(power_commands, "ANSWER_S", 0.3)
    commands = install(tmp_path, "tegrastats", f'echo $$ >> "{tmp_path}/pids"\n{script}')
    assert tegrastats(commands) == (None, "tegrastats printed no power within 0.3 s")
    assert alive(tmp_path) == []
    assert not [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]


def test_a_program_that_cannot_start(tmp_path: Path) -> None:
    commands = install(tmp_path, "tegrastats", "")
    (tmp_path / "bin/tegrastats").write_text("#!/no/such/shell\n")
    assert tegrastats(commands) == (None, "tegrastats cannot be started (No such file or directory)")
    commands = endless(tmp_path, ORIN)
    recorder = Recorder(tmp_path / "empty", commands=commands)
    (tmp_path / "bin/tegrastats").unlink()
    with recorder:  # it was removed since
        assert recorder.sensor is None
    energy, reason = recorder.energy(0.0, 1.0)
    assert energy is None and "tegrastats VDD_IN cannot be started" in str(reason)


def test_a_stream_that_falls_silent_gives_no_energy(tmp_path: Path) -> None:
    lines = f"for i in 1 2 3 4 5 6 7 8; do echo '{ORIN}'; sleep 0.01; done; sleep 30"
    with Recorder(tmp_path / "empty", commands=install(tmp_path, "tegrastats", lines)) as recorder:
        start = time.monotonic()
        time.sleep(0.5)
        energy, reason = recorder.energy(start, time.monotonic())
    assert energy is None and "the power sensor was silent for" in str(reason)


def test_a_raspberry_pi_5_is_an_estimate(tmp_path: Path) -> None:
    told = plant(tmp_path, {"adc": PI_5}) / "adc"
    script = f'[ "$1" = pmic_read_adc ] && cat "{told}"'
    sensor = found(*find_sensor(tmp_path / "empty", install(tmp_path, "vcgencmd", script)))
    assert (sensor.source, sensor.scope, sensor.estimate, sensor.rate_hz) == ("PMIC", "pmic_rails", True, 2.0)
    assert sensor.read is not None
    # 3V3_ADC has no volts, EXT5V and BATT no amperes; by hand:
    assert sensor.read() == pytest.approx(0.0 + 0.20651 + 2.24365, abs=1e-5)
    with Recorder(tmp_path / "empty", rate_hz=50, commands=Commands(str(tmp_path / "bin"))) as recorder:
        start = time.monotonic()
        time.sleep(0.3)
        end = time.monotonic()
        energy, reason = recorder.energy(start, end)
    assert energy is not None, reason
    assert energy.estimate and energy.decode_j == pytest.approx(2.45016 * (end - start), rel=1e-4)
    assert "missing" in recorder.facts()["covers"]


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ('echo "Can\'t open device file: /dev/vcio" >&2; exit 255', "Can't open device file: /dev/vcio"),
        ("exit 1", "exit 1"),
        ("sleep 30", "no answer within 0.3 s"),
        ("echo 'error=1 error_msg=\"Command not registered\"'", "only the power chip of a Raspberry Pi 5"),
    ],
)
def test_a_power_chip_that_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, reason: str
) -> None:
    monkeypatch.setattr(power_commands, "ANSWER_S", 0.3)
    sensor, why = pmic(install(tmp_path, "vcgencmd", f"exec 2>&1; {script}"))
    assert sensor is None and reason in str(why) and "\n" not in str(why)


@pytest.mark.parametrize(
    "told", ["", "EXT5V_V volt(24)=5.1V", "VDD_CORE_A current(7)=1.0A", "VDD_CORE_A current(7)=A\nVDD_CORE_V ?"]
)
def test_rails_without_a_pair_are_no_power(told: str) -> None:
    with pytest.raises(ValueError, match="no rail"):
        pmic_watts(told)


def test_the_order_of_trust_and_why_better_ones_were_passed_over(tmp_path: Path) -> None:
    powercap = "sys/class/powercap/intel-rapl:0"
    root = tmp_path / "root"
    plant(root, {f"{powercap}/{name}": text for name, text in
                 (("name", "package-0"), ("energy_uj", "1"), ("max_energy_range_uj", "100"))})  # fmt: skip
    commands = Commands(str(tmp_path / "bin"))
    assert found(*find_sensor(root, commands)).source == "RAPL"
    plant(tmp_path, {"adc": PI_5})
    install(tmp_path, "vcgencmd", f"cat '{tmp_path}/adc'")
    assert found(*find_sensor(root, commands)).source == "PMIC"
    endless(tmp_path, ORIN)
    assert found(*find_sensor(root, commands)).source == "tegrastats VDD_IN"
    monitor = "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon3"
    plant(root, {f"{monitor}/in1_label": "VDD_IN", f"{monitor}/in1_input": "5000", f"{monitor}/curr1_input": "1000"})
    assert found(*find_sensor(root, commands)).source == "INA3221 VDD_IN"
    (root / monitor / "curr1_input").unlink()
    (root / monitor / "curr1_input").mkdir()  # which not even root can read
    install(tmp_path, "tegrastats", "exit 1")
    sensor = found(*find_sensor(root, commands))
    assert sensor.source == "PMIC"
    assert sensor.passed_over == (
        "INA3221 rail VDD_IN cannot be read (Is a directory)",
        "tegrastats printed no power within 3 s",
    )


def test_a_recorded_tree_does_not_run_programs_of_this_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(tmp_path, {"adc": PI_5})
    install(tmp_path, "vcgencmd", f"cat '{tmp_path}/adc'")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    assert find_sensor(tmp_path / "empty") == (None, NO_SENSOR)
    assert found(*find_sensor(tmp_path / "empty", Commands())).source == "PMIC"
