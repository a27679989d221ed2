from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from devices.probe import ISA_FEATURES
from devices.profile import PROFILES, DeviceError, load_profile, load_profiles, read_profile

HEAD = 'title = "Board"\narchitecture = "aarch64"\ncpu = "4x Core"\n'
BANDWIDTH = '[numbers.memory_bandwidth]\nvalue = 17_100_000_000\nunit = "B/s"\nlevel = "computed"\nsource = "32 bit"\n'


def test_all_profiles_are_valid_and_name_known_features() -> None:
    profiles = load_profiles()
    assert len(profiles) == len(list(PROFILES.glob("*.toml"))) >= 18
    for name, profile in profiles.items():
        assert profile.name == name
        assert set(profile.isa + profile.lacks) <= set(ISA_FEATURES.values()), name
        assert "memory_bandwidth" in profile.numbers, name
        big = profile.numbers.get("big_cores")
        assert big is None or (big.value or 0) < (profile.numbers["cores"].value or 0)


@pytest.mark.parametrize(
    ("name", "bandwidth", "level"),
    [
        ("raspberry-pi-4", 12.8e9, "computed"),
        ("raspberry-pi-5", 17.1e9, "computed"),
        ("intel-n100-ddr4", 25.6e9, "computed"),
        ("intel-n100-ddr5", 38.4e9, "computed"),
        ("jetson-nano", 25.6e9, "vendor"),
        ("jetson-orin-nano", 68e9, "vendor"),
        ("jetson-orin-nano-super", 102e9, "vendor"),
        ("jetson-agx-orin", 204.8e9, "vendor"),
        ("jetson-agx-thor", 273e9, "vendor"),
        ("generic-arm64", None, "unknown"),
    ],
)
def test_bandwidths(name: str, bandwidth: float | None, level: str) -> None:
    number = load_profile(name).numbers["memory_bandwidth"]
    assert (number.value, number.unit, number.level) == (bandwidth, "B/s", level)


def test_reported_bandwidth_stays_below_the_ceiling() -> None:
    for profile in load_profiles().values():
        ceiling = profile.numbers["memory_bandwidth"].value
        for key in ("copy_bandwidth", "decode_bandwidth"):
            if key in profile.numbers:
                assert ceiling is not None and (profile.numbers[key].value or 0) < ceiling, profile.name


def test_old_boards_are_known_to_lack_dotprod() -> None:
    assert "dotprod" in load_profile("raspberry-pi-4").lacks
    assert "dotprod" in load_profile("raspberry-pi-5").isa


def test_unknown_device_lists_the_names() -> None:
    with pytest.raises(DeviceError, match=r"no device 'toaster': choose one of .*raspberry-pi-5") as caught:
        load_profile("toaster")
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    with pytest.raises(DeviceError, match="no device"):
        load_profile("../profiles/raspberry-pi-5")


def test_a_minimal_profile(tmp_path: Path) -> None:
    path = tmp_path / "board.toml"
    path.write_text(HEAD + BANDWIDTH, encoding="utf-8")
    profile = read_profile(path)
    assert (profile.name, profile.gpu, profile.isa) == ("board", None, ())
    assert profile.numbers["memory_bandwidth"].value == 17.1e9


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("title = ", "is not TOML"),
        (HEAD.replace("aarch64", "riscv64"), r"architecture is 'riscv64', allowed are aarch64, x86_64"),
        (HEAD.replace("cpu", "cqu"), "has cqu, allowed are"),
        (HEAD.replace('"Board"', "3"), "title must be a text"),
        (HEAD + 'isa = "asimd"\n', "isa must be a list"),
        (HEAD + 'isa = ["fp16"]\nlacks = ["fp16"]\n', "fp16 stands in isa and in lacks"),
        (HEAD + "numbers = 3\n", "numbers must be a table"),
        (HEAD + BANDWIDTH.replace("memory_bandwidth", "speed"), r"numbers.speed is not known, allowed are cores"),
        (HEAD + BANDWIDTH.replace("B/s", "GB/s"), r"memory_bandwidth.unit is 'GB/s', it must be 'B/s'"),
        (HEAD + BANDWIDTH.replace("computed", "guessed"), r"level is 'guessed', allowed are vendor, measured"),
        (HEAD + BANDWIDTH.replace("computed", "unknown"), "left out where level is unknown"),
        (HEAD + BANDWIDTH.replace("value", "# value"), "left out where level is unknown, and only there"),
        (HEAD + BANDWIDTH.replace("17_100_000_000", "-1"), "must be a positive number"),
        (HEAD + BANDWIDTH.replace("17_100_000_000", "nan"), "must be a positive number"),
        (HEAD + BANDWIDTH.replace("17_100_000_000", "true"), "must be a positive number"),
        (HEAD + BANDWIDTH.replace("32 bit", " "), "must say where the number comes from"),
        (HEAD + "[numbers]\nmemory_bandwidth = 3\n", "must be a table of value"),
    ],
)
def test_errors_name_file_key_and_what_is_allowed(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "broken.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DeviceError, match=says) as caught:
        read_profile(path)
    assert "broken.toml" in str(caught.value) and "\n" not in str(caught.value)


def test_devices_imports_nothing_heavy() -> None:
    code = "import sys, devices.probe, devices.profile; print({'torch', 'numpy', 'onnxruntime'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
