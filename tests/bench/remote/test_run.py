"""A computer that was killed in the middle of a remote run, and measures again."""

import json
import os
from pathlib import Path

import psutil
import pytest
from support.command_line import here
from support.remote_runs import OPTIONS, remains, running, running_bench, two_bundles

from bench.remote.run import _folder, left


@pytest.fixture
def sshd(tmp_path, monkeypatch):
    yield from running(tmp_path, monkeypatch)


def test_a_killed_command_finds_the_board_free_when_it_is_run_again(sshd, tmp_path, monkeypatch):
    monkeypatch.setenv("SAAP_CACHE", str(tmp_path / "cache"))
    bundle = two_bundles(tmp_path)[0]
    process = running_bench(bundle, sshd.url, sshd.cache)
    process.kill()
    process.communicate()
    assert remains(sshd.cache), "the run goes on there"
    assert "decode" in here("bench", bundle, "--on", sshd.url, *OPTIONS).stdout
    assert not remains(sshd.cache)
    assert not list((tmp_path / "cache/boards").glob("*/*"))


def test_only_runs_of_processes_that_are_gone_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAAP_CACHE", str(tmp_path))
    place = _folder("ssh://a")
    place.mkdir(parents=True)
    mine = {"pid": os.getpid(), "started": psutil.Process().create_time()}
    notes = {"living": mine, "reused": {**mine, "started": 1.0}, "gone": {"pid": 2**22 + 1, "started": 1.0}}
    for name, about in notes.items():
        (place / f"{name}.json").write_text(json.dumps(about))
    (place / "damaged.json").write_text("{")
    assert left("ssh://a") == ["gone", "reused"]
    assert left("ssh://a") == [] == left("ssh://b")
    assert [note.name for note in place.iterdir()] == ["living.json"]
