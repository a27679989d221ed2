"""What the scripts about pruning say of the bars, from cells written by hand."""

from __future__ import annotations

import json
import statistics

import pytest

import studies.pruning.bars as bars
import studies.pruning.seeds as seeds
from studies.pruning.study import slug


class Texts:
    """Nothing is read of them here."""

    def alike(self, seed):
        return None

    def test(self, count):
        return None


def test_the_table_s_seeds_are_not_run_again(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(seeds, "run_cell", lambda where, variant, *_: ran.append((where.name, slug(variant))))
    write_cell(tmp_path, "table", {"method": "saap", "compensate": "refit", "ratio": 0.2}, {0: 4.0})
    seeds.spread(tmp_path, tmp_path, Texts(), ["param_first"], [0, 1])
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
    assert "compensate=bias_heads=False_method=flap" in bar.found and "1 incomplete" in bar.found
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


def speed_cell(method, nll, measured, planned=1.25, attempt=0, **fields):
    variant = {"method": method, "compensate": "refit", "speedup": 1.25, "seed": 0, **fields}
    return {"variant": variant, "attempt": attempt, "asked": planned, "planned": {"speedup": planned},
            "quality": {"test40": nll} if nll else {}, "speed": {"speedup": measured}}  # fmt: skip


def test_speed_bars_take_the_bundle_that_is_closest():
    rows = [
        [speed_cell("saap", None, 1.21), speed_cell("saap", 4.0, 1.251, 1.29, 1)],
        [speed_cell("flap", 4.05, 1.2, text="alike")],
        [speed_cell("vector", 6.0, 1.25, text="alike")],
    ]
    bar = bars.speed_bar(rows, 1.25, "test40")
    assert bar.reached is True and "SAAP 4.0000, best of 2 baselines 4.0500" in bar.found
    assert "compensate=refit_method=flap_text=alike is 1.200x" in bar.found
    rows[2][0]["quality"]["test40"] = 3.9
    assert bars.speed_bar(rows, 1.25, "test40").reached is False
    assert bars.speed_bar(rows, 1.5, "test40").reached is None
    mine, others = bars.planned_bars(rows)
    assert mine.reached is True and "2 bundles, worst +3.3%" in mine.found
    assert others.reached is True and "+4.2%" in others.found
    rows[0][0]["speed"]["speedup"] = 1.15
    assert bars.planned_bars(rows)[0].reached is False


def test_prices_are_judged_alone_and_on_the_plan():
    c = {"low": 0.7, "high": 0.9}
    record = {"points": [0] * 40, "correlation": {"alone": {"rho": 0.81, **c}, "planned": {"rho": 0.79, **c}}}
    assert [bar.reached for bar in bars.price_bars({"a": record}, "a")] == [True, False]
    assert [bar.reached for bar in bars.price_bars({}, "a")] == [None]


def test_two_runs_that_are_not_there():
    assert bars.twice_bar(None).reached is None


def test_every_bar_is_shown_when_nothing_is_measured(tmp_path, capsys):
    bars.show(tmp_path, [0, 1, 2], "test160")
    lines = capsys.readouterr().out.splitlines()[2:]
    assert len(lines) == 4 + 6 + 2 + 2 + 1 + 3 + 1 + 1 and all(line.endswith("| - |") for line in lines)
