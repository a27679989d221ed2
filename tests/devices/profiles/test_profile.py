import subprocess
import sys
from pathlib import Path

import pytest

from devices.profiles.profile import PROFILES, UNITS, DeviceError, load_profile, load_profiles, profile_of, read_profile

HEAD = 'title = "Board"\narchitecture = "aarch64"\ncpu = "4x Core"\n'
BANDWIDTH = '[numbers.memory_bandwidth]\nvalue = 17_100_000_000\nunit = "B/s"\nlevel = "computed"\nsource = "32 bit"\n'
RUNTIME = '[runtime]\nonnxruntime = "1.23.2"\npython = "3.10"\nsystem = "J"\nlevel = "vendor"\nsource = "PyPI"\n'


def test_all_profiles_are_valid_and_name_known_features() -> None:
    profiles = load_profiles()
    assert len(profiles) == len(list(PROFILES.glob("*.toml"))) >= 18
    for name, profile in profiles.items():
        assert profile.name == name
        for key, number in profile.numbers.items():
            assert number.unit == UNITS[key] and number.source.strip(), (name, key)
            assert (number.value is None) == (number.level == "unknown"), (name, key)
        assert "memory_bandwidth" in profile.numbers, name
        big = profile.numbers.get("big_cores")
        assert big is None or (big.value or 0) < (profile.numbers["cores"].value or 0)


def test_a_board_says_what_runs_there() -> None:
    """Every Jetson and every Raspberry Pi names its GPU's architecture or none, and the ONNX Runtime of its system."""
    boards = {name: (p.cuda, p.runtime and p.runtime.onnxruntime) for name, p in load_profiles().items() if p.runtime}
    assert boards == {
        "raspberry-pi-4": (None, "1.32.0"),
        "raspberry-pi-5": (None, "1.32.0"),
        "jetson-nano": ("sm_53", "1.10.0"),
        "jetson-xavier-nx": ("sm_72", "1.19.2"),
        "jetson-orin-nano": ("sm_87", "1.23.2"),
        "jetson-orin-nano-super": ("sm_87", "1.23.2"),
        "jetson-orin-nx": ("sm_87", "1.23.2"),
        "jetson-agx-orin": ("sm_87", "1.23.2"),
        "jetson-agx-thor": ("sm_110", "1.32.0"),
    }


def test_memory_that_a_system_sees_is_less_than_there_is() -> None:
    shares = {
        name: (profile.numbers["memory_visible"].value or 0) / (profile.numbers["memory_capacity"].value or 1)
        for name, profile in load_profiles().items()
        if "memory_visible" in profile.numbers
    }
    assert len(shares) == 6 and all(0.9 < share < 1 for share in shares.values()), shares


def test_no_two_profiles_claim_a_board() -> None:
    claimed = [name for profile in load_profiles().values() for name in profile.compatible]
    assert len(claimed) == len(set(claimed)) >= 25


def test_the_most_exact_name_decides() -> None:
    profiles = load_profiles()
    super_firmware = ["nvidia,p3768-0000+p3767-0005-super", "nvidia,p3767-0005", "nvidia,tegra234"]
    assert profile_of(super_firmware, profiles) == "jetson-orin-nano-super"
    assert profile_of(super_firmware[1:], profiles) == "jetson-orin-nano"
    assert profile_of(["nvidia,tegra234"], profiles) is None and profile_of(None, profiles) is None


def test_reported_bandwidth_stays_below_the_ceiling() -> None:
    for profile in load_profiles().values():
        ceiling = profile.numbers["memory_bandwidth"].value
        for key in ("copy_bandwidth", "decode_bandwidth"):
            if key in profile.numbers:
                assert ceiling is not None and (profile.numbers[key].value or 0) < ceiling, profile.name


def test_unknown_device_lists_the_names() -> None:
    with pytest.raises(DeviceError, match=r"no device 'toaster': choose one of .*raspberry-pi-5") as caught:
        load_profile("toaster")
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    with pytest.raises(DeviceError, match="no device"):
        load_profile("../profiles/raspberry-pi-5")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("raspbery-pi-5", "raspberry-pi-5"),
        ("Orin Nano", "jetson-orin-nano"),
        ("orin-nano", "jetson-orin-nano or jetson-orin-nano-super"),
        ("RK3588S", "rk3588"),
    ],
)
def test_a_mistyped_device_gets_the_near_names(name: str, near: str) -> None:
    with pytest.raises(DeviceError, match=rf"no device '{name}': is it .*{near}.* names all"):
        load_profile(name)


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
        (HEAD.replace("aarch64", "riscv64"), r"Expected `str` matching regex .*aarch64\|x86_64.* at `\$.architecture`"),
        (HEAD.replace("cpu", "cqu"), "has cqu, allowed are"),
        (HEAD.replace('"Board"', "3"), r"Expected `str`, got `int` - at `\$.title`"),
        (HEAD.replace('"Board"', '" "'), r"matching regex .* - at `\$.title`"),
        (HEAD + 'isa = "asimd"\n', r"Expected `array`, got `str` - at `\$.isa`"),
        (HEAD + 'isa = ["fp16"]\nlacks = ["fp16"]\n', "fp16 stands in isa and in lacks"),
        (HEAD + 'isa = ["neon"]\n', "neon is no feature, allowed are amx_int8, asimd"),
        (HEAD + 'cuda = "8.7"\n', r"matching regex '\^sm_.* - at `\$.cuda`"),
        (HEAD + "runtime = 3\n", "runtime: Expected `object`, got `int`"),
        (HEAD + RUNTIME.replace("1.23.2", "new"), r"runtime: .*matching regex .* at `\$.onnxruntime`"),
        (HEAD + RUNTIME.replace('"3.10"', "3.10"), r"runtime: Expected `str`, got `float` - at `\$.python`"),
        (HEAD + RUNTIME.replace("source", "sauce"), "runtime has sauce, allowed are level, onnxruntime"),
        (HEAD + RUNTIME.replace("vendor", "rumour"), r"runtime: .*\(vendor\|measured\|.* - at `\$.level`"),
        (HEAD + "numbers = 3\n", "numbers: Expected `object`, got `int`"),
        (HEAD + "numbers = " + "9" * 6000, "is not TOML"),
        (HEAD + "numbers = " + "[" * 6000, "is not TOML"),
        (HEAD + BANDWIDTH.replace("memory_bandwidth", "speed"), r"numbers.speed is not known, allowed are cores"),
        (HEAD + BANDWIDTH.replace("B/s", "GB/s"), r"memory_bandwidth.unit is 'GB/s', it must be 'B/s'"),
        (HEAD + BANDWIDTH.replace("computed", "guessed"), r"memory_bandwidth: .*\(vendor\|measured\|.* `\$.level`"),
        (HEAD + BANDWIDTH.replace("computed", "unknown"), "left out where level is unknown"),
        (HEAD + BANDWIDTH.replace("value", "# value"), "left out where level is unknown, and only there"),
        (HEAD + BANDWIDTH.replace("17_100_000_000", "-1"), r"memory_bandwidth: Expected `int` >= 1 - at `\$.value`"),
        (HEAD + BANDWIDTH.replace("17_100_000_000", "nan"), r"Expected `float` > 0.0 - at `\$.value`"),
        (HEAD + BANDWIDTH.replace("17_100_000_000", "inf"), "must be a positive number"),
        (HEAD + BANDWIDTH.replace("17_100_000_000", "true"), r"got `bool` - at `\$.value`"),
        (HEAD + BANDWIDTH.replace("32 bit", " "), r"matching regex .* at `\$.source`"),
        (HEAD + "[numbers]\nmemory_bandwidth = 3\n", "memory_bandwidth: Expected `object`, got `int`"),
    ],
)
def test_errors_name_file_key_and_what_is_allowed(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "broken.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DeviceError, match=says) as caught:
        read_profile(path)
    assert "broken.toml" in str(caught.value) and "\n" not in str(caught.value)


def test_devices_imports_nothing_heavy() -> None:
    imported = "import sys, devices.probe.host, devices.profiles.profile; "
    code = imported + "print({'torch', 'numpy', 'onnxruntime'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
