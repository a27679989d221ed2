"""What `saap bench --on` says when a board cannot be used: one line that names it, and the board left clean."""

import json
import os
import threading
from contextlib import closing

import pytest
from support.agent_requests import RUN
from support.command_line import refused
from support.remote_runs import OPTIONS, OWN_PACKAGES, QUICK, one, remains, running, script, two_bundles
from support.sshd import keygen

from bench.remote import run as remote_run
from bench.remote.board import COMMAND, Board, Stopped
from bench.remote.files import pack
from bench.remote.target import measure_on
from devices.agent.home import Lock
from devices.transport import BoardError, Local, open_transport
from export.bundle.manifest import BundleError


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    return two_bundles(tmp_path_factory.mktemp("bundles"))


@pytest.fixture
def sshd(tmp_path, monkeypatch):
    yield from running(tmp_path, monkeypatch)


def test_host_keys_are_checked(sshd, bundles):
    sshd.known.write_text("")
    with pytest.raises(BoardError, match=r"host key is unknown: connect once with ssh"):
        one(sshd.url, bundles[:1])
    assert sshd.known.read_text() == ""
    sshd.trust()
    before = sshd.known.read_text()
    sshd.stop()
    keygen(sshd.folder / "host")
    sshd.start()
    with pytest.raises(BoardError, match=r"host key changed.*ssh-keygen -R '\[127\.0\.0\.1\]"):
        one(sshd.url, bundles[:1])
    assert sshd.known.read_text() == before and not sshd.cache.exists()


def test_a_key_that_the_board_refuses_and_a_board_that_is_off(sshd, bundles):
    (sshd.folder / "authorized").write_text("")
    with pytest.raises(BoardError, match="refuses your key"):
        one(sshd.url, bundles[:1])
    sshd.stop()
    with pytest.raises(BoardError, match=r"no connection.*refused"):
        one(sshd.url, bundles[:1])


def test_two_runs_at_once(sshd, bundles):
    sshd.cache.mkdir(parents=True)
    lock = Lock(sshd.cache)
    lock.take(RUN, "ann@desk")
    lock.process(RUN, os.getpid())
    told = rf"{sshd.url}: ann@desk measures there since \d+ s \(process {os.getpid()} there\): wait"
    with pytest.raises(BoardError, match=told):
        one(sshd.url, bundles[:1])
    lock.release(RUN)


def test_a_full_disk(sshd, bundles, monkeypatch):
    monkeypatch.setattr(remote_run, "RESERVE_BYTES", 1 << 60)
    with pytest.raises(BoardError, match=r"the disk is full: \d+ MB are needed in .* and \d+ MB are free: free some"):
        one(sshd.url, bundles[:1])
    assert not remains(sshd.cache)


def test_no_memory_for_it(sshd, bundles, tmp_path):
    (tmp_path / "root/proc").mkdir(parents=True)
    (tmp_path / "root/proc/meminfo").write_text("MemTotal: 900000 kB\nMemAvailable: 20000 kB\n")
    with (
        closing(open_transport(sshd.url)) as transport,
        pytest.raises(BoardError, match=r"about 6. MB there and 20 MB"),
    ):
        shipment = pack(bundles[:1], QUICK.positions, OWN_PACKAGES)
        measure_on(Board(transport, root=str(tmp_path / "root")), shipment, QUICK)


@pytest.mark.parametrize(
    ("python", "told"),
    [
        ("echo 3.8.10; exit 1", r"its Python is 3\.8\.10, and 3\.10 or newer is needed"),
        (None, "it has no Python, and 3.10 or newer is needed"),
        (
            'case "$*" in *chr\\(46\\)*) echo 3.11.2;; *) echo Segmentation fault;; esac',
            r"something else.*Segmentation",
        ),
        ('case "$*" in *chr\\(46\\)*) echo 3.11.2;; *) echo saap-agent-1 [;; esac', "something else than the agent"),
        ('case "$*" in *chr\\(46\\)*) echo 3.11.2;; *) echo "saap-agent-1 {\\"answer\\": {}}";; esac', "no facts"),
        ('case "$*" in *chr\\(46\\)*) echo 3.11.2;; *) echo oh no >&2; exit 7;; esac', "ended with exit 7: oh no"),
    ],
)
def test_what_answers_is_no_agent(sshd, bundles, python, told):
    sshd.stop()
    fakes = sshd.folder / "fakes"
    fakes.mkdir()
    (fakes / "sh").symlink_to("/bin/sh")
    if python is not None:
        script(fakes / "python3", python)
    sshd.environment["PATH"] = str(fakes)
    sshd.start()
    with pytest.raises(BoardError, match=told) as caught:
        one(sshd.url, bundles[:1])
    assert sshd.url in str(caught.value) and "\n" not in str(caught.value)


def test_mistakes_are_one_line(bundles, tmp_path):
    assert "names no board" in refused("bench", bundles[0], "--on", "board")
    assert "names no board" in refused("bench", bundles[0], "--on", "ssh://-oProxyCommand=x")
    assert "--on takes bundles" in refused("bench", "torch:model", "--on", "local://")
    several = refused("bench", bundles[0], "--on", "local://", "--on", "ssh://b")
    assert several.startswith("saap: --on takes one board: run the command once for each, such as `for board in")
    assert "no wheels in" in refused("bench", bundles[0], "--on", "local://", "--wheels", tmp_path, *OPTIONS[:-1])
    assert "give one of them" in refused("bench", bundles[0], "--on", "local://", "--wheels", tmp_path, *OPTIONS[-1:])
    assert "is for --on" in refused("bench", bundles[0], "--board-packages")
    assert "not a bundle" in refused("bench", tmp_path, "--on", "local://")
    with pytest.raises(BundleError):
        pack([str(tmp_path)], QUICK.positions)


class Scripted(Local):
    """A board whose agent answers fixed lines, one script a request."""

    def __init__(self, *scripts: str) -> None:
        super().__init__()
        self.scripts = list(scripts)

    def argv(self, command):
        assert command == COMMAND
        return ["sh", "-c", self.scripts.pop(0)]


def answer(**document):
    return f"cat >/dev/null; echo 'saap-agent-1 {json.dumps(document)}'"


FACTS = {"available_bytes": None, "time": 0.0}


@pytest.mark.parametrize(
    ("scripts", "told"),
    [
        ([answer(answer={"missing": {"a" * 64: 0}, "installed": True})], "files that were not asked for"),
        ([answer(answer={"missing": {"FILE": -1}, "installed": True})], "other sizes than files have"),
        ([answer(answer={"missing": {"FILE": "x"}, "installed": True})], "other sizes than files have"),
        (["exec yes noise"], r"something else than the agent answers there \(noise\)"),
        ([answer(answer={"installed": True})], "an answer without 'missing'"),
        ([answer(answer=[1])], "something else than the agent"),
        ([answer(error="the disk is full")], "local://: the disk is full"),
        (
            [answer(answer={"missing": {}, "installed": True}), answer(answer={}), answer(answer={"code": 0}),
             answer(answer={"result": "{}", "sha256": "0"})],
            "another hash",
        ),
        (
            [answer(answer={"missing": {}, "installed": True}), answer(answer={}),
             answer(answer={"error": "its process was killed there"})],
            "the run failed: its process was killed there",
        ),
    ],
)  # fmt: skip
def test_garbage_of_every_request_is_an_error_and_the_board_is_given_up(bundles, scripts, told):
    shipment = pack(bundles[:1], QUICK.positions, OWN_PACKAGES)
    scripts = [line.replace("FILE", next(iter(shipment.sizes))) for line in scripts]
    transport = Scripted(answer(answer=FACTS), *scripts, answer(answer={"ended": True}))
    said = []
    with pytest.raises(BoardError, match=told):
        measure_on(Board(transport, say=said.append), shipment, QUICK)
    assert transport.scripts == [] and "clock is off" in said[0]  # the last script was the request to end


def test_silence_and_no_contact(bundles):
    board = Board(Scripted("sleep 30", "kill -9 $$", "kill -9 $$"), patience_s=0.5, silence_s=1)
    with pytest.raises(BoardError, match="silent for 1 s"):
        board.ask("hello")
    with pytest.raises(BoardError, match="no contact for 0 s; a run that goes on there ends itself"):
        board.insist("follow")
    stop = threading.Event()
    with pytest.raises(Stopped):  # while it waits for another try, and then at once
        Board(Scripted("kill -9 $$"), stop, say=lambda text: stop.set()).insist("follow")
    with pytest.raises(Stopped):
        Board(Scripted("sleep 30"), stop).ask("hello")


def test_nothing_of_ours_is_interpolated():
    assert COMMAND.startswith("exec sh -c '") and "!" not in COMMAND and "\n" not in COMMAND and "`" not in COMMAND
    with closing(open_transport("ssh://a@b")) as transport:
        assert transport.argv(COMMAND)[-3:] == ["--", "b", COMMAND]
