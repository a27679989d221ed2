"""`saap bench --on` over a real sshd: the same result as here, nothing lost, nothing left."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from command_line import here, refused
from sshd import Sshd, keygen, require_sshd
from tiny_graphs import tiny_bundle

from bench import remote, remote_board
from bench.compare import compare
from bench.plan import Plan
from bench.remote import bench_on, measure_on
from bench.remote_board import COMMAND, Board, Stopped
from bench.remote_files import pack
from bench.run import bench
from bench.store import read_result
from devices.transport import BoardError, Local, open_transport
from export.bundle import BundleError

QUICK = Plan(prompt=4, generate=6, threads=1, repetitions=2, cold=False)
LONG = dataclasses.replace(QUICK, repetitions=8)
OPTIONS = ["-p", "4", "-n", "6", "-t", "1", "-r", "1", "--no-cold", "--board-packages"]
VENV = f"{Path(sys.executable).parent}:/usr/bin:/bin"  # this Python is the board's, so that nothing is downloaded


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    root = tmp_path_factory.mktemp("bundles")
    return [str(tiny_bundle(root / "dense")), str(tiny_bundle(root / "slim", seed=1))]


@pytest.fixture
def sshd(tmp_path, monkeypatch):
    require_sshd()
    server = Sshd(tmp_path / "sshd", VENV)
    monkeypatch.setenv("PATH", f"{server.bin}:{os.environ['PATH']}")
    server.start()
    yield server
    server.stop()
    assert not left(server.cache), "processes are left on the board"


def left(cache: Path) -> list[list[str]]:
    """Processes of the agent's folder that run."""
    found = []
    for process in psutil.process_iter(["cmdline", "cwd", "status"]):
        where = [*(process.info["cmdline"] or []), process.info["cwd"] or ""]
        if process.info["status"] != psutil.STATUS_ZOMBIE and any(str(cache) in part for part in where):
            found.append(process.info["cmdline"])
    return found


def clean(cache: Path) -> bool:
    return not (cache / "lock.json").exists() and not list((cache / "runs").glob("*")) and not left(cache)


def one(url, specs, plan=QUICK, **options):
    (answer,) = bench_on([url], specs, plan, own=False, **options)
    if answer.error is not None:
        raise answer.error
    return answer.result


def form(value):
    """Names and types, without the values; the numbers of a list may differ in count."""
    if dataclasses.is_dataclass(value):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {name: form(part) for name, part in value.items()}
    if isinstance(value, list):
        return [form(value[0])] if value else []
    return "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__


def test_a_result_has_the_form_of_a_local_one_and_compares_with_it(sshd, bundles):
    local = bench(bundles, QUICK)
    found = one(sshd.url, bundles)
    assert found.device["fingerprint"] == local.device["fingerprint"]
    assert [(m.name, m.spec, m.bundle_hash, len(m.samples)) for m in found.measurements] == [
        (m.name, m.spec, m.bundle_hash, len(m.samples)) for m in local.measurements
    ]
    assert found.versions == local.versions and found.command == local.command
    there = dict(found.settings)
    assert there.pop("on") == sshd.url and form(there) == form(local.settings)
    for mine, theirs in zip(local.measurements, found.measurements, strict=True):
        assert form(dataclasses.replace(mine.samples[0], unknown={}, steady=None)) == form(
            dataclasses.replace(theirs.samples[0], unknown={}, steady=None)
        )
    rows = compare(local, found).rows
    assert [row.name for row in rows] == ["dense", "slim"]
    assert not any("device" in (row.reason or "") for row in rows)
    assert clean(sshd.cache)


def test_a_second_run_sends_and_installs_nothing(sshd, bundles):
    one(sshd.url, bundles[:1])
    labels = []
    before = {path: path.stat().st_ino for path in (sshd.cache / "files").iterdir()}
    one(sshd.url, bundles[:1], progress=lambda label, done, total: labels.append(label))
    assert labels and not [label for label in labels if label.startswith(("push", "install"))]
    assert {path: path.stat().st_ino for path in (sshd.cache / "files").iterdir()} == before
    assert len(list(sshd.cache.glob("agent-*"))) == 1


def test_a_file_that_rotted_on_the_board_is_sent_again(sshd, bundles):
    one(sshd.url, bundles[:1])
    largest = max((sshd.cache / "files").iterdir(), key=lambda path: path.stat().st_size)
    largest.write_bytes(b"x" + largest.read_bytes()[1:])
    assert one(sshd.url, bundles[:1]).measurements[0].samples


def test_a_connection_that_is_cut_in_the_middle_loses_nothing(sshd, bundles):
    cuts, said = [], []

    def progress(label, done, total):
        if done >= 2 and not cuts:
            cuts.append(sshd.cut())

    found = one(sshd.url, bundles[:1], LONG, progress=progress, say=said.append)
    assert cuts[0] > 0 and any("trying again" in line for line in said)
    assert [sample.order for sample in found.measurements[0].samples] == list(range(8))
    assert clean(sshd.cache)


def test_a_killed_ssh_here_loses_nothing_either(sshd, bundles):
    killed = []

    def progress(label, done, total):
        if done >= 2 and not killed:
            mine = [
                p for p in psutil.process_iter(["cmdline"]) if str(sshd.folder / "ssh_config") in (p.cmdline() or [])
            ]
            killed.extend(process.pid for process in mine)
            for process in mine:
                process.kill()

    assert len(one(sshd.url, bundles[:1], LONG, progress=progress).measurements[0].samples) == 8
    assert killed


def test_a_push_that_is_cut_goes_on_where_it_was(sshd, bundles, monkeypatch):
    whole, offsets = remote_board._pieces, []

    def pieces(source, offset):
        size = source.stat().st_size if isinstance(source, Path) else 0
        if size < 100_000:  # the weights are what is cut
            yield from whole(source, offset)
            return
        offsets.append(offset)
        content = source.read_bytes()
        if len(offsets) > 1:
            yield content[offset:]
            return
        yield content[: size // 2]
        store = sshd.cache / "files"
        while not any(part.stat().st_size for part in store.glob("*.part")):
            time.sleep(0.02)
            yield b""
        sshd.cut()

    monkeypatch.setattr(remote_board, "_pieces", pieces)
    assert one(sshd.url, bundles[:1]).measurements[0].samples
    assert len(offsets) == 2 and offsets[0] == 0


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
    errors = []

    def progress(label, done, total):
        if label.startswith("bench") and not errors:
            with pytest.raises(BoardError, match=r"measures there since \d+ s \(process \d+ there\): wait") as caught:
                one(sshd.url, bundles[:1])
            errors.append(str(caught.value))

    assert len(one(sshd.url, bundles[:1], progress=progress).measurements[0].samples) == 2
    assert sshd.url in errors[0]


def test_a_full_disk(sshd, bundles, monkeypatch):
    monkeypatch.setattr(remote, "RESERVE_BYTES", 1 << 60)
    with pytest.raises(BoardError, match=r"the disk is full: \d+ MB are needed in .* and \d+ MB are free: free some"):
        one(sshd.url, bundles[:1])
    assert clean(sshd.cache)


def test_no_memory_for_it(sshd, bundles, tmp_path):
    (tmp_path / "root/proc").mkdir(parents=True)
    (tmp_path / "root/proc/meminfo").write_text("MemTotal: 900000 kB\nMemAvailable: 20000 kB\n")
    with pytest.raises(BoardError, match=r"about 6. MB there and 20 MB are available"):
        measure_on(
            Board(open_transport(sshd.url), root=str(tmp_path / "root")), pack(bundles[:1], QUICK, own=False), QUICK
        )


def script(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


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
    for name in ("sh",):
        (fakes / name).symlink_to(f"/bin/{name}")
    if python is not None:
        script(fakes / "python3", python)
    sshd.environment["PATH"] = str(fakes)
    sshd.start()
    with pytest.raises(BoardError, match=told) as caught:
        one(sshd.url, bundles[:1])
    assert sshd.url in str(caught.value) and "\n" not in str(caught.value)


def test_a_login_script_that_prints_is_no_garbage(sshd, bundles):
    sshd.stop()
    script(sshd.folder / "loud/python3", f'echo "Welcome to the board"\nexec {sys.executable} "$@"')
    sshd.environment["PATH"] = f"{sshd.folder}/loud:/usr/bin:/bin"
    sshd.start()
    assert one(sshd.url, bundles[:1]).measurements[0].samples


def test_a_reboot_in_the_middle(sshd, bundles, tmp_path):
    boot = tmp_path / "root/proc/sys/kernel/random/boot_id"
    boot.parent.mkdir(parents=True)
    boot.write_text("first\n")

    def progress(label, done, total):
        if label.startswith("bench"):
            boot.write_text("second\n")

    board = Board(open_transport(sshd.url), root=str(tmp_path / "root"))
    with pytest.raises(BoardError, match="it rebooted in the middle of the run, which is INVALID"):
        measure_on(board, pack(bundles[:1], LONG, own=False), LONG, progress)
    board.transport.close()
    assert clean(sshd.cache)


def test_an_interrupt_leaves_the_board_clean(sshd, bundles):
    stop = threading.Event()

    def progress(label, done, total):
        if label.startswith("bench") and done >= 1:
            stop.set()

    board = Board(open_transport(sshd.url), stop)
    with pytest.raises(Stopped):
        measure_on(board, pack(bundles[:1], LONG, own=False), LONG, progress)
    board.transport.close()
    assert clean(sshd.cache)
    assert not [p for p in psutil.process_iter() if str(sshd.folder / "ssh_config") in _command(p)], "ssh is left here"


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_control_c_at_the_command_line(sshd, bundles):
    process = subprocess.Popen(
        [sys.executable, "-m", "saap.cli", "bench", bundles[0], "--on", sshd.url, *OPTIONS[:-4], "-r", "40",
         "--no-cold", "--board-packages"],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    for _ in range(600):
        if list((sshd.cache / "runs").glob("*/beat")):
            break
        time.sleep(0.1)
    process.send_signal(2)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "interrupted" in said and "Traceback" not in said
    assert clean(sshd.cache)


def test_what_the_board_refuses_is_said_with_its_name(sshd, bundles):
    with pytest.raises(BoardError, match=re.escape(sshd.url) + r".*4096 threads"):
        one(sshd.url, bundles[:1], dataclasses.replace(QUICK, threads=4096))
    assert clean(sshd.cache)


def test_a_worker_that_fails_is_invalid_as_it_is_here(sshd, bundles):
    found = one(sshd.url, bundles[:1], dataclasses.replace(QUICK, timeout_s=0.01))
    assert found.measurements[0].status == "INVALID"
    assert any("no answer within 0.01 s" in reason for reason in found.measurements[0].reasons)


def test_several_boards_on_the_command_line(sshd, bundles, tmp_path, monkeypatch):
    monkeypatch.setenv("SAAP_CACHE", str(tmp_path / "here"))
    monkeypatch.setenv("PATH", f"{sshd.bin}:{VENV}")
    done = here("bench", *bundles, "--on", sshd.url, "--on", "local://", *OPTIONS, "--json", tmp_path / "r.json")
    assert "side by side" in done.stdout and done.stdout.count("### ") == 2
    names = [f"r.{sshd.url.removeprefix('ssh://').replace('@', '-').replace(':', '-')}.json", "r.local.json"]
    assert {path.name for path in tmp_path.glob("r.*")} == set(names)
    results = [read_result(tmp_path / name) for name in names]
    assert [r.settings["on"] for r in results] == [sshd.url, "local://"]
    assert clean(sshd.cache) and clean(tmp_path / "here")


def test_one_board_of_two_fails(sshd, bundles, tmp_path, monkeypatch):
    monkeypatch.setenv("SAAP_CACHE", str(tmp_path / "here"))
    monkeypatch.setenv("PATH", f"{sshd.bin}:{VENV}")
    sshd.stop()
    done = here("bench", bundles[0], "--on", sshd.url, "--on", "local://", *OPTIONS, code=2)
    assert "no connection" in done.stderr and "decode" in done.stdout


def test_mistakes_are_one_line(bundles, tmp_path):
    assert "names no board" in refused("bench", bundles[0], "--on", "board")
    assert "names no board" in refused("bench", bundles[0], "--on", "ssh://-oProxyCommand=x")
    assert "--on takes bundles" in refused("bench", "torch:model", "--on", "local://")
    assert "named twice" in refused("bench", bundles[0], "--on", "local://", "--on", "local://")
    assert "no wheels in" in refused("bench", bundles[0], "--on", "local://", "--wheels", tmp_path, *OPTIONS[:-1])
    assert "give one of them" in refused("bench", bundles[0], "--on", "local://", "--wheels", tmp_path, *OPTIONS[-1:])
    assert "belong to --on" in refused("bench", bundles[0], "--board-packages")
    assert "md or jsonl" in refused("bench", bundles[0], "--on", "local://", "--on", "ssh://b", "--format", "csv")
    assert "not a bundle" in refused("bench", tmp_path, "--on", "local://")
    with pytest.raises(BundleError):
        pack([str(tmp_path)], QUICK)


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
    transport = Scripted(answer(answer=FACTS), *scripts, answer(answer={"ended": True}))
    said = []
    with pytest.raises(BoardError, match=told):
        measure_on(Board(transport, say=said.append), pack(bundles[:1], QUICK, own=False), QUICK)
    assert transport.scripts == [] and "clock is off" in said[0]  # the last script was the request to end


def test_silence_and_no_contact(bundles):
    board = Board(Scripted("sleep 30", "kill -9 $$", "kill -9 $$"), patience_s=0.5)
    with pytest.raises(BoardError, match="silent for 1 s"):
        board.ask("hello", silence_s=1)
    with pytest.raises(BoardError, match="no contact for 0 s; a run that goes on there ends itself"):
        board.insist("follow")


def test_nothing_of_ours_is_interpolated():
    assert COMMAND.startswith("exec sh -c '") and "!" not in COMMAND and "\n" not in COMMAND and "`" not in COMMAND
    url = "ssh://a@b"
    assert open_transport(url).argv(COMMAND)[-3:] == ["--", "b", COMMAND]


@pytest.mark.slow
def test_the_agent_installs_itself_into_a_venv_of_its_own(sshd, bundles, tmp_path):
    """From the board's index, then the same from wheels that are pushed to it."""
    base = getattr(sys, "_base_executable", sys.executable)
    sshd.stop()
    script(sshd.folder / "plain/python3", f'exec {base} "$@"')
    sshd.environment["PATH"] = f"{sshd.folder}/plain:/usr/bin:/bin"
    sshd.environment.update({k: v for k, v in os.environ.items() if k.startswith("PIP_") or k.endswith("_proxy")})
    sshd.start()
    (found,) = bench_on([sshd.url], bundles[:1], QUICK)
    assert found.error is None, found.error
    assert found.result.versions["saap"] and len(found.result.measurements[0].samples) == 2
    (agent,) = sshd.cache.glob("agent-*")
    packages = {path.name.split("-")[0] for path in agent.glob("venv/lib/python3*/site-packages/*.dist-info")}
    assert {"numpy", "onnxruntime", "psutil"} <= packages and not {"torch", "scipy", "click"} & packages
    wheels = tmp_path / "wheels"
    pip = [sys.executable, "-m", "pip", "download", "-q", "-d", str(wheels), "numpy", "onnxruntime", "psutil"]
    subprocess.run(pip, check=True)
    (found,) = bench_on([sshd.url], bundles[:1], QUICK, wheels=wheels)
    assert found.error is None, found.error
    assert len(list(sshd.cache.glob("agent-*"))) == 2 and clean(sshd.cache)
