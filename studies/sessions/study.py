"""False alarms and power of ``saap devices test``: simulated over what differs between sessions, and on a device.

    python -m studies.sessions.study run                      # 4,000 tests a row, into cells/simulated.json
    python -m studies.sessions.study test BUNDLE --tests 40   # real ones, into out/sessions/cell.json
    python -m studies.sessions.study table --write

A session has an effect of its own (normal, the row's deviation) and ten repetitions with 2 % noise, of which it gives
the median. A test goes as the product does: one session of now, up to three while it is not clear. Real tests are
commands in processes of their own; where there is no baseline, five sessions are recorded first. Their sessions are
judged again with a slowdown planted into every time.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from bench.judge.baselines import read_baselines
from bench.judge.regression import MOST_FRESH, SESSIONS
from bench.judge.verdict import BETTER, CANNOT_TELL, SAME, WORSE, Verdict, judge_sessions
from bench.measure.result import Result, read_result
from bench.measure.statistics import typical
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
    fresh = (value for _ in range(MOST_FRESH) for value in sessions(1, deviation, effect, draw))
    return verdict_of(sessions(recorded, deviation, 0.0, draw), fresh)


def verdict_of(old: Sequence[float], fresh: Iterator[float]) -> tuple[str, float, int]:
    """What a test says that measures session after session, what it could have seen, and how many it took."""
    new: list[float] = []
    for value in fresh:
        new.append(value)
        said = judge_sessions(Verdict(SAME), old, new, LIMIT)
        if said.verdict in (SAME, BETTER) or len(new) == MOST_FRESH:
            return said.verdict, said.visible or math.inf, len(new)
    raise ValueError(f"{len(new)} sessions are too few for a test")


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


def real(bundle: Path, folder: Path, tests: int) -> Iterator[Cell]:
    """Tests of an unchanged bundle on this device, each a command of its own."""
    baselines, history, junit = folder / "baselines", folder / "history", folder / "junit.xml"
    place = ["--baselines", str(baselines), "--name", "model"]
    if not baselines.is_dir():
        plan = ["-t", "1", "-p", "64", "-n", "64", "-r", "5"]
        _saap("devices", "baseline", str(bundle), *place, *plan, "--sessions", str(SESSIONS))
    for _ in range(tests):
        (baseline,) = read_baselines(baselines, "model")
        before = set(history.glob("*.json"))
        code = _saap("devices", "test", str(bundle), *place, "--history", str(history), "--junit", str(junit))
        fresh = [read_result(path) for path in sorted(set(history.glob("*.json")) - before)]
        yield {
            "at": time.strftime("%Y-%m-%d %H:%M:%S"),
            "exit": code,
            "said": {case.get("name"): _said(case) for case in ElementTree.parse(junit).iter("testcase")},
            "recorded": [_decode_s(result) for result in baseline.results],
            "sessions": [_decode_s(result) for result in fresh],
            "status": [result.measurements[0].status for result in fresh],
        }


def _saap(*words: str) -> int:
    saap = Path(sys.executable).with_name("saap")
    return subprocess.run([saap, *words], check=False, stdout=subprocess.DEVNULL).returncode


def _said(case: ElementTree.Element) -> str:
    for kind in ("failure", "error", "skipped"):
        if (found := case.find(kind)) is not None:
            return str(found.get("type"))
    return str(case.findtext("system-out")).split(": ", 1)[1].partition(",")[0]


def _decode_s(result: Result) -> float:
    return float(np.median([typical(sample.token_s) for sample in result.measurements[0].samples]))


def real_table(cells: Sequence[Cell]) -> str:
    """What real tests said of decode, and what they say with a slowdown planted into their sessions."""
    rows = []
    for cell in cells:
        tests = sorted(cell["tests"], key=lambda test: test["at"])
        fresh = [value for test in tests for value in test["sessions"]]
        said = [test["said"]["decode"] for test in tests]
        counts = [sum(len(test["sessions"]) for test in tests[:number]) for number in range(len(tests))]
        moved = float(np.std(np.log(fresh), ddof=1))
        rows.append([f"0%, as it went, {_hours(tests):.1f} h", len(tests), f"{moved:.1%}", *_shares(said)])
        for effect in EFFECTS:
            planted = [
                verdict_of(test["recorded"], iter(np.array(fresh[start : start + MOST_FRESH]) * (1 + effect)))[0]
                for test, start in zip(tests, counts, strict=True)
                if start + MOST_FRESH <= len(fresh)
            ]
            rows.append([f"{effect:.0%}, planted", len(planted), f"{moved:.1%}", *_shares(planted)])
    return markdown(["slowdown", "tests", "sessions differ by", "worse", "cannot tell", "same"], rows)


def _hours(tests: Sequence[Cell]) -> float:
    first, last = (time.mktime(time.strptime(test["at"], "%Y-%m-%d %H:%M:%S")) for test in (tests[0], tests[-1]))
    return (last - first) / 3600


def _shares(said: Sequence[str]) -> list[int]:
    return [said.count(WORSE), said.count(CANNOT_TELL), said.count(SAME) + said.count(BETTER)]


def tables() -> dict[str, str]:
    """The tables of README.md."""
    cells = read_cells(FOLDER / "cells")
    (simulated,) = (cell["rows"] for cell in cells if "rows" in cell)
    return {"sessions": table(simulated), "real": real_table([cell for cell in cells if "tests" in cell])}


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = parser_of(__doc__)
    parser.add_argument("do", choices=["run", "test", "table"])
    parser.add_argument("bundle", nargs="?", type=Path, help="test: the bundle")
    parser.add_argument("--tests", type=int, help="run: of each row (4,000); test: one after the other (1)")
    parser.add_argument("--keep", type=Path, default=Path("out/sessions"), help="test: baseline, history and cell")
    add_write_option(parser)
    given = parser.parse_args(arguments)
    if given.do == "run":
        cell = {**provenance(), "rows": simulate(given.tests or 4000)}
        (FOLDER / "cells" / "simulated.json").write_text(json.dumps(cell, indent=1) + "\n", encoding="utf-8")
    elif given.do == "test":
        given.keep.mkdir(parents=True, exist_ok=True)
        kept = given.keep / "cell.json"  # with more tests at each call
        cell = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {**provenance(), "tests": []}
        for test in real(given.bundle, given.keep, given.tests or 1):
            cell["tests"].append(test)
            kept.write_text(json.dumps(cell, indent=1) + "\n", encoding="utf-8")
            print(test["at"], test["exit"], test["said"]["decode"], test["sessions"], flush=True)
    else:
        show_tables(FOLDER, tables(), given.write)


if __name__ == "__main__":
    main()
