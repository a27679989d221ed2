"""`--on labgrid://PLACE` with a real coordinator, exporters and sshd."""

import os
import signal
import sys
from contextlib import closing
from pathlib import Path

import pytest
from support.command_line import here, refused
from support.labgrid_farm import Farm
from support.remote_runs import OPTIONS, remains, running_bench
from support.tiny_graphs import tiny_bundle

from bench.measure.result import read_result
from bench.remote import labgrid_place
from bench.remote.board import Board
from bench.remote.run import open_board
from devices.transport import BoardError
from saap.base.wording import installing

pytest_plugins = ["pytester"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return str(tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny"))


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """The farm, with `pi` acquired."""
    farm = Farm(tmp_path_factory.mktemp("farm"))
    try:
        farm.start()
        farm.acquire()
        yield farm
    finally:
        farm.stop()


@pytest.fixture
def farm(running, monkeypatch):
    monkeypatch.setenv("PATH", f"{running.sshd.bin}:{os.environ['PATH']}")
    monkeypatch.setenv("LG_COORDINATOR", running.address)
    yield running
    assert not remains(running.sshd.cache)


def test_an_acquired_place_is_measured_and_stays_acquired(farm, bundle, tmp_path):
    done = here("bench", bundle, "--on", "labgrid://raspberry", *OPTIONS, "--json", tmp_path / "r.json")
    assert "decode" in done.stdout
    assert read_result(tmp_path / "r.json").settings["on"] == "labgrid://pi"
    assert "acquired: None" not in farm.client("-p", "pi", "show")


def test_another_coordinator_stays_in_the_name(farm, monkeypatch):
    monkeypatch.delenv("LG_COORDINATOR")
    with closing(open_board(f"labgrid://raspberry@{farm.address}")) as transport:
        assert transport.name == f"labgrid://pi@{farm.address}"


def test_a_board_behind_its_exporter_is_reached_by_a_jump(farm):
    farm.acquire("behind")
    try:
        with closing(open_board("labgrid://behind")) as transport:
            jump, proxy = transport.argv("true")[-5:-3]
            assert jump == "-J"
            with (farm.sshd.folder / "ssh_config").open("a") as config:
                config.write(f"Host {proxy}\nHostName 127.0.0.1\nPort {farm.sshd.port}\n")
            assert Board(transport).ask("hello")["time"] > 0
    finally:
        farm.release("behind")


def test_host_keys_are_checked_and_the_address_is_said(farm, bundle):
    farm.sshd.known.write_text("")
    try:
        line = refused("bench", bundle, "--on", "labgrid://pi", *OPTIONS)
    finally:
        farm.sshd.trust()
    assert line.startswith("saap: labgrid://pi at ssh://") and "its host key is unknown: connect once" in line


def test_mistakes_are_one_line(farm, bundle):
    def line(url):
        return refused("bench", bundle, "--on", url, *OPTIONS).removeprefix(f"saap: {url}: ")

    assert line("labgrid://pu") == "no place or alias is called 'pu'; places are behind, dark, pi, two"
    assert line("labgrid://-p%2Fx").startswith("no place or alias is called '-p/x'")
    assert line("labgrid://pi@127.0.0.1:9").startswith("no labgrid coordinator answers at 127.0.0.1:9 (coordinator is")
    assert line("labgrid://two").startswith("two is not acquired: `labgrid-client -p two acquire` first")
    assert "has tags, for which labgrid-client queues: `labgrid-client reserve" in line("labgrid://?board=pi")
    farm.acquire("two", user="somebody")
    message = line("labgrid://two")
    assert "/somebody (last change " in message and message.endswith("then `labgrid-client -p two acquire`")
    farm.release("two", user="somebody")


def test_a_place_needs_one_address(farm, bundle):
    for place, message in [
        ("dark", "dark has no NetworkService"),
        ("two", "two has several NetworkServices (one, other): leave it a match of one"),
    ]:
        farm.acquire(place)
        with pytest.raises(BoardError) as caught:
            open_board(f"labgrid://{place}")
        assert str(caught.value).startswith(f"labgrid://{place}: {message}")
        farm.release(place)


def test_an_interrupt_leaves_the_board_clean(farm, bundle):
    process = running_bench(bundle, "labgrid://pi", farm.sshd.cache)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and errors.splitlines()[-1] == "saap: interrupted; run the same command again"
    assert "Traceback" not in errors


@pytest.mark.slow
def test_a_baseline_and_its_test(farm, bundle, tmp_path):
    folder = ["--on", "labgrid://raspberry", "--baselines", tmp_path, "--board-packages"]
    here("devices", "baseline", bundle, "-p", "4", "-n", "6", "-t", "1", "-r", "3", "--min-effect", "99", *folder)
    done = here("devices", "test", bundle, "--min-effect", "0.9", *folder, code=None)
    assert "against its baseline" in done.stdout


def test_the_plugin_knows_the_place_by_its_name(farm, pytester, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[3]))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # the other plugins here take long to import
    pytester.makepyfile("def test_one(saap_device):\n    assert saap_device.url == 'labgrid://pi'\n")
    plugin = ("-p", "saap.pytest_plugin")
    pytester.runpytest_subprocess(*plugin, "--saap-device", "labgrid://raspberry").assert_outcomes(passed=1)
    done = pytester.runpytest_subprocess(*plugin, "--saap-device", "labgrid://nothing")
    done.stdout.fnmatch_lines(["*--saap-device: labgrid://nothing: no place or alias is called 'nothing'*"])


def test_without_labgrid_the_extra_is_named(bundle, monkeypatch, tmp_path):
    (tmp_path / "labgrid.py").write_text("raise ImportError('broken')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert refused("bench", bundle, "--on", "labgrid://pi").endswith(f"pip install {installing('labgrid')}")


@pytest.mark.parametrize(
    "url", ["labgrid://", "labgrid://pi/x", "labgrid://pi@", "labgrid://@host", "labgrid:pi", "labgrid://[x"]
)
def test_a_url_that_names_no_place(url):
    with pytest.raises(BoardError, match="names no place"):
        open_board(url)


def test_a_place_whose_ssh_cannot_be_reached(monkeypatch):
    service = {"place": "pi", "address": "127.0.0.1", "username": "me", "port": 22}
    monkeypatch.setattr(labgrid_place, "call", lambda *_: service)
    service["address"] = "fe80::1%eth0"
    with pytest.raises(BoardError, match="needs labgrid-bound-connect"):
        open_board("labgrid://pi")
    service |= {"address": "10.0.0.1", "extra": {"proxy_required": True, "proxy": "-oProxyCommand=x"}}
    with pytest.raises(BoardError, match="is no host"):
        open_board("labgrid://pi")


def test_labgrid_is_not_imported_here(farm):
    with closing(open_board("labgrid://pi")):
        assert "labgrid.remote.client" not in sys.modules
