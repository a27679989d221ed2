"""The made-up engine of docs/extending.md: exported for, generated with, evaluated, benched, and named by @fastest."""

import json
import re
from pathlib import Path

import pytest
from support.command_line import here

from export.engine import table
from export.engine.spec import resolve
from export.engine.table import Row
from saap.base.interpreters import PEER_PYTHON

PAGE = (Path(__file__).resolve().parents[3] / "docs/extending.md").read_text(encoding="utf-8")


@pytest.fixture
def plain(tmp_path, monkeypatch):
    """Make the page's module importable, here and in children, and put its row into the table."""
    module, row = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[:2]
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages/plain_engine.py").write_text(module)
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    monkeypatch.setenv("SAAP_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(PEER_PYTHON, raising=False)
    monkeypatch.setattr(table, "ROWS", (*table.ROWS, eval(row, {"Row": Row})))  # noqa: S307  our own page


def test_a_module_and_a_row_are_an_engine(plain, tiny_model, tmp_path, monkeypatch):
    text, bundle = tmp_path / "text.txt", tmp_path / "bundle"
    text.write_text("a river rose and a bridge was closed\n" * 400)
    here("export", tiny_model(), "-o", bundle, "--engines", "onnxruntime,plain", "--text", text)
    assert json.loads((bundle / "bundle.json").read_text())["lineage"]["engines"]["plain"]["exact"] is True
    spec, words = f"{bundle}@plain", ["--raw", "--max-tokens", 8, "a river"]
    assert here("generate", spec, *words).stdout == here("generate", bundle, *words).stdout
    judge = tmp_path / "judge.txt"
    judge.write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    here("eval", bundle, spec, "--text", judge, "--chunk", 32, "--max-chunks", 2, "--json", tmp_path / "q.json")
    one, other = json.loads((tmp_path / "q.json").read_text())["rows"]
    assert other["name"] == spec and other["nll"] == pytest.approx(one["nll"], rel=1e-4)
    here("bench", bundle, spec, "-p", 8, "-n", 4, "-t", 1, "-r", 1, "--ratio-time", 0, "--json", tmp_path / "r.json")
    assert [m["kind"] for m in json.loads((tmp_path / "r.json").read_text())["measurements"]] == ["onnx", "plain"]
    monkeypatch.setattr("export.engine.fastest.seconds_per_token", lambda *_: {"onnxruntime": 0.2, "plain": 0.1})
    assert resolve(f"{bundle}@fastest").engine == "plain"
