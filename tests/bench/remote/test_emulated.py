"""aarch64 without a board. The slow tests do what docs/devices.md says, with qemu-user and the real wheels."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support.bench_samples import measurement, result
from support.command_line import here, refused
from support.remote_runs import script
from support.tiny_graphs import tiny_bundle

from bench.measure.options import BenchOptions
from bench.measure.result import INVALID, Result
from bench.remote.emulated import GREEDY, Answer, document, emulate, judged
from devices.emulate import qemu as devices_emulate
from devices.emulate.qemu import CPUS, Emulated, EmulationError, Root, prepare
from devices.probe.host import probe
from export.bundle.manifest import read_manifest
from saap.cli.devices import emulate as emulate_command

TEXT = tuple(range(3, 27))


WHOLE = "emulated/trixie-arm64-onnxruntime-1.23.2/whole"
FAILS = "echo 'I: working' >&2; echo 'E: apt-get update failed' >&2; exit 25"


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes programs of sh, by name, the only ones in PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def make(**texts: str) -> None:
        for name, text in texts.items():
            script(folder / name.replace("_", "-"), text)

    return make


@pytest.mark.parametrize(
    ("texts", "pip", "says"),
    [
        ({}, True, "apt install qemu-user mmdebstrap"),
        ({"qemu_aarch64_static": "exit 0"}, True, "mmdebstrap is not installed"),
        ({"qemu_aarch64": "exit 9", "mmdebstrap": "exit 9"}, False, r"this Python has no pip.*ensurepip"),
        (
            {"qemu_aarch64": "exit 0", "mmdebstrap": FAILS},
            True,
            "Debian's arm64 packages cannot be fetched: E: apt-get",
        ),
    ],
)
def test_what_is_missing_is_said_and_nothing_is_left(programs, monkeypatch, tmp_path: Path, texts, pip, says) -> None:
    programs(**texts)
    if not pip:
        monkeypatch.setattr(devices_emulate, "find_spec", lambda name: None)
    with pytest.raises(EmulationError, match=says):
        prepare(tmp_path, "1.23.2")
    assert not list(tmp_path.glob("emulated/*"))


def test_what_another_process_made_meanwhile_is_kept(programs, monkeypatch, tmp_path: Path) -> None:
    programs(qemu_aarch64="exit 0")
    theirs = tmp_path / WHOLE

    def meanwhile(partial: Path, version: str) -> None:
        theirs.parent.mkdir()
        theirs.write_text("theirs")

    monkeypatch.setattr(devices_emulate, "_unpack_debian", lambda partial, archive: partial.mkdir())
    monkeypatch.setattr(devices_emulate, "_install_wheels", meanwhile)
    assert prepare(tmp_path, "1.23.2").path == theirs.parent
    assert theirs.read_text() == "theirs" and len(list(theirs.parent.parent.iterdir())) == 1


def test_what_is_whole_is_not_fetched_again(programs, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    programs(qemu_aarch64='echo "$QEMU_CPU" "$@"')
    place = (tmp_path / "it's a cache" / WHOLE).parent
    place.mkdir(parents=True)
    (place / "whole").touch()
    root = prepare(tmp_path / "it's a cache", "1.23.2")
    board = Emulated(root, "cortex-a76", tmp_path / "home")
    done = subprocess.run(board.argv("python3 -c pass"), capture_output=True, text=True, check=True)
    program_path = place / "usr/bin/python3.13"
    assert done.stdout.strip() == f"cortex-a76 -0 {root.python} -L {place} {program_path} -c pass"


class Board:
    """Stands in for a run on an emulated CPU."""

    def __init__(self, answers: dict[str, dict[str, object]], architecture: str = "aarch64", **fields: object) -> None:
        self.answers, self.architecture, self.fields = answers, architecture, fields

    def __call__(self, spec: str, plan: BenchOptions, board: Emulated, progress: object) -> Result:
        cpu = board.name.split()[-1]
        found = result(measurement("tiny", [0.01], **self.fields), settings={"answers": {"tiny": self.answers[cpu]}})
        return replace(found, device={"architecture": self.architecture})


def test_a_changed_token_or_likelihood_is_a_fault_and_speeds_are_null(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "tiny")
    here = emulate(str(bundle), (), TEXT, Root(bundle, "qemu")).reference
    host = {"tokens": here.tokens, "nll": here.nll}
    answers = {"a": host, "b": {**host, "tokens": [*here.tokens[:4], -1, *here.tokens[5:]]}, "c": {**host, "nll": None}}
    found = emulate(str(bundle), list(answers), TEXT, Root(tmp_path, "qemu"), run=Board(answers))
    same, token, lost = found.answers
    assert same.decode_ts is None and "emulator" in same.unknown["decode_ts"]
    assert (same.same_tokens, same.faults, found.exit_code) == (GREEDY, [], 1)
    assert len(token.faults) == 1 and "from the 5. on" in token.faults[0]
    told = json.loads(json.dumps(document(found), allow_nan=False))["answers"][2]
    assert lost.faults and told["nll"] is None and told["unknown"]["nll_difference"] == "it is not a number"
    alone = emulate(str(bundle), ["a"], TEXT, Root(tmp_path, "qemu"), run=Board(answers))
    assert alone.exit_code == 0


@pytest.mark.parametrize(("moved", "faults"), [(0.019, 0), (-0.021, 1), (float("nan"), 1)])
def test_four_bits_are_judged_by_their_likelihood(tmp_path: Path, moved: float, faults: int) -> None:
    manifest = replace(read_manifest(tiny_bundle(tmp_path / "tiny")), bits=4)
    reference = Answer("here", [1, 2, 3], 2.0)
    assert len(judged(Answer("max", [1, 9, 9], 2.0 + moved), reference, manifest).faults) == faults


@pytest.mark.parametrize(
    ("board", "says"),
    [
        (Board({"max": {"tokens": [1], "nll": 1.0}}, architecture="x86_64"), "was not used: the run was on x86_64"),
        (Board({"max": {"error": "exit 1"}}), "does not run on an emulated max: exit 1"),
        (
            Board({"max": {"tokens": [1], "nll": 1.0}}, samples=[], status=INVALID, reasons=["no answer within 9 s"]),
            "does not run on an emulated max: no answer within 9 s",
        ),
    ],
)
def test_a_run_that_proves_nothing_is_none(tmp_path: Path, board: Board, says: str) -> None:
    with pytest.raises(EmulationError, match=says):
        emulate(str(tiny_bundle(tmp_path / "tiny")), ["max"], TEXT, Root(tmp_path, "qemu"), run=board)


def test_the_command_refuses_what_it_does_not_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = tiny_bundle(tmp_path / "tiny")
    assert "cortex-a72" in refused("devices", "emulate", bundle, "--cpu", "cortex-m4")
    assert "--tokens 2 or more" in refused("devices", "emulate", bundle, "--tokens", "1")
    monkeypatch.setattr(emulate_command, "text_ids", lambda bundle: (1,))
    assert "has room for 1 token of text, and 2 are needed" in refused("devices", "emulate", bundle)
    monkeypatch.setattr(emulate_command, "text_ids", lambda bundle: TEXT)
    monkeypatch.setattr(devices_emulate.shutil, "which", lambda name: None)
    assert "apt install qemu-user mmdebstrap" in refused("devices", "emulate", bundle)


@pytest.fixture(scope="session")
def tools() -> None:
    """qemu-user and mmdebstrap, installed where that is allowed."""
    if shutil.which("mmdebstrap") and (shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")):
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        pytest.skip("qemu-user and mmdebstrap are not installed, and only root can: apt install qemu-user mmdebstrap")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", "qemu-user", "mmdebstrap"]):
        done = subprocess.run(["apt-get", *command], capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            pytest.skip(f"qemu-user and mmdebstrap cannot be installed: {done.stderr.strip().splitlines()[-1:]}")


@pytest.fixture(scope="session")
def root(tools: None) -> Root:
    from saap.base.files import cache_directory

    try:
        return prepare(cache_directory(), str(probe()["onnxruntime"]))
    except EmulationError as error:
        if "cannot be fetched" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.mark.slow
@pytest.mark.parametrize("cpu", CPUS)
def test_the_emulated_cpu_has_the_kernels_features(root: Root, cpu: str, tmp_path: Path) -> None:
    """What HWCAP tells there is what ONNX Runtime chooses kernels by (Linux, arch/arm64 uapi hwcap.h)."""
    code = (
        "import ctypes; get = ctypes.CDLL(None).getauxval; get.restype = ctypes.c_ulong; "
        "print(get(16) >> 20 & 1, get(26) >> 13 & 1)"
    )
    done = subprocess.run(
        Emulated(root, cpu, tmp_path).argv(f'python3 -c "{code}"'), capture_output=True, text=True, check=True
    )
    dotprod, i8mm = (bit == "1" for bit in done.stdout.split())
    assert (dotprod, i8mm) == {"cortex-a72": (False, False), "cortex-a76": (True, False), "max": (True, True)}[cpu]


@pytest.mark.slow
@pytest.mark.parametrize("bits", [32, 4])
def test_a_bundle_says_the_same_on_every_cpu(
    root: Root, tiny_model: Callable[..., Path], tmp_path: Path, bits: int
) -> None:
    from support.exported import export_bundle

    export_bundle(tiny_model(), tmp_path / "bundle", bits=bits)
    found = emulate(str(tmp_path / "bundle"), list(CPUS), TEXT, root)
    assert [answer.cpu for answer in found.answers] == list(CPUS)
    assert not [fault for answer in found.answers for fault in answer.faults]
    assert {answer.versions["onnxruntime"] for answer in found.answers} == {probe()["onnxruntime"]}


@pytest.mark.slow
def test_the_command_on_one_cpu(root: Root, tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "tiny")
    done = here("devices", "emulate", bundle, "--cpu", "cortex-a72", "--tokens", "16")
    assert "16 of 16" in done.stdout and "speeds are null" in done.stdout
