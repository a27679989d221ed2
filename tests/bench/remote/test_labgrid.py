"""`--on labgrid://PLACE` with a real coordinator, exporter and sshd: taken, measured, given back."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from support.command_line import here, refused
from support.labgrid_farm import Farm
from support.remote_runs import ONCE, OPTIONS, one, remains, running_bench
from support.tiny_graphs import tiny_bundle

from bench.judge import regression
from bench.measure.result import read_result
from bench.remote import labgrid_place, labgrid_session
from bench.remote import run as remote_run
from bench.remote.board import Board
from bench.remote.labgrid_session import ask
from bench.remote.run import kept, route_to
from bench.remote.target import bench_on
from devices.transport import BoardError

pytest_plugins = ["pytester"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return str(tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny"))


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    made = Farm(tmp_path_factory.mktemp("farm"))
    try:
        made.start()
        yield made
    finally:
        made.stop()


@pytest.fixture
def farm(running, monkeypatch):
    """All tests leave it as they found it."""
    monkeypatch.setenv("PATH", f"{running.sshd.bin}:{os.environ['PATH']}")
    monkeypatch.setenv("LG_COORDINATOR", running.address)
    monkeypatch.setenv("LG_STATE", "not for us")
    running.power(True)
    running.switched.clear()
    yield running
    free = running.is_free()
    running.clear()
    assert free, "a place or a reservation is left"
    assert not remains(running.sshd.cache)


def test_a_place_is_switched_on_measured_and_left_as_it_was(farm, bundle, tmp_path):
    farm.power(False)
    done = here("bench", bundle, "--on", "labgrid://pi", *OPTIONS, "--json", tmp_path / "r.json")
    assert farm.switched == ["on", "off"] and "decode" in done.stdout
    assert "labgrid://pi: pi is acquired" in done.stderr and "pi is switched on; waiting" in done.stderr
    assert read_result(tmp_path / "r.json").settings["on"] == "labgrid://pi"


def test_what_is_on_and_acquired_by_its_user_is_left_so(farm, monkeypatch):
    monkeypatch.delenv("LG_COORDINATOR")
    farm.acquire()
    said, url = [], f"labgrid://raspberry@{farm.address}"
    try:
        with kept(url, said.append) as there:
            assert there == f"labgrid://pi@{farm.address}"
        assert said == [f"{url}: pi is acquired by you already, and stays so"]
        assert farm.holder("pi") is not None and farm.switched == []
    finally:
        farm.release()


def test_tags_queue_for_a_place_until_it_is_free(farm):
    said, url = [], "labgrid://?board=pi&rack=a"

    def told(text):
        said.append(text)
        if "waiting" in text:  # its reservation is there
            farm.release(user="somebody")

    farm.acquire(user="somebody")
    with kept(url, told) as there:
        assert there == "labgrid://pi" and farm.holder("pi").split("/")[1] != "somebody"
    assert said[0].startswith(f"{url}: waiting for 0 s, of pi (acquired by ") and said[1] == f"{url}: pi is acquired"
    assert said[0].endswith("/somebody) when it began; Ctrl-C gives up")


def test_a_board_behind_its_exporter_is_reached_by_a_jump(farm):
    proxy = ask(farm.address, _parameters)["extra"]["proxy"]
    with (farm.sshd.folder / "ssh_config").open("a") as config:
        config.write(f"Host {proxy}\nHostName 127.0.0.1\nPort {farm.sshd.port}\n")
    with route_to("labgrid://behind").held(threading.Event(), print) as transport:
        assert ["-J", proxy] == transport.argv("true")[-5:-3]
        assert Board(transport).ask("hello")["time"] > 0


async def _parameters(session):
    return session.resources["closed"]["behind"]["NetworkService"].params


def test_host_keys_are_checked_and_the_address_is_said(farm, bundle):
    farm.sshd.known.write_text("")
    try:
        line = refused("bench", bundle, "--on", "labgrid://pi", *OPTIONS)
    finally:
        farm.sshd.trust()
    assert line.startswith("saap: labgrid://pi at ssh://") and "its host key is unknown: connect once" in line


def test_mistakes_are_one_line_and_nothing_stays_acquired(farm, bundle):
    def line(url):
        return refused("bench", bundle, "--on", url, *OPTIONS).removeprefix(f"saap: {url}: ")

    assert line("labgrid://pu") == "no place or alias is called 'pu'; places are behind, dark, gone, pi, two"
    assert line("labgrid://-p%2Fx").startswith("no place or alias is called '-p/x'")
    assert line("labgrid://dark").startswith("dark has no NetworkService")
    assert line("labgrid://two").startswith("two has several NetworkServices (one, other): leave it a match of one")
    assert line("labgrid://gone").startswith("Match lab/gone/* has no matching remote resource")
    assert line("labgrid://?board=jetson").startswith("no place has these tags; tags are board=pi, rack=a: see")
    assert line("labgrid://pi@127.0.0.1:9").startswith("no labgrid coordinator answers at 127.0.0.1:9 (coordinator is")
    farm.acquire(user="somebody")
    try:
        told = line("labgrid://pi")
        assert "/somebody (last change " in told and told.endswith("queue for it with 'labgrid://?name=pi'")
    finally:
        farm.release(user="somebody")
    token = farm.reserve(user="somebody")
    answers = bench_on(["labgrid://pi", "labgrid://dark", "labgrid://pu"], [bundle], ONCE)  # at the same time
    assert [str(answer.error).split(":")[2].split()[0] for answer in answers] == ["Place", "dark", "no"]
    try:
        told = line("labgrid://pi")
        assert told.startswith("Place pi was not reserved for ") and told.endswith("with 'labgrid://?name=pi'")
    finally:
        farm.cancel(token)


def test_an_interrupt_gives_the_place_back(farm, bundle):
    farm.power(False)
    process = running_bench(bundle, "labgrid://pi", farm.sshd.cache)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and said.splitlines()[-1] == "saap: interrupted; run the same command again"
    assert "Traceback" not in said and farm.switched == ["on", "off"]


def test_an_ended_wait_takes_its_reservation_back(farm, bundle, tmp_path):
    farm.acquire(user="somebody")
    process = subprocess.Popen(
        [sys.executable, "-m", "saap.cli", "devices", "baseline", bundle, "--on", "labgrid://?name=pi"],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])},
    )  # fmt: skip
    assert "waiting for 0 s" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1].strip() == "saap: interrupted; run the same command again"
    farm.release(user="somebody")
    assert farm.is_free()


@pytest.mark.parametrize("lost", [2, 3])
def test_an_answer_that_is_lost_costs_no_place_in_the_queue(farm, monkeypatch, lost):
    tries, whole = [], labgrid_session.allocated

    async def allocated(session, token):
        tries.append(token)
        if len(tries) <= lost:
            await asyncio.sleep(60)
        return await whole(session, token)

    monkeypatch.setattr(labgrid_session, "allocated", allocated)
    monkeypatch.setattr(labgrid_session, "QUICK_S", 0.5)
    monkeypatch.setattr(labgrid_place, "POLL_S", 0.1)
    if lost < labgrid_place.POLL_TRIES:
        with kept("labgrid://?name=pi"):
            assert farm.holder("pi")
    else:
        with pytest.raises(BoardError, match="no labgrid coordinator answers"), kept("labgrid://?name=pi"):
            pass
    assert len(tries) == 3 and len(set(tries)) == 1


def test_an_error_in_the_middle_gives_the_place_back(farm, bundle, monkeypatch):
    def broken(*arguments):
        raise BoardError("broken")

    monkeypatch.setattr(remote_run, "run_on", broken)
    with pytest.raises(BoardError, match="broken"):
        one("labgrid://pi", [bundle], ONCE)
    assert farm.is_free() and farm.switched == []


def test_two_conversations_never_share_a_connection(farm):
    """By which the coordinator knows its clients: it would refuse the second until it has seen the first one's end."""

    async def places(session):
        return sorted(session.places)

    async def ask_again(session):
        return await labgrid_session._talk(labgrid_session.client(), farm.address, places, True, 10.0)

    assert labgrid_session.ask(farm.address, ask_again) == labgrid_session.ask(farm.address, places)


def test_a_board_that_does_not_come_up_is_switched_off_again(farm, monkeypatch):
    monkeypatch.setattr(labgrid_place, "BOOT_S", 1.0)
    monkeypatch.setattr(farm.sshd, "start", lambda: None)
    farm.power(False)
    with (
        pytest.raises(BoardError, match=r"labgrid://pi at ssh://.*no connection.*; it was switched on 1 s ago"),
        kept("labgrid://pi"),
    ):
        pass
    assert farm.switched == ["on", "off"]


def test_somebody_who_takes_the_place_away_is_said(farm):
    said = []
    with kept("labgrid://pi", said.append):
        farm.release()
        farm.acquire(user="somebody")
    try:
        assert "pi was released before its time, and is of " in said[-1] and "do not trust the result" in said[-1]
        assert farm.holder("pi").endswith("/somebody")
    finally:
        farm.release(user="somebody")


def test_a_release_that_fails_is_said_with_the_command_that_does_it(farm, monkeypatch):
    said = []
    monkeypatch.setattr(labgrid_place, "RELEASE_WAITS_S", (0.0, 0.0))
    with kept("labgrid://pi", said.append):
        monkeypatch.setattr(labgrid_session, "ask", lambda address, *rest: ask("127.0.0.1:9", *rest))
    monkeypatch.undo()
    assert "could not be released, `labgrid-client -p pi release` does: labgrid://pi: no labgrid coord" in said[-1]
    farm.release()


@pytest.mark.parametrize(("command", "name"), [("baseline", "record"), ("test", "retest")])
def test_one_place_is_held_for_all_runs_of_a_command(farm, bundle, tmp_path, monkeypatch, command, name):
    def seen(*arguments, **options):
        assert farm.holder("pi") and options.get("on", "labgrid://pi") == "labgrid://pi"
        raise regression.RegressionError("seen")

    monkeypatch.setattr(regression, name, seen)
    options = ["--on", "labgrid://?board=pi", "--baselines", tmp_path]
    assert refused("devices", command, bundle, *options) == "saap: seen"


@pytest.mark.slow
def test_a_baseline_and_its_test(farm, bundle, tmp_path):
    before = farm.acquired()
    folder = ["--on", "labgrid://?board=pi", "--baselines", tmp_path, "--board-packages"]
    here("devices", "baseline", bundle, "-p", "4", "-n", "6", "-t", "1", "-r", "3", *folder)
    assert farm.acquired() == before + 1
    done = here("devices", "test", bundle, "--min-effect", "0.9", *folder, code=None)
    assert "against its baseline" in done.stdout and farm.acquired() == before + 2


def test_the_plugin_holds_one_place_for_all_tests(farm, pytester, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[3]))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # the other plugins here take long to import
    pytester.makepyfile(
        "def test_one(saap_device):\n    assert saap_device.url == 'labgrid://pi'\n"
        "def test_other(saap_device):\n    assert saap_device.url == 'labgrid://pi'\n"
    )
    before, plugin = farm.acquired(), ("-p", "bench.pytest_plugin")
    done = pytester.runpytest_subprocess(*plugin, "--saap-device", "labgrid://?board=pi")
    done.assert_outcomes(passed=2)
    assert farm.acquired() == before + 1
    done = pytester.runpytest_subprocess(*plugin, "--saap-device", "labgrid://nothing")
    done.stdout.fnmatch_lines(["*--saap-device: labgrid://nothing: no place or alias is called 'nothing'*"])


def test_without_labgrid_it_is_said_how_to_get_it(bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "labgrid.remote", None)
    monkeypatch.delitem(sys.modules, "labgrid.remote.client", raising=False)
    assert refused("bench", bundle, "--on", "labgrid://pi").endswith("pip install 'saap[labgrid]'")


@pytest.mark.parametrize(
    "url", ["labgrid://", "labgrid://pi?a=b", "labgrid://pi/x", "labgrid://?a", "labgrid://?a=1&a=2", "labgrid://pi@",
            "labgrid://@host", "labgrid:pi", "labgrid://[x"],
)  # fmt: skip
def test_what_names_no_place(url):
    with pytest.raises(BoardError, match="names no place"):
        route_to(url)


def test_labgrid_leaves_no_trace_in_this_process(farm):
    before = sys.excepthook, list(logging.getLogger().handlers)
    with pytest.raises(BoardError), kept("labgrid://nothing"):
        pass
    assert (sys.excepthook, list(logging.getLogger().handlers)) == before
