"""The bars of pruning, each with what was measured, from the cells of pruning, prices, speedup and ablation.

    python -m studies.pruning.bars                 # each bar, reached or not, and the tables behind them
    python -m studies.pruning.bars --seeds 0 --text test40

The cells are made by pruning_bench.py (table, ablation), pruning_prices.py, pruning_speed.py and pruning_seeds.py. A
row enters a mean only with all of the seeds; the others are counted as incomplete.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from studies.prices.study import LIMIT
from studies.pruning.study import HERE, Variant, slug
from studies.speedup.rows import CLOSE, SPEEDUPS, Cell, Setup, closest, read_rows

MARGINS = {0.2: 0.05, 0.5: 0.15}  # nats by ratio
SEEDS, MANY_SEEDS = (0, 1, 2), tuple(range(10))
PLANNED, SPREAD = 0.05, 1.25
SPREADS = (("refit", "none"), ("none", "none"), ("refit", "refit"))
LLM_PRUNER = ("param_first", "param_second", "param_mix", "vector")


@dataclass
class Row:
    """The cells of one variant by their seed."""

    variant: Variant
    cells: dict[int, Cell] = field(default_factory=dict)

    def values(self, text: str, seeds: Iterable[int]) -> list[float] | None:
        """NLL per seed, nats per token; None where one is missing."""
        found = [self.cells[s]["nll"].get(text) if s in self.cells else None for s in seeds]
        known = [value for value in found if value is not None]
        return known if known and len(known) == len(found) else None

    def mean(self, text: str, seeds: Iterable[int]) -> float | None:
        """Mean NLL over the seeds."""
        values = self.values(text, seeds)
        return None if values is None else statistics.fmean(values)

    def removed(self, seeds: Iterable[int]) -> float:
        """Mean share of the layers' weights that went."""
        return statistics.fmean(self.cells[s]["achieved"]["ratio"] for s in seeds)

    def __str__(self) -> str:
        return slug({k: v for k, v in self.variant.items() if k != "ratio"})


@dataclass(frozen=True)
class Bar:
    """A check with its bar, what was found, and whether it is reached; None: not measured."""

    check: str
    bar: str
    found: str
    reached: bool | None


def rows_of(*folders: Path) -> list[Row]:
    """The cells of some folders by variant; of two cells of one name the first folder's counts."""
    rows: dict[str, Row] = {}
    for folder in folders:
        for path in sorted(folder.glob("*.json")):
            cell = json.loads(path.read_text())
            variant = {k: v for k, v in cell["variant"].items() if k != "seed"}
            rows.setdefault(slug(variant), Row(variant)).cells.setdefault(cell["variant"]["seed"], cell)
    return list(rows.values())


def ours(
    rows: Sequence[Row], ratio: float, compensate: str = "refit", calibration: Variant | None = None
) -> Row | None:
    """SAAP at its defaults with this compensation, calibrated as usual or as asked."""
    wanted = {"method": "saap", "compensate": compensate, "ratio": ratio, **(calibration or {})}
    return next((row for row in rows if row.variant == wanted), None)


def best(rows: Iterable[Row], text: str, seeds: Sequence[int]) -> tuple[Row, float] | None:
    """The row with the least mean NLL, of those that have all seeds."""
    known = [(row, mean) for row in rows if (mean := row.mean(text, seeds)) is not None]
    return min(known, key=lambda pair: pair[1], default=None)


def margin_bar(
    rows: list[Row], ratio: float, text: str, seeds: Sequence[int], calibration: Variant | None = None
) -> Bar:
    """SAAP against the best baseline at a ratio, as its authors have it; with our refit it is in the rows of like.

    Args:
        calibration: of SAAP, if not the usual: ``text`` or ``sequences`` as the cells have them.
    """
    check, bar = f"{ratio:.0%} of the layers' weights, {text}", f"NLL lower by {MARGINS[ratio]}"
    check += f", calibrated with {slug(calibration)}" if calibration else ""
    others = [row for row in rows if row.variant["ratio"] == ratio and row.variant["method"] != "saap"]
    others = [row for row in others if row.variant["compensate"] != "refit"]
    mine, rival = ours(rows, ratio, calibration=calibration), best(others, text, seeds)
    nll = mine.mean(text, seeds) if mine else None
    incomplete = sum(row.mean(text, seeds) is None for row in others)
    if mine is None or nll is None or rival is None:
        return Bar(check, bar, f"{'SAAP' if nll is None else 'baselines'} without all of seeds {list(seeds)}", None)
    row, theirs = rival
    found = f"SAAP {nll:.4f}, best of {len(others) - incomplete} baselines {theirs:.4f} ({row}): {nll - theirs:+.4f}"
    if incomplete:
        found += f"; {incomplete} incomplete"
    more = row.removed(seeds) - mine.removed(seeds)
    if more > 0:
        found += f"; SAAP keeps {more:.2%} of the layers' weights more"
    return Bar(check, bar, found, theirs - nll >= MARGINS[ratio])


def alike_table(rows: list[Row], ratio: float, compensate: str, text: str, seeds: Sequence[int]) -> list[tuple]:
    """(NLL, method, row): SAAP and the better form of each baseline on our text, all compensated alike; best first."""
    entries = []
    mine = ours(rows, ratio, compensate)
    if mine and (nll := mine.mean(text, seeds)) is not None:
        entries.append((nll, "saap", mine))
    kind = {"ratio": ratio, "compensate": compensate, "text": "alike"}
    alike = [row for row in rows if kind.items() <= row.variant.items() and row.variant["method"] != "saap"]
    for method in {row.variant["method"] for row in alike}:
        if found := best([row for row in alike if row.variant["method"] == method], text, seeds):
            entries.append((found[1], method, found[0]))
    return sorted(entries, key=lambda entry: entry[:2])


def alike_bar(rows: list[Row], ratio: float, compensate: str, text: str, seeds: Sequence[int]) -> Bar:
    """Whether SAAP is first of those."""
    check = f"like with like, {ratio:.0%}, compensation {compensate}"
    table = alike_table(rows, ratio, compensate, text, seeds)
    methods = [method for _, method, _ in table]
    if "saap" not in methods or len(methods) < 2:
        return Bar(check, "SAAP first", f"of {', '.join(methods) or 'none'} only", None)
    (nll, *_), rival = table[methods.index("saap")], next(entry for entry in table if entry[1] != "saap")
    found = f"SAAP {nll:.4f}, best of {len(table) - 1} {rival[1]} {rival[0]:.4f}: {nll - rival[0]:+.4f}"
    return Bar(check, "SAAP first", found, nll < rival[0])


def spread_bar(
    rows: list[Row], text: str, kinds: tuple[str, str], seeds: Sequence[int] = MANY_SEEDS, ratio: float = 0.2
) -> Bar:
    """Standard deviation over calibration seeds, against the LLM-Pruner that has the least mean NLL.

    Args:
        kinds: compensation of SAAP, and of LLM-Pruner.
    """
    check = f"spread over {len(seeds)} calibration seeds at {ratio:.0%}, compensation {kinds[0]} against {kinds[1]}"
    bar = f"<= {SPREAD}x that of LLM-Pruner alike"
    kind = {"ratio": ratio, "text": "alike", "compensate": kinds[1]}
    pruner = [r for r in rows if r.variant["method"] in LLM_PRUNER and kind.items() <= r.variant.items()]
    mine, rival = ours(rows, ratio, kinds[0]), best(pruner, text, seeds)
    values = mine.values(text, seeds) if mine else None
    if values is None or rival is None:
        return Bar(check, bar, f"{'SAAP' if values is None else 'LLM-Pruner'} without all seeds", None)
    own, other = (statistics.stdev(v) for v in (values, rival[0].values(text, seeds) or []))
    found = f"SAAP {own:.4f} (mean {statistics.fmean(values):.4f}), {rival[0]} {other:.4f} (mean {rival[1]:.4f})"
    return Bar(check, bar, f"{found}: {own / other:.2f}x", own <= SPREAD * other)


def price_bars(records: dict[str, Any], name: str) -> list[Bar]:
    """Rank correlation of prices and measured losses: alone decides; on top of a plan is beside it."""
    check, bar = "price against measured loss", f"rank correlation >= {LIMIT}"
    if name not in records:
        return [Bar(check, bar, "no such record", None)]
    bars = []
    for where in ("alone", "planned"):
        c = records[name]["correlation"][where]
        found = f"{c['rho']:.3f} ({c['low']:.3f} to {c['high']:.3f}), {len(records[name]['points'])} options"
        place = "alone" if where == "alone" else "on top of the plan"
        bars.append(Bar(f"{check}, {place}", bar, found, c["rho"] >= LIMIT))
    return bars


def speed_bar(rows: list[list[Cell]], speedup: float, text: str) -> Bar:
    """NLL of SAAP's int4 bundle against every baseline's that is as fast; means over SAAP's seeds."""
    check, bar = f"int4 bundles at {speedup}x measured, {text}", "perplexity below every baseline's"
    by_variant: dict[str, dict[int, float]] = {}
    slow = []
    for cells in rows:
        variant = cells[0]["variant"]
        cell = closest(cells, speedup) if variant["speedup"] == speedup else None
        if cell is None or text not in cell["quality"]:
            continue
        name = slug({k: v for k, v in variant.items() if k not in ("seed", "speedup")})
        by_variant.setdefault(name, {})[variant["seed"]] = cell["quality"][text]
        if abs(cell["speed"]["speedup"] / speedup - 1) > CLOSE:
            slow.append(f"{name} is {cell['speed']['speedup']:.3f}x")
    mine = by_variant.get("compensate=refit_method=saap")
    others = {n: v for n, v in by_variant.items() if "method=saap" not in n and mine and v.keys() >= mine.keys()}
    if not mine or not others:
        return Bar(check, bar, f"{'baselines' if mine else 'SAAP'} not measured", None)
    means = {name: statistics.fmean(values[s] for s in mine) for name, values in others.items()}
    nll, rival = statistics.fmean(mine.values()), min(means, key=means.__getitem__)
    found = f"SAAP {nll:.4f}, best of {len(means)} baselines {means[rival]:.4f} ({rival}): {nll - means[rival]:+.4f}"
    return Bar(check, bar, "; ".join([found, *slow]), nll < means[rival])


def planned_bars(rows: list[list[Cell]]) -> list[Bar]:
    """The largest difference of planned and measured speed-ups: SAAP's decides, the baselines' is beside it."""
    bars = []
    for who, is_ours in (("SAAP", True), ("baselines", False)):
        cells = [c for row in rows for c in row if c.get("speed") and (c["variant"]["method"] == "saap") == is_ours]
        errors = {
            slug({**c["variant"], "attempt": c["attempt"]}): c["planned"]["speedup"] / c["speed"]["speedup"] - 1
            for c in cells
        }
        worst = max(errors, key=lambda name: abs(errors[name]), default=None)
        found = f"{len(errors)} bundles, worst {errors[worst]:+.1%} ({worst})" if worst else "none timed"
        reached = abs(errors[worst]) <= PLANNED if worst else None
        bars.append(Bar(f"planned against measured speed-up, {who}", f"within {PLANNED:.0%}", found, reached))
    return bars


def twice_bar(record: dict[str, Any] | None) -> Bar:
    """Whether two runs wrote the same files."""
    if record is None:
        return Bar("the same seed twice", "the same bytes", "not run", None)
    one, two = record["files"]
    differ = sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))
    return Bar("the same seed twice", "the same bytes", f"{len(one)} files, differ: {differ or 'none'}", not differ)


def all_bars(where: Path, seeds: Sequence[int], text: str) -> list[Bar]:
    """Every bar, from the cells of a folder."""
    cells = where / "cells"
    table, many = rows_of(cells / "table"), rows_of(cells / "table", cells / "seeds")
    speeds = read_rows(Setup(Path(), None, cells=where.parent / "speedup" / "cells" / "host1"))
    prices, twice = (_read(path) for path in (where.parent / "prices" / "cells" / "prices.json", cells / "twice.json"))
    settings = len(rows_of(where.parent / "ablation" / "cells"))
    return [
        *(margin_bar(table, ratio, text, seeds) for ratio in MARGINS),
        *(margin_bar(table, 0.2, text, seeds, other) for other in ({"sequences": 128}, {"text": "wikitext"})),
        *(alike_bar(table, ratio, kind, text, seeds) for ratio in MARGINS for kind in ("none", "refit", "bias")),
        *(speed_bar(speeds, speedup, text) for speedup in SPEEDUPS),
        *planned_bars(speeds),
        *price_bars(prices or {}, slug({"ratio": 0.2, "seed": 0})),
        *(spread_bar(many, "test40", kinds) for kinds in SPREADS),
        twice_bar(twice),
        Bar("ablation", "each row with its command", f"{settings} settings: `pruning_bench.py show ablation`", None),
    ]


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.is_file() else None


def show(where: Path, seeds: Sequence[int], text: str) -> None:
    """The bars, then the tables that are like with like."""
    print("| check | bar | measured | |\n|---|---|---|---|")
    words = {True: "reached", False: "**not reached**", None: "-"}
    for bar in all_bars(where, seeds, text):
        print(f"| {bar.check} | {bar.bar} | {bar.found} | {words[bar.reached]} |")
    rows = rows_of(where / "cells" / "table")
    for ratio in MARGINS:
        for kind in ("none", "refit", "bias"):
            if table := alike_table(rows, ratio, kind, text, seeds):
                print(f"\n{ratio:.0%}, compensation {kind}, NLL on {text}, mean of seeds {list(seeds)}")
                print("| method | removed | NLL | row |\n|---|---|---|---|")
                for nll, method, row in table:
                    print(f"| {method} | {row.removed(seeds):.4f} | {nll:.4f} | {row} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--where", type=Path, default=HERE)
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), help="of the means")
    parser.add_argument("--text", default="test160", help="test160 confirms, test40 screens")
    given = parser.parse_args()
    show(given.where, [int(seed) for seed in given.seeds.split(",")], given.text)


if __name__ == "__main__":
    main()
