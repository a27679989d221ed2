"""The bars of pruning, each with what was measured. A row enters a mean only with all of the seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from studies.common import METHODS, Bar
from studies.pruning.cells import SEEDS, Row, Variant, rows_of, slug

MARGINS = {0.2: 0.05, 0.5: 0.15}  # nats by ratio
MANY_SEEDS = tuple(range(10))
SPREAD = 1.25
SPREADS = (("refit", "none"), ("none", "none"), ("refit", "refit"))
LLM_PRUNER = ("param_first", "param_second", "param_mix", "vector")


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
    found = f"SAAP {nll:.4f}, best of {len(others) - incomplete} baselines {theirs:.4f} ({row.words()})"
    found += f": {nll - theirs:+.4f}"
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
    found = f"SAAP {nll:.4f}, best of {len(table) - 1} {METHODS[rival[1]]} {rival[0]:.4f}: {nll - rival[0]:+.4f}"
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
    found = (
        f"SAAP {own:.4f} (mean {statistics.fmean(values):.4f}), {rival[0].words()} {other:.4f} (mean {rival[1]:.4f})"
    )
    return Bar(check, bar, f"{found}: {own / other:.2f}x", own <= SPREAD * other)


def twice_bar(record: dict[str, Any] | None) -> Bar:
    """Whether two runs wrote the same files."""
    if record is None:
        return Bar("the same seed twice", "the same bytes", "not run", None)
    one, two = record["files"]
    differ = sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))
    return Bar("the same seed twice", "the same bytes", f"{len(one)} files, differ: {differ or 'none'}", not differ)


def all_bars(cells: Path, seeds: Sequence[int] = SEEDS, text: str = "test160") -> list[Bar]:
    """Every bar, from a folder of cells."""
    table, many = rows_of(cells / "table"), rows_of(cells / "table", cells / "seeds")
    twice = cells / "twice.json"
    return [
        *(margin_bar(table, ratio, text, seeds) for ratio in MARGINS),
        *(margin_bar(table, 0.2, text, seeds, other) for other in ({"sequences": 128}, {"text": "wikitext"})),
        *(alike_bar(table, ratio, kind, text, seeds) for ratio in MARGINS for kind in ("none", "refit")),
        *(spread_bar(many, "test40", kinds) for kinds in SPREADS),
        twice_bar(json.loads(twice.read_text()) if twice.is_file() else None),
    ]
