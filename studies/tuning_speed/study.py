"""How fast does this checkout tune, against one before it?

    python -m studies.tuning_speed.study run MODEL --base BASE --threads 2 --pairs 4    # into cells/
    python -m studies.tuning_speed.study busy MODEL --tokens 2048 --pairs 2    # beside 0, 1, 2 others
    python -m studies.tuning_speed.study precision MODEL --tokens 2048 --pairs 3    # bf16, fp32 and auto in turns
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

from bench.measure.statistics import bootstrap_ratio
from studies.common import (
    ROOT,
    Cell,
    add_write_option,
    commit_of,
    cpu_of,
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
            "precision": history["precision"],
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
    """A row for each machine and number of busy processes: medians, and the share of the speed that is had alone."""
    rows = []
    for machine, threads in dict.fromkeys((cell["machine"], cell["threads"]) for cell in cells):
        speeds: dict[int, list[float]] = {}
        for cell in cells:
            if (cell["machine"], cell["threads"]) == (machine, threads):
                for run in cell["runs"]:
                    speeds.setdefault(run["busy"], []).append(run["steps_tokens_per_s"])
        for busy, found in sorted(speeds.items()):
            share = f"{median(found) / median(speeds[0]):.2f}x" if busy else ""
            rows.append([busy, len(found), f"{median(found):.0f}", share, threads, cpu_of(machine)])
    heads = ["busy processes", "runs", "tokens/s of steps", "of alone", "threads", "machine"]
    return markdown(heads, rows)


def precision_table(cells: Sequence[Cell]) -> str:
    """A row for each machine: the rate in either precision, and what auto took."""
    rows = []
    for machine, threads in dict.fromkeys((cell["machine"], cell["threads"]) for cell in cells):
        alike = [cell for cell in cells if (cell["machine"], cell["threads"]) == (machine, threads)]
        runs = [run for cell in alike for run in cell["precisions"]]
        bf16, fp32 = ([r["steps_tokens_per_s"] for r in runs if r["asked"] == kind] for kind in ("bf16", "fp32"))
        ratio, low, high = bootstrap_ratio(bf16, fp32, paired=True)
        took = sorted({run["precision"] for run in runs if run["asked"] == "auto"})
        rows.append([
            threads, len(bf16), f"{median(bf16):.0f}", f"{median(fp32):.0f}", f"{ratio:.2f}x ({low:.2f} to {high:.2f})",
            ", ".join(took), cpu_of(machine),
        ])  # fmt: skip
    heads = ["threads", "pairs", "tokens/s of steps, bf16", "fp32", "fp32 against bf16", "auto takes", "machine"]
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
        # One side may keep rows back to judge by, and so take fewer steps.
        apart = max(abs(x - y) for a, b in pairs for x, y in zip(a["losses"], b["losses"], strict=False))
        rows.append([
            key[1], len(pairs), *(f"{median(side):.0f}" for side in speeds),
            f"{ratio:.2f}x ({low:.2f} to {high:.2f})" if len(pairs) > 1 else f"{ratio:.2f}x",
            *(f"{median(run['command_s'] for run in side):.0f} s" for side in (base, now)),
            *(f"{median(run['peak_mb'] for run in side) / 1000:.2f}" for side in (base, now)),
            f"{apart:.4f}" if alike else "other text", key[2][:7], cpu_of(key[0]),
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
        "precision": precision_table([cell for cell in cells if "precisions" in cell]),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = parser_of(__doc__)
    parser.add_argument("do", choices=["run", "busy", "precision", "table"])
    parser.add_argument("model", nargs="?", type=Path, help="a pruned directory")
    parser.add_argument("--base", type=Path, help="the checkout from before")
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
    if given.model is None or (given.do == "run" and given.base is None):
        parser.error("give MODEL, and --base BASE for run")
    mine = Side(ROOT, Path(sys.executable), given.threads)
    words = [str(given.model.resolve()), "--teacher", given.teacher, "--tokens", str(given.tokens),
             "--integers", "nearest", *(["--data", given.data] if given.data else [])]  # fmt: skip
    if given.do == "busy":
        return keep(given, {"runs": busy_runs(mine, words, given.pairs)})
    if given.do == "precision":
        return keep(given, {"precisions": precision_runs(mine, words, given.pairs)})
    python = given.base_python or given.base / ".venv" / "bin" / "python"
    sides = [Side(given.base.resolve(), python.absolute(), given.threads), mine]
    pairs = []
    with tempfile.TemporaryDirectory(prefix="saap-tuning-") as place:
        for number in range(given.pairs):
            pair: list[dict[str, Any]] = [{}, {}]
            for index in (0, 1) if number % 2 else (1, 0):
                pair[index] = sides[index].tuned(words, Path(place))
            pairs.append(pair)
            print([round(run["steps_tokens_per_s"], 1) for run in pair], flush=True)
    keep(given, {"pairs": pairs})


def busy_runs(side: Side, words: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """Alone, beside one busy process and beside two, in turns."""
    runs = []
    with tempfile.TemporaryDirectory(prefix="saap-tuning-") as place:
        for number in range(rounds):
            for busy in (2, 1, 0) if number % 2 else (0, 1, 2):
                with beside(busy):
                    told = side.tuned(words, Path(place))
                runs.append({**told, "busy": busy})
                print(busy, round(told["steps_tokens_per_s"], 1), flush=True)
    return runs


def precision_runs(side: Side, words: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """In bfloat16, in float32 and as it is chosen, in turns."""
    runs = []
    with tempfile.TemporaryDirectory(prefix="saap-tuning-") as place:
        for number in range(rounds):
            for asked in ("auto", "fp32", "bf16") if number % 2 else ("bf16", "fp32", "auto"):
                told = side.tuned([*words, "--precision", asked], Path(place))
                runs.append({**told, "asked": asked})
                print(asked, told["precision"], round(told["steps_tokens_per_s"], 1), flush=True)
    return runs


def keep(given: argparse.Namespace, measured: dict[str, Any]) -> None:
    """Write a cell."""
    asked = {"threads": given.threads, "tokens": given.tokens, "base": given.base and commit_of(given.base)}
    cell = {**provenance(), **asked, **measured}
    (FOLDER / "cells").mkdir(exist_ok=True)
    name = f"{time.strftime('%Y%m%d-%H%M%S')}.json"
    (FOLDER / "cells" / name).write_text(json.dumps(cell) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
