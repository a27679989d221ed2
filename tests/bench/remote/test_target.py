"""`saap bench --on` over a real sshd: the same result as here, nothing lost, nothing left."""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import psutil
import pytest
from support.agent_requests import RUN
from support.bench_samples import measurement, result
from support.command_line import here, refused
from support.remote_runs import (
    LONG,
    ONCE,
    OPTIONS,
    OWN_PACKAGES,
    QUICK,
    VENV,
    one,
    remains,
    running,
    running_bench,
    script,
    two_bundles,
)

from bench.costs.options import CostsOptions
from bench.judge.comparison import compare
from bench.measure.run import measure
from bench.remote import board as remote_board
from bench.remote import files, target
from bench.remote.board import Board
from bench.remote.facts import probe_facts
from bench.remote.files import REQUIREMENTS, pack
from bench.remote.options import BoardOptions
from bench.remote.target import Target, measure_on
from devices.agent.home import Lock
from devices.transport import BoardError, Local, open_transport
from export.bundle.manifest import BundleError
from export.engine.table import OPENVINO, row_of
from saap.base.interrupt import ask_to_end, ended_as_by_a_person


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    return two_bundles(tmp_path_factory.mktemp("bundles"))


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    """One that greets every login, which is no garbage."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("board")
        greeting = f'echo "Welcome to the board"\nexec {sys.executable} "$@"'
        yield from running(folder, patch, path=f"{script(folder / 'loud/python3', greeting).parent}:{VENV}")


@pytest.fixture
def sshd(board):
    yield board
    assert not remains(board.cache)


def form(value):
    """Names and types, without the values; the numbers of a list may differ in count."""
    if dataclasses.is_dataclass(value):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {name: form(part) for name, part in value.items()}
    if isinstance(value, list):
        return [form(value[0])] if value else []
    return "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__


def test_a_result_has_the_form_of_a_local_one_and_a_second_run_sends_only_what_rotted_there(sshd, bundles):
    local, found = measure(bundles, ONCE), one(sshd.url, bundles, ONCE)
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

    labels = []
    before = {path: path.stat().st_ino for path in (sshd.cache / "files").iterdir()}
    whole = max(Path(bundles[0]).iterdir(), key=lambda path: path.stat().st_size).read_bytes()
    rotten = sshd.cache / "files" / hashlib.sha256(whole).hexdigest()
    rotten.write_bytes(b"x" + whole[1:])
    spec = str(bundles[0])
    again = one(sshd.url, [spec], ONCE, progress=lambda label, done, total: labels.append((label, total)))
    assert [(m.name, m.spec) for m in again.measurements] == [("dense", spec)]
    assert again.measurements[0].samples and rotten.read_bytes() == whole
    assert {total for label, total in labels if label.startswith("push")} == {len(whole) / 1e6}
    assert not [label for label, _ in labels if label.startswith("install")]
    rest = {path: path.stat().st_ino for path in (sshd.cache / "files").iterdir() if path != rotten}
    assert rest == {path: number for path, number in before.items() if path != rotten}
    assert len(list(sshd.cache.glob("agent-*"))) == 1


def test_a_board_is_described_as_this_host_is(sshd):
    here_facts = json.loads(here("devices", "probe", "--json").stdout)
    done = here("devices", "probe", "--on", sshd.url, "--board-packages", "--bandwidth", "--json")
    there = json.loads(done.stdout)
    assert there["bandwidth"][0]["n_threads"] == 1 and there["bandwidth"][0]["bytes_per_s"] > 1e8
    assert {name: value for name, value in there.items() if name != "bandwidth"} == here_facts
    assert sshd.url in here("devices", "probe", "--on", sshd.url, "--board-packages").stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--board-packages"], "--board-packages is for --on: leave it out, or name a board"),
        (["--on", "nowhere"], "nowhere"),
    ],
)
def test_a_probe_refuses_what_names_no_board(options, message):
    assert message in refused("devices", "probe", *options)


def test_facts_of_a_board_are_checked_and_steer_no_terminal(monkeypatch):
    document = dataclasses.asdict(probe_facts(bandwidth=False))

    def answered(document):
        return lambda url, shipment, task, progress, say: task.read(url, document)

    document["host"]["board"] = "\x1b[31mred"
    monkeypatch.setattr(target, "run_at", answered(document))
    assert "?[31mred" in here("devices", "probe", "--on", "local://").stdout
    monkeypatch.setattr(target, "run_at", answered({"host": {"board": 3}, "bandwidth": []}))
    with pytest.raises(ValueError, match="Expected"):  # which bench.remote.run makes a BoardError
        Target("local://").probe(bandwidth=False)


def test_the_engines_of_a_bundle_take_turns_there(sshd, bundles):
    pytest.importorskip("openvino")
    specs = [bundles[0], f"{bundles[0]}@openvino"]
    found = one(sshd.url, specs, ONCE)
    assert [(m.name, m.kind, m.spec) for m in found.measurements] == [
        ("dense", "onnx", specs[0]),
        ("dense@openvino", "openvino", specs[1]),
    ]
    assert all(m.samples for m in found.measurements)


def test_local_measures_with_what_a_board_gets(bundles, tmp_path, monkeypatch):
    """And with nothing of the checkout that the agent's Python would find."""
    monkeypatch.setenv("SAAP_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", VENV)
    assert one("local://", bundles[:1], ONCE).measurements[0].samples
    monkeypatch.setattr(files, "CODE", [pattern for pattern in files.CODE if not pattern.startswith("saap/base")])
    with pytest.raises(BoardError, match=r"local://: the run failed: .*No module named 'saap\.base'"):
        one("local://", bundles[:1], ONCE)
    assert not remains(tmp_path)


def test_an_engine_is_sent_as_a_requirement(bundles):
    plain, with_engine = pack(bundles[:1], 10), pack([bundles[0], f"{bundles[0]}@openvino"], 10)
    assert plain.install()["requirements"] == list(REQUIREMENTS)
    assert with_engine.install()["requirements"] == [*REQUIREMENTS, row_of(OPENVINO).requirement]
    assert with_engine.key != plain.key and with_engine.agent_bytes > plain.agent_bytes
    assert with_engine.sources.keys() == plain.sources.keys()  # one bundle's files, once


def test_engines_that_a_board_cannot_be_asked_for(bundles):
    with pytest.raises(BoardError, match="the fastest is known for this host alone: name the engines"):
        pack([f"{bundles[0]}@fastest"], 10)
    with pytest.raises(BundleError, match=r"has no file for llama\.cpp: export it with --engines onnx"):
        pack([f"{bundles[0]}@llama.cpp"], 10)


def test_a_connection_that_is_cut_there_and_then_here_loses_nothing(sshd, bundles):
    cuts, killed, said = [], [], []

    def progress(label, done, total):
        if done >= 2 and not cuts:
            cuts.append(sshd.cut())
        elif done >= 10 and not killed:
            mine = ssh_here(sshd)
            killed.extend(process.pid for process in mine)
            for process in mine:
                with contextlib.suppress(psutil.NoSuchProcess):  # a shared connection takes the others with it
                    process.kill()

    longer = dataclasses.replace(ONCE, repetitions=20)  # a fast board is done with six before the cut is noticed
    found = one(sshd.url, bundles[:1], longer, progress=progress, say=said.append)
    assert cuts[0] > 0 and killed and sum("trying again" in line for line in said) >= 2
    assert [sample.order for sample in found.measurements[0].samples] == list(range(20))


def holding(board: Board, folder: Path) -> Board:
    """With the lock there, for a run."""
    folder.mkdir(parents=True, exist_ok=True)
    Lock(folder).take(RUN, "me")
    board.run = RUN
    return board


def test_a_push_that_is_cut_goes_on_where_it_was(sshd, tmp_path, monkeypatch):
    offsets, content = [], os.urandom(1 << 20)
    source, sha = tmp_path / "weights", hashlib.sha256(content).hexdigest()
    source.write_bytes(content)

    def pieces(source, offset):
        offsets.append(offset)
        if len(offsets) > 1:
            yield content[offset:]
            return
        yield content[: len(content) // 2]
        part = sshd.cache / "files" / f"{sha}.part"
        while not (part.exists() and part.stat().st_size):
            time.sleep(0.02)
            yield b""
        sshd.cut()
        yield content[len(content) // 2 :]

    monkeypatch.setattr(remote_board, "pieces", pieces)
    with contextlib.closing(open_transport(sshd.url)) as transport:
        holding(Board(transport), sshd.cache).push(sha, source, 0)
    assert (sshd.cache / "files" / sha).read_bytes() == content
    assert len(offsets) == 2 and offsets[0] == 0
    Lock(sshd.cache).release(RUN)


@pytest.mark.parametrize(("kept", "told"), [(None, "No such file or directory"), (60_000, "it became shorter")])
def test_a_file_that_changes_while_it_is_sent_is_an_error_and_not_sent_forever(tmp_path, monkeypatch, kept, told):
    monkeypatch.setenv("SAAP_CACHE", str(tmp_path / "board"))
    data = bytes(100_000)
    source = tmp_path / "weights"
    source.write_bytes(data)
    size = remote_board.size_of

    def measured_before(path):
        found = size(path)
        if kept is None:
            path.unlink()
        else:
            path.write_bytes(data[:kept])
        return found

    monkeypatch.setattr(remote_board, "size_of", measured_before)
    board = holding(Board(Local(), patience_s=5, silence_s=5), tmp_path / "board")
    with pytest.raises(BoardError, match=f"{source} cannot be sent: {told}"):
        board.push(hashlib.sha256(data).hexdigest(), source, 0)


def test_a_reboot_in_the_middle(sshd, bundles, tmp_path):
    boot = tmp_path / "root/proc/sys/kernel/random/boot_id"
    boot.parent.mkdir(parents=True)
    boot.write_text("first\n")

    def progress(label, done, total):
        if label.startswith("bench"):
            boot.write_text("second\n")

    board = Board(open_transport(sshd.url), root=str(tmp_path / "root"))
    with pytest.raises(BoardError, match="it rebooted in the middle of the run, which is INVALID"):
        measure_on(board, pack(bundles[:1], LONG.positions, OWN_PACKAGES), LONG, progress)
    board.transport.close()


def ssh_here(sshd):
    """Processes of the test's own ssh."""
    return [process for process in psutil.process_iter() if str(sshd.folder / "ssh_config") in _command(process)]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_an_ended_command_leaves_no_worker_here_either(bundles):
    process = subprocess.Popen(
        [sys.executable, "-m", "saap.cli", "bench", bundles[0], *OPTIONS[:-4], "-r", "60", "--no-cold"],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    workers = []
    while not workers:
        children = psutil.Process(process.pid).children(recursive=True)
        workers = [child for child in children if any(part.startswith("bench.") for part in _command(child))]
    for worker in workers:
        worker.suspend()  # one that hangs has nobody else who would end it
    process.terminate()
    assert "interrupted" in process.communicate(timeout=60)[1] and process.returncode == 130
    assert not [worker for worker in workers if worker.is_running()]


def test_an_ended_command_leaves_the_board_clean(sshd, bundles):
    process = running_bench(bundles[0], sshd.url, sshd.cache)
    process.terminate()
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and said.splitlines()[-1] == "saap: interrupted; run the same command again"
    assert "Traceback" not in said and "could not be cleaned" not in said
    assert not ssh_here(sshd), "ssh is left here"


def test_under_nohup_a_closed_terminal_ends_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ended_as_by_a_person():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is ask_to_end
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert signal.getsignal(signal.SIGTERM) is not ask_to_end


def test_a_test_of_a_board_is_ended_like_a_bench(bundles, tmp_path, monkeypatch):
    seen = []

    def run_at(*arguments):
        seen.append(signal.getsignal(signal.SIGTERM))
        raise BoardError("enough")

    monkeypatch.setattr(target, "run_at", run_at)
    asked = ["--baselines", tmp_path / "kept", "--on", "local://", "--board-packages"]
    assert "enough" in refused("devices", "baseline", bundles[0], *asked, "-p", "4", "-n", "4", "-t", "1", "-r", "6")
    assert seen == [ask_to_end]


@pytest.mark.parametrize(
    "options", [dataclasses.replace(QUICK, threads=(1, 2), prompt=(512, 0), warmup=1, text=(1, 2)), CostsOptions()]
)
def test_options_travel_as_json(options):
    sent = {name: value for name, value in dataclasses.asdict(options).items() if name not in target.HERE_ONLY}
    assert msgspec.convert(json.loads(json.dumps(sent)), type(options)) == options


def test_what_the_board_refuses_is_said_with_its_name(sshd, bundles):
    with pytest.raises(BoardError, match=re.escape(sshd.url) + r".*1024 threads"):
        one(sshd.url, bundles[:1], dataclasses.replace(ONCE, threads=1024))


def test_a_worker_that_fails_is_invalid_as_it_is_here(sshd, bundles):
    found = one(sshd.url, bundles[:1], dataclasses.replace(ONCE, timeout_s=0.01))
    assert found.measurements[0].status == "INVALID"
    assert any("no answer within 0.01 s" in reason for reason in found.measurements[0].reasons)


def test_what_a_board_wrote_steers_no_terminal(bundles):
    shipment = pack(bundles[:1], ONCE.positions)
    sent = measurement("dense", [0.01], bundle_hash=shipment.packed[0].manifest.content_hash,
                       reasons=["\x1b[31mhot"], stderr=["\x1b]0;title\x07"])  # fmt: skip
    (m,) = target._bench_task(shipment, ONCE).read("local://", dataclasses.asdict(result(sent))).measurements
    assert (m.reasons, m.stderr, m.spec) == (["?[31mhot"], ["?]0;title?"], bundles[0])


def test_a_lock_that_nobody_hears_of_is_given_back(tmp_path, monkeypatch):
    monkeypatch.setenv("SAAP_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", VENV)
    request = {"do": "take", "root": "/", "run": "0" * 16, "owner": "me", "files": {}, "key": "0" * 16, "reserve": 0}
    sources = json.dumps(remote_board._sources()).encode()
    agent = subprocess.Popen(
        ["sh", "-c", remote_board.COMMAND], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    agent.stdout.close()
    agent.stdin.write(
        f"{len(sources)}\n".encode() + sources + json.dumps({**request, "agent_bytes": 0}).encode() + b"\n"
    )
    agent.stdin.close()
    assert agent.wait(30) == 1
    assert (tmp_path / "lock.guard").exists() and not (tmp_path / "lock.json").exists()


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """A board whose Python has no packages."""
    base = getattr(sys, "_base_executable", sys.executable)
    path = script(tmp_path / "plain/python3", f'exec {base} "$@"').parent
    yield from running(tmp_path, monkeypatch, path=f"{path}:/usr/bin:/bin")


@pytest.mark.slow
def test_the_agent_installs_itself_into_a_venv_of_its_own(bare, bundles, tmp_path):
    """From the board's index, then the same from wheels that are pushed to it."""
    bare.stop()
    bare.environment.update({k: v for k, v in os.environ.items() if k.startswith("PIP_") or k.endswith("_proxy")})
    bare.start()
    result = Target(bare.url).bench(bundles[:1], QUICK)
    assert result.versions["saap"] and len(result.measurements[0].samples) == 2
    (agent,) = bare.cache.glob("agent-*")
    packages = {path.name.split("-")[0] for path in agent.glob("venv/lib/python3*/site-packages/*.dist-info")}
    assert {"msgspec", "numpy", "onnxruntime", "psutil"} <= packages and not {"torch", "scipy", "click"} & packages
    wheels = tmp_path / "wheels"
    pip = [sys.executable, "-m", "pip", "download", "-q", "-d", str(wheels), *REQUIREMENTS]
    subprocess.run(pip, check=True)
    Target(bare.url, BoardOptions(wheels)).bench(bundles[:1], QUICK)
    assert len(list(bare.cache.glob("agent-*"))) == 2 and not remains(bare.cache)
