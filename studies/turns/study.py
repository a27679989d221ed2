"""How well do turns between loaded models know a ratio?

    python -m studies.turns.study run A B --threads 1 --trials 20 --seconds 60     # a cell each, into cells/
    python -m studies.turns.study run A A --threads 2 --trials 20 --seconds 60
    python -m studies.turns.study table --write

A and B are bundles. Between trials nothing is kept but the page cache.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from bench.judge.verdict import SAME, Verdict, judge_ratio
from bench.measure.bursts import take_turns
from bench.measure.options import BenchOptions
from bench.measure.result import Bursts, Load
from bench.runtimes.peers import read_peers
from studies.common import Cell, add_write_option, cpu_of, markdown, parser_of, provenance, read_cells, show_tables

FOLDER = Path(__file__).parent
PROMPT, GENERATE = 64, 128


def trial(specs: Sequence[str], threads: int, seconds: float) -> Bursts:
    plan = BenchOptions(prompt=PROMPT, generate=GENERATE, threads=threads, ratio_time_s=seconds)
    return take_turns(read_peers(specs, plan.positions, names=["A", "B"]), plan.settings()[0], plan)


def bursts_of(cell: Cell) -> Bursts:
    """What a cell holds, as it was measured."""
    return Bursts(**{**cell["bursts"], "loads": [Load(**load) for load in cell["bursts"]["loads"]]})


def table(cells: Sequence[Cell]) -> str:
    """A row for each pair, thread count and length of the trials."""
    rows = []
    for key in dict.fromkeys(_key(cell) for cell in cells):
        some = [bursts_of(cell) for cell in cells if _key(cell) == key]
        found = [ratio for bursts in some if (ratio := bursts.ratio("A", "B", "decode")) is not None]
        mean = float(np.exp(np.mean([ratio.log for ratio in found])))
        said = [judge_ratio(Verdict(SAME), ratio, 0.02).verdict for ratio in found]
        clocks = [max(load.token_s[0]) / min(load.token_s[0]) for bursts in some for load in bursts.loads]
        rows.append([
            key[0], key[1], f"{key[2]:.0f} s", len(some), f"{1 / mean:.4f}",
            f"{max(abs(ratio.ratio / mean - 1) for ratio in found):.2%}",
            f"{np.median([ratio.half_width for ratio in found]):.2%}",
            f"{sum(ratio.low <= mean <= ratio.high for ratio in found)} of {len(found)}",
            ", ".join(f"{said.count(verdict)} {verdict}" for verdict in dict.fromkeys(said)),
            f"{np.median(clocks):.2f}x", cpu_of(key[3]),
        ])  # fmt: skip
    return markdown(
        ["pair", "threads", "each", "trials", "speed of B over A", "farthest from it", "95 % interval, half",
         "holds the mean", "verdicts at 2 %", "a token's time moved by", "machine"], rows
    )  # fmt: skip


def _key(cell: Cell) -> tuple[str, int, float, str]:
    return cell["pair"], cell["bursts"]["n_threads"], cell["seconds"], cell["machine"]


def tables() -> dict[str, str]:
    """The tables of README.md."""
    return {"turns": table(read_cells(FOLDER / "cells"))}


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = parser_of(__doc__)
    parser.add_argument("do", choices=["run", "table"])
    parser.add_argument("specs", nargs="*", metavar="BUNDLE")
    parser.add_argument("--pair", default="A, B", help="what the two are, for the table")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=60)
    add_write_option(parser)
    given = parser.parse_args(arguments)
    if given.do == "table":
        return show_tables(FOLDER, tables(), given.write)
    for _ in range(given.trials):
        found = trial(given.specs, given.threads, given.seconds)
        cell = {**provenance(), "pair": given.pair, "seconds": given.seconds, "bursts": rounded(found)}
        name = f"{time.strftime('%Y%m%d-%H%M%S')}.json"
        (FOLDER / "cells" / name).write_text(json.dumps(cell) + "\n", encoding="utf-8")
        ratio = found.ratio("A", "B", "decode")
        print(
            ratio and f"{1 / ratio.ratio:.4f} ({1 / ratio.high:.4f} to {1 / ratio.low:.4f})",
            found.failure or "",
            flush=True,
        )


def rounded(bursts: Bursts) -> Cell:
    """With seven digits, so that a cell is small."""
    document = asdict(bursts)
    for load in document["loads"]:
        for name in ("prefill_s", "token_s"):
            load[name] = [[round(value, 9) for value in values] for values in load[name]]
    return document


if __name__ == "__main__":
    main()
