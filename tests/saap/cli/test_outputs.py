"""Where outputs go: never over an input, through devices and pipes as they are, and before anything is shown."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path

import pytest
from support.command_line import here

OLD = Path(__file__).parents[2] / "support" / "old"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Links to old products, and a text; what a command would write over is in ``state``."""
    for name in ("slim", "bundle", "dense"):
        (tmp_path / name).mkdir()
        for file in (OLD / name).iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    for name in ("result.json", "quality.json", "judge.txt"):
        (tmp_path / name).write_bytes((OLD / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def state(place):
    return {
        str(path.relative_to(place)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in place.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    "command",
    [
        "prune slim -o slim --ratio 0.1",
        "prune slim -o ./slim/../slim --ratio 0.1",
        "prune slim -o . --ratio 0.1",
        "tune slim -o slim",
        "tune slim -o dense --teacher dense",
        "run slim -o slim --ratio 0.1",
        "export slim -o slim",
        "export slim --target gguf -o slim/config.json",
        "eval slim --text judge.txt --json judge.txt",
        "eval slim --text judge.txt --json slim",
        "compare result.json result.json --json result.json",
        "compare quality.json quality.json --junit quality.json",
        "bench bundle --json bundle",
        "bench bundle --history result.json",
        "report result.json -o result.json",
        "report result.json -o bundle",
        "devices costs slim -o slim",
    ],
)
def test_an_output_that_is_an_input_is_refused(place, command):
    before = state(place)
    told = here(*command.split(), code=2).stderr
    assert told.startswith("saap: ") and len(told.splitlines()) == 1, told
    assert state(place) == before


def test_devices_and_pipes_are_written_to_as_they_are(place):
    os.mkfifo("pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append(Path("pipe").read_text()))
    reader.start()
    here("compare", "quality.json", "quality.json", "--json", "pipe")
    reader.join(10)
    assert json.loads(read[0]) and Path("pipe").is_fifo()
    here("report", "result.json", "-o", "/dev/null")
    assert Path("/dev/null").is_char_device()
    told = here("report", "result.json", "-o", "/dev/full", code=2).stderr
    assert told == "saap: /dev/full: No space left on device: make room there, or write elsewhere\n"
    assert Path("/dev/full").is_char_device()
