"""BUNDLE@fastest: measured once, kept where nothing else ran, and told through ``progress``."""

from collections import namedtuple

import pytest
from support.tiny_graphs import tiny_bundle

from export.bundle.manifest import read_manifest, write_manifest
from export.engine import fastest as module
from export.engine.spec import BundleSpec, resolve
from saap.base.interpreters import PEER_PYTHON


class Notes(list):
    """A progress that keeps the sentences that it is told."""

    def __call__(self, label, done, total):
        pass

    def note(self, text):
        self.append(text)


@pytest.fixture
def bundle(tmp_path):
    """One that says it was exported for OpenVINO, too."""
    path = tiny_bundle(tmp_path / "bundle")
    manifest = read_manifest(path)
    manifest.lineage["engines"] = {"openvino": {"exact": True}}
    write_manifest(path, manifest)
    return path


@pytest.fixture
def timed(tmp_path, monkeypatch):
    """Seconds of a token by engine, as if measured; the engines that took part."""
    seconds, calls = {"onnxruntime": 0.02, "openvino": 0.01}, []

    def measured(path, rows, progress):
        calls.append([row.name for row in rows])
        return seconds

    monkeypatch.setenv("SAAP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "seconds_per_token", measured)
    monkeypatch.setattr(module, "time_of_others", lambda: lambda: 0.0)
    monkeypatch.setattr("export.engine.table.python_with", lambda *_: "python")
    return seconds, calls


def test_the_fastest_engine_is_measured_once(bundle, timed, monkeypatch):
    _, calls = timed
    notes = Notes()
    assert [resolve(f"{bundle}@fastest", notes) for _ in range(2)] == [BundleSpec(bundle, "openvino")] * 2
    assert calls == [["onnxruntime", "openvino"]]
    assert notes == [f"{bundle} decodes fastest in openvino here (tokens per second: openvino 100.0, onnxruntime 50.0)"]
    monkeypatch.setattr("export.engine.table.absent", list)
    assert resolve(f"{bundle}@fastest", notes, here=True).engine == "onnxruntime" and resolve(bundle).engine is None
    assert notes[1:] == ["openvino is not installed, so it takes no part: pip install openvino"]


def test_what_is_found_beside_other_work_is_not_kept(bundle, timed, monkeypatch):
    seconds, calls = timed
    seconds["openvino"] = 0.3
    monkeypatch.setattr(module, "time_of_others", lambda: lambda: 0.47)
    notes = Notes()
    assert [resolve(f"{bundle}@fastest", notes).engine for _ in range(2)] == ["onnxruntime"] * 2
    assert len(calls) == 2
    assert notes[0] == "other processes took 47% of the cores meanwhile, so the answer is not kept"


def test_others_are_told_from_ourselves_and_our_children(monkeypatch):
    """Two cores, ten seconds: six of them are ours and our children's, four those of others."""
    core = namedtuple("core", "user nice system idle")
    now = {"cores": [core(1, 0, 1, 5)] * 2, "ours": (1.0, 1.0, 0.0, 0.0, 0.0), "clock": 100.0}
    monkeypatch.setattr("psutil.cpu_times", lambda percpu: now["cores"])
    monkeypatch.setattr(module, "allowed_cores", lambda: [0, 1])
    monkeypatch.setattr(module.os, "times", lambda: now["ours"])
    monkeypatch.setattr(module.time, "monotonic", lambda: now["clock"])
    share = module.time_of_others()
    now.update(cores=[core(4, 1, 2, 9), core(3, 0, 3, 9)], ours=(2.0, 1.0, 4.0, 1.0, 0.0), clock=110.0)
    assert share() == pytest.approx((9 - 6) / 20)
    now["clock"] = 100.1
    assert share() == pytest.approx(3)  # never more than what a second would make of it


def test_the_fastest_engine_by_turns(bundle, monkeypatch):
    pytest.importorskip("openvino")
    monkeypatch.delenv(PEER_PYTHON, raising=False)
    for name, value in (("LOAD_S", 0.05), ("BURST_S", 0.001), ("MOST_LOADS", 4)):
        monkeypatch.setattr(f"export.engine.turns.{name}", value)
    monkeypatch.setattr(module, "PROMPT", 8)
    monkeypatch.setattr(module, "GENERATE", 8)
    assert resolve(f"{bundle}@fastest").engine in ("onnxruntime", "openvino")
