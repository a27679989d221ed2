import json
import shutil
from pathlib import Path

import pytest
from support.command_line import here, refused
from support.edited import edited
from support.tiny_graphs import tiny_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("fit") / "bundle")


def test_command_says_it_for_people(bundle: Path) -> None:
    said = here("devices", "check", bundle, "--device", "raspberry-pi-4").stdout
    assert "on Raspberry Pi 4: fits" in said and "smallest that is sold" in said
    assert "largest context that fits: 128" in said
    assert "ceiling unknown" in said and "from a cache" in said  # a model of some kilobytes


def test_command_says_it_for_machines(bundle: Path) -> None:
    told = json.loads(
        here("devices", "check", bundle, "--device", "jetson-orin-nano", "--context", "64", "--json").stdout
    )
    assert told["fits"] is True and told["context"] == 64
    assert told["memory"]["total"] == sum(told["memory"][key] for key in ("runtime", "weights", "cache", "work"))
    assert told["memory"]["cache"] == 64 * 2 * (2 + 1) * 16 * 4  # keys and values of 2 and 1 heads of 16 floats
    assert told["device"]["onnxruntime"] == "1.23.2" and told["device"]["memory_bytes"] == (7620 - 775) << 20


LARGEST = [
    (["--device", "raspberry-pi-4"], 0, "largest context that fits: 128 tokens (the model has no more)"),
    (
        ["--device", "rk3588", "--memory", "64MiB"],
        1,
        "largest context that fits: none (the model has 128, memory is short)",
    ),
]


@pytest.mark.parametrize(("options", "code", "line"), LARGEST)
def test_the_largest_context_says_whose_limit_it_is(options: list[str], code: int, line: str, bundle: Path) -> None:
    assert line in " ".join(here("devices", "check", bundle, *options, code=code).stdout.split())


def test_the_sustained_bandwidth_is_shown_below_the_ceiling(tmp_path: Path, bundle: Path) -> None:
    large = tmp_path / "large"
    shutil.copytree(bundle, large)
    edited(large / "bundle.json", weight_bytes_per_token=114_000_000)
    lines = here("devices", "check", large, "--device", "raspberry-pi-5", "--memory", "4GiB").stdout
    assert "ceiling: 150.0 tokens/s" in lines and "(17.1 GB/s: " in lines
    assert "sustained: 100.0 tokens/s" in lines and "(11.4 GB/s: public reports of sustained decode)" in lines
    assert "sustained:" not in here("devices", "check", large, "--device", "raspberry-pi-4").stdout


def test_command_exits_with_1_when_it_does_not_fit(bundle: Path) -> None:
    old = here("devices", "check", bundle, "--device", "jetson-xavier-nx", code=1).stdout
    assert "does not fit" in old and "needs ONNX Runtime 1.23, there it is 1.19.2 (JetPack 5, Python 3.8)" in old
    assert "a Python of your own" in old
    here("devices", "check", bundle, "--device", "jetson-xavier-nx", "--onnxruntime", "1.23.2")
    small = here("devices", "check", bundle, "--device", "rk3588", "--memory", "64MiB", code=1).stdout
    assert "largest context that fits: none" in small


def test_command_about_this_host(bundle: Path) -> None:
    told = json.loads(here("devices", "check", bundle, "--json").stdout)
    assert told["fits"] is True and told["device"]["memory_source"] == "available at the moment"
    assert told["model"]["bits"] == 32


def test_mistakes(bundle: Path, tmp_path: Path) -> None:
    assert "is it raspberry-pi-5 or raspberry-pi-4?" in refused("devices", "check", bundle, "--device", "raspbery-pi-5")
    assert "say it with --memory, such as --memory 8GiB" in refused("devices", "check", bundle, "--device", "rk3588")
    assert "is not a bundle" in refused("devices", "check", tmp_path)
    assert "holds 1 to 128" in refused("devices", "check", bundle, "--context", "129")
    assert "leave it out with --device" in refused("devices", "check", bundle, "--device", "jetson-nano", "--bandwidth")
    assert "give --device with it" in refused("devices", "check", bundle, "--memory", "1GB")
    assert "no version of ONNX Runtime" in refused("devices", "check", bundle, "--onnxruntime", "new")


def test_list_show_and_probe_for_machines() -> None:
    listed = json.loads(here("devices", "list", "--json").stdout)
    assert listed["jetson-agx-orin"]["numbers"]["memory_bandwidth"]["value"] == 204.8e9
    shown = json.loads(here("devices", "show", "raspberry-pi-5", "--json").stdout)
    assert shown == listed["raspberry-pi-5"]
    people = here("devices", "show", "jetson-orin-nano").stdout
    assert "68 GB/s" in people and "(sm_87)" in people and "1.23.2 (Python 3.10)" in people
    probed = here("devices", "probe").stdout
    assert "this host" in probed and "clusters" in probed and "fingerprint" in probed
