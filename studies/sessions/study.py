"""False alarms and power of ``saap devices test``, simulated over what differs between sessions.

    python -m studies.sessions.study run                 # 4,000 tests a row, into cells/simulated.json
    python -m studies.sessions.study table --write

A session has an effect of its own (normal, the row's deviation) and ten repetitions with 2 % noise, of which it gives
the median. A test goes as the product does: one session of now, up to three while it is not clear.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench.judge.regression import MOST_FRESH, SESSIONS
from bench.judge.verdict import BETTER, CANNOT_TELL, SAME, WORSE, Verdict, judge_sessions
from studies.common import Cell, add_write_option, markdown, parser_of, provenance, read_cells, show_tables

FOLDER = Path(__file__).parent
REPETITIONS, NOISE, LIMIT = 10, 0.02, 0.05
DEVIATIONS = (0.0, 0.01, 0.02, 0.03, 0.04, 0.05)
EFFECTS = (0.0, 0.05, 0.10)
RECORDED = (SESSIONS, 10)


def sessions(count: int, deviation: float, effect: float, draw: np.random.Generator) -> list[float]:
    """Seconds per token of so many sessions."""
    noise = np.median(draw.normal(0, NOISE, (count, REPETITIONS)), axis=1)
    return [float(value) for value in np.exp(draw.normal(0, deviation, count) + noise) * (1 + effect)]


def tested(recorded: int, deviation: float, effect: float, draw: np.random.Generator) -> tuple[str, float, int]:
    """One test: what it says, what it could have seen, and how many sessions it took."""
    old, new = sessions(recorded, deviation, 0.0, draw), list[float]()
    while True:
        new += sessions(1, deviation, effect, draw)
        said = judge_sessions(Verdict(SAME), old, new, LIMIT)
        if said.verdict in (SAME, BETTER) or len(new) == MOST_FRESH:
            return said.verdict, said.visible or math.inf, len(new)


def simulate(tests: int, seed: int = 0) -> list[Cell]:
    """A row for each number of recorded sessions, effect and deviation."""
    draw, rows = np.random.default_rng(seed), []
    for recorded in RECORDED:
        for effect in EFFECTS:
            for deviation in DEVIATIONS:
                found = [tested(recorded, deviation, effect, draw) for _ in range(tests)]
                said = [verdict for verdict, _, _ in found]
                rows.append({
                    "recorded": recorded, "effect": effect, "deviation": deviation, "tests": tests,
                    **{verdict: said.count(verdict) for verdict in (WORSE, CANNOT_TELL, SAME, BETTER)},
                    "visible": float(np.median([visible for _, visible, _ in found])),
                    "sessions": float(np.mean([count for _, _, count in found])),
                })  # fmt: skip
    return rows


def table(rows: Sequence[Cell]) -> str:
    heads = ["recorded", "effect", "session deviation", "worse", "cannot tell", "same", "would see", "sessions of now"]
    return markdown(heads, (
        [row["recorded"], f"{row['effect']:.0%}", f"{row['deviation']:.0%}",
         *(f"{row[said] / row['tests']:.2%}" for said in (WORSE, CANNOT_TELL, SAME)),
         f"{row['visible']:.1%}", f"{row['sessions']:.1f}"]
        for row in rows
    ))  # fmt: skip


def tables() -> dict[str, str]:
    """The tables of README.md."""
    (cell,) = read_cells(FOLDER / "cells")
    return {"sessions": table(cell["rows"])}


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = parser_of(__doc__)
    parser.add_argument("do", choices=["run", "table"])
    parser.add_argument("--tests", type=int, default=4000, help="of each row")
    add_write_option(parser)
    given = parser.parse_args(arguments)
    if given.do == "run":
        cell = {**provenance(), "rows": simulate(given.tests)}
        (FOLDER / "cells" / "simulated.json").write_text(json.dumps(cell, indent=1) + "\n", encoding="utf-8")
    else:
        show_tables(FOLDER, tables(), given.write)


if __name__ == "__main__":
    main()
