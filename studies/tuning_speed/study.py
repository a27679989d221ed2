"""How fast does this checkout tune, against one before it?

    python -m studies.tuning_speed.study run BASE MODEL --teacher smollm2-135m --threads 2 --pairs 4    # into cells/
    python -m studies.tuning_speed.study busy BASE MODEL --tokens 2048 --pairs 2    # beside 0, 1 and 2 busy processes
    python -m studies.tuning_speed.study table --write

BASE is a checkout of the commit before, with an environment of its own in BASE/.venv (or --base-python), of the same
packages as this one; MODEL is a pruned directory. Nothing else should run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from bench.measure.statistics import bootstrap_ratio
from studies.common import (
    ROOT,
    Cell,
    add_write_option,
    commit_of,
    markdown,
    parser_of,
    provenance,
    read_cells,
    show_tables,
    used_by_saap,
)

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Side:
    """A checkout, the Python that runs it, and how many threads it may use."""

    checkout: Path
    python: Path
    threads: int

    def tuned(self, words: Sequence[str], place: Path) -> dict[str, Any]:
        """What one run of ``saap tune`` says of itself, how long it took, and its peak memory in MB."""
        out = place / "out"
        env = {"SAAP_CACHE": str(place / "cache"), "OMP_NUM_THREADS": str(self.threads)}
        began = time.monotonic()
        used = used_by_saap(self.checkout, self.python, ["tune", *words, "-o", out], place, env)
        seconds = time.monotonic() - began
        tuning = json.loads((out / "saap.json").read_text())["tuning"]
        history = tuning["history"]
        shutil.rmtree(out)
        shutil.rmtree(place / "cache", ignore_errors=True)
        return {
            "steps_tokens_per_s": history["tokens"] / history["seconds"],
            "command_s": seconds,
            "peak_mb": used.ru_maxrss * 1024 / 1e6,
            "text": tuning["text"].get("rows_sha256"),
            "losses": history["losses"],
            "held_out": history["held_out"][-1][1] if history["held_out"] else None,
        }


@contextmanager
def beside(count: int) -> Iterator[None]:
    """So many other processes compute all the time."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def busy_table(cells: Sequence[Cell]) -> str:
    """A row for each side and number of busy processes: medians, and the share of the speed that is had alone."""
    rows = []
    for machine, threads in dict.fromkeys((cell["machine"], cell["threads"]) for cell in cells):
        runs = [
            run for cell in cells if (cell["machine"], cell["threads"]) == (machine, threads) for run in cell["runs"]
        ]
        for side in dict.fromkeys(run["side"] for run in runs):
            speeds = {
                busy: median(r["steps_tokens_per_s"] for r in runs if (r["side"], r["busy"]) == (side, busy))
                for busy in sorted({run["busy"] for run in runs if run["side"] == side})
            }
            for busy, speed in speeds.items():
                count = sum((run["side"], run["busy"]) == (side, busy) for run in runs)
                share = f"{speed / speeds[0]:.2f}x" if busy else ""
                rows.append([side, busy, count, f"{speed:.0f}", share, threads, machine.split(" (")[0]])
    heads = ["commit", "busy processes", "runs", "tokens/s of steps", "of alone", "threads", "machine"]
    return markdown(heads, rows)


def table(cells: Sequence[Cell]) -> str:
    """A row for each machine, number of threads and commit, over the pairs of all its cells."""
    rows = []
    for key in dict.fromkeys(map(_key, cells)):
        pairs = [pair for cell in cells if _key(cell) == key for pair in cell["pairs"]]
        base, now = zip(*pairs, strict=True)
        speeds = [[run["steps_tokens_per_s"] for run in side] for side in (base, now)]
        ratio, low, high = bootstrap_ratio(*speeds, paired=True)
        alike = all(a.get("text") is not None and a["text"] == b["text"] for a, b in pairs)
        apart = max(np.abs(np.subtract(a["losses"], b["losses"])).max() for a, b in pairs)
        rows.append([
            key[1], len(pairs), *(f"{median(side):.0f}" for side in speeds), f"{ratio:.2f}x ({low:.2f} to {high:.2f})",
            *(f"{median(run['command_s'] for run in side):.0f} s" for side in (base, now)),
            *(f"{median(run['peak_mb'] for run in side) / 1000:.2f}" for side in (base, now)),
            f"{apart:.4f}" if alike else "other text", key[2][:7], key[0].split(" (")[0],
        ])  # fmt: skip
    return markdown(
        ["threads", "pairs", "tokens/s of steps before", "now", "ratio", "the command before", "now",
         "peak before, GB", "now", "a step's loss differs by at most", "before", "machine"], rows
    )  # fmt: skip


def _key(cell: Cell) -> tuple[str, int, str, int]:
    return cell["machine"], cell["threads"], cell["base"], cell["tokens"]


def tables() -> dict[str, str]:
    """The tables of README.md."""
    cells = read_cells(FOLDER / "cells")
    return {
        "speed": table([cell for cell in cells if "pairs" in cell]),
        "busy": busy_table([cell for cell in cells if "runs" in cell]),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = parser_of(__doc__)
    parser.add_argument("do", choices=["run", "busy", "table"])
    parser.add_argument("base", nargs="?", type=Path, help="the checkout from before")
    parser.add_argument("model", nargs="?", type=Path, help="a pruned directory")
    parser.add_argument("--teacher", default="smollm2-135m")
    parser.add_argument("--data", help="a text for both; default: each side's own")
    parser.add_argument("--base-python", type=Path, help="default: BASE/.venv/bin/python")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--pairs", type=int, default=4)
    add_write_option(parser)
    given = parser.parse_args(arguments)
    if given.do == "table":
        return show_tables(FOLDER, tables(), given.write)
    if given.model is None:
        parser.error(f"{given.do} needs BASE and MODEL")
    python = given.base_python or given.base / ".venv" / "bin" / "python"
    sides = [
        Side(given.base.resolve(), python.absolute(), given.threads),
        Side(ROOT, Path(sys.executable), given.threads),
    ]
    words = [str(given.model.resolve()), "--teacher", given.teacher, "--tokens", str(given.tokens),
             "--integers", "nearest", *(["--data", given.data] if given.data else [])]  # fmt: skip
    if given.do == "busy":
        return keep(given, {"runs": busy_runs(sides, words, given.pairs)})
    pairs = []
    with tempfile.TemporaryDirectory(prefix="saap-tuning-") as place:
        for number in range(given.pairs):
            pair: list[dict[str, Any]] = [{}, {}]
            for index in (0, 1) if number % 2 else (1, 0):
                pair[index] = sides[index].tuned(words, Path(place))
            pairs.append(pair)
            print([round(run["steps_tokens_per_s"], 1) for run in pair], flush=True)
    keep(given, {"pairs": pairs})


def busy_runs(sides: Sequence[Side], words: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """Each side alone and beside one busy process in turns; this one beside two as well."""
    runs = []
    with tempfile.TemporaryDirectory(prefix="saap-tuning-") as place:
        for number in range(rounds):
            for busy in (0, 1, 2):
                for side in sides if number % 2 else sides[::-1]:
                    if busy == 2 and side.checkout != ROOT:
                        continue
                    with beside(busy):
                        told = side.tuned(words, Path(place))
                    runs.append({**told, "busy": busy, "side": (commit_of(side.checkout) or "")[:7]})
                    print(runs[-1]["side"], busy, round(told["steps_tokens_per_s"], 1), flush=True)
    return runs


def keep(given: argparse.Namespace, measured: dict[str, Any]) -> None:
    """Write a cell."""
    asked = {"threads": given.threads, "tokens": given.tokens, "base": commit_of(given.base)}
    cell = {**provenance(), **asked, **measured}
    (FOLDER / "cells").mkdir(exist_ok=True)
    name = f"{time.strftime('%Y%m%d-%H%M%S')}.json"
    (FOLDER / "cells" / name).write_text(json.dumps(cell) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
