"""The table of docs/exit-codes.md is what happens."""

import json
import re
from pathlib import Path

import pytest
from support.command_line import here
from support.old_products import old_products

ROOT = Path(__file__).parents[3]
OLD = old_products()
ROW = re.compile(r"^\| (\d+) \|", re.MULTILINE)


def edited(path, **fields):
    """A copy of an old result with other fields; its checksum goes with what it was of."""
    document = json.loads((OLD / "result.json").read_text())
    del document["checksum"]
    path.write_text(json.dumps(document | fields))
    return path


@pytest.fixture
def slower(tmp_path):
    (measurement,) = json.loads((OLD / "result.json").read_text())["measurements"]
    for sample in measurement["samples"]:
        sample["token_s"] = [2 * seconds for seconds in sample["token_s"]]
        sample["decode_s"] = sample["decode_s"] and 2 * sample["decode_s"]
    return edited(tmp_path / "slower.json", measurements=[measurement])


@pytest.fixture
def elsewhere(tmp_path):
    device = json.loads((OLD / "result.json").read_text())["device"]
    return edited(tmp_path / "elsewhere.json", device=device | {"cpu_model": "another", "fingerprint": "0" * 16})


def raising(error):
    def shown(*told):
        raise error

    return shown


def test_the_table_says_what_happens(slower, elsewhere, tmp_path, monkeypatch):
    result, bundle = OLD / "result.json", OLD / "bundle"
    compare = ("compare", result, slower, "--no-confirm")
    commands = [
        (0, ("devices", "list")),
        (0, compare),
        (1, (*compare, "--fail-on", "regression")),
        (1, ("devices", "check", bundle, "--device", "raspberry-pi-4", "--memory", "1MiB")),
        (2, ("compare", result, tmp_path / "none.json")),
        (2, ("devices", "list", "--no-such-option")),
        (2, ("report", result, "-o", tmp_path / "slower.json" / "below.html")),
        (3, ("compare", result, elsewhere, "--no-confirm")),
        (3, ("devices", "test", bundle, "--baselines", tmp_path / "none")),
        (3, ("devices", "test", bundle, "--baselines", tmp_path / "none", "--name", "other")),
    ]
    for code, words in commands:
        here(*words, code=code)
    monkeypatch.setattr("saap.cli.devices.profiles.print_table", raising(KeyboardInterrupt()))
    assert here("devices", "list", code=130).stderr == "saap: interrupted; run the same command again\n"
    monkeypatch.setattr("saap.cli.devices.profiles.print_table", raising(BrokenPipeError(32, "Broken pipe")))
    assert here("devices", "list", code=141).stderr == ""
    table = [int(code) for code in ROW.findall((ROOT / "docs" / "exit-codes.md").read_text())]
    assert table == sorted({code for code, _ in commands} | {130, 141})


def test_no_page_has_a_table_of_its_own():
    pages = [path for path in (ROOT / "docs").glob("*.md") if "| exit code |" in path.read_text()]
    assert [path.name for path in pages] == ["exit-codes.md"]


def test_a_pipe_whose_reader_has_gone_is_a_place(monkeypatch):
    """Unlike standard output it was asked for."""
    error = BrokenPipeError(32, "Broken pipe", "pipe")
    monkeypatch.setattr("saap.cli.devices.profiles.print_table", raising(error))
    told = here("devices", "list", code=2).stderr
    assert told == "saap: pipe: Broken pipe: what reads it has ended\n"
