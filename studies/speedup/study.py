"""Plans of every kind by one table of costs: their bundles against the dense one, by turns.

    saap devices costs smollm2-135m -t 1 -o cost.json
    python -m studies.speedup.study make --costs cost.json --work W    # prune and export; nothing is timed
    python -m studies.speedup.study time --work W                      # on an idle machine
    python -m studies.speedup.study table --write

Nothing makes up for what is gone, since weights do not change a speed. What is made or timed is not made again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from bench.measure.result import read_result
from saap.models.record import read_record
from studies.common import (
    Bar,
    Cell,
    add_write_option,
    bar_table,
    markdown,
    parser_of,
    provenance,
    read_cells,
    saap,
    show_tables,
)

HERE = Path(__file__).resolve().parent
CELLS = HERE / "cells"
MODEL, DENSE, BOUND = "smollm2-135m", "dense", 0.05
TURNS_S = 20
KINDS: dict[str, list[str]] = {
    "everything may go": [],
    "no block whole": ["--keep", "blocks"],
    "FFN channels only": ["--keep", "blocks,heads"],
    "heads and blocks only": ["--keep", "ffn"],
    "groups of 32": ["--group-size", "32"],
    "whole layers (ShortGPT)": ["--method", "shortgpt", "--group-size", "64"],
    "Wanda-sp": ["--method", "wanda_sp", "--keep", "heads", "--group-size", "64"],
}
SPEEDS = {
    "everything may go": (1.1, 1.2, 1.3, 1.5, 1.75, 2.0),
    "FFN channels only": (1.25, 1.4, 1.5, 1.6),
    "Wanda-sp": (1.25, 1.3, 1.4, 1.5),
}
USUAL = (1.25, 1.4, 1.6, 1.8)


def plans() -> Iterator[tuple[str, str, float]]:
    """Name, kind and the speed-up asked for."""
    for kind in KINDS:
        for speedup in SPEEDS.get(kind, USUAL):
            word = kind.split(" (", 1)[0].replace(" ", "-")
            yield f"{word}-{speedup:g}", kind, speedup


def tables() -> dict[str, str]:
    """The tables of the README."""
    cells = read_cells(CELLS)
    return {"plans": plans_table(cells), "bar": bar_table([bar(cells)])}


def plans_table(cells: list[Cell]) -> str:
    """What was planned and measured, by kind."""
    lines = []
    for kind in KINDS:
        for cell in sorted((cell for cell in cells if cell["kind"] == kind), key=lambda cell: float(cell["planned"])):
            ratio, low, high = cell["measured"]
            told = [f"{cell['planned']:.3f}", f"{ratio:.3f} ({low:.3f} to {high:.3f})", f"{100 * off(cell):+.1f} %"]
            lines.append([kind, f"{100 * cell['removed']:.0f} %", str(cell["gone"]), *told])
    return markdown(["what may go", "weights gone", "blocks gone", "planned", "measured (95 %)", "off"], lines)


def off(cell: Cell) -> float:
    """How much faster than planned."""
    return float(cell["measured"][0] / cell["planned"] - 1)


def bar(cells: list[Cell]) -> Bar:
    """All plans within 5 %."""
    worst = max(cells, key=lambda cell: abs(off(cell)))
    within = sum(abs(off(cell)) <= BOUND for cell in cells)
    found = f"{within} of {len(cells)}; worst {100 * off(worst):+.1f} % ({worst['kind']}, {worst['planned']:.2f}x)"
    return Bar("planned against measured speed-up", "within 5 %, 30 plans", found, within == len(cells) >= 30)


def make(costs: Path, work: Path) -> None:
    """The bundles of all plans, and the dense one."""
    for name, kind, speedup in [(DENSE, "", 1.0), *plans()]:
        slim, bundle = work / f"{name}-model", work / name
        if not slim.is_dir() and name != DENSE:
            asked = [*KINDS[kind], "--speedup", speedup, "--costs", costs, "--compensate", "none"]
            saap("prune", MODEL, "-o", slim, *asked)
        if not bundle.is_dir():
            saap("export", MODEL if name == DENSE else slim, "-o", bundle, "--integers", "nearest", "--parity", "none")


def faster(work: Path, name: str) -> list[float]:
    """How many times as fast as the dense bundle a bundle decodes, and the ends of its 95 % interval."""
    result = work / f"{name}.json"
    told = ["-t", 1, "-p", 128, "-n", 128, "-r", 2, "--ratio-time", TURNS_S, "--no-cold", "--json", result]
    saap("bench", work / DENSE, work / name, *told)
    document = read_result(result)
    dense, slim = document.measurements
    ratio = document.ratio(slim, dense, "decode")
    if ratio is None:
        raise SystemExit(f"{name}: turns gave no ratio, the machine is busy: run this again")
    return [ratio.ratio, ratio.low, ratio.high]


def measure(work: Path) -> None:
    """Each bundle against the dense one, a cell each."""
    CELLS.mkdir(exist_ok=True)
    for name, kind, _ in plans():
        cell = CELLS / f"{name}.json"
        if cell.is_file():
            continue
        plan = read_record(work / f"{name}-model")["plan"]
        found = {
            "kind": kind, "planned": plan["planned"]["speedup"], "removed": plan["planned"]["ratio"],
            "gone": sum((not layer["query_heads"]) + (not layer["ffn"]) for layer in plan["layers"]),
            "measured": faster(work, name),
        }  # fmt: skip
        cell.write_text(json.dumps({**found, **provenance()}, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """See the module's docstring."""
    parser = parser_of(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    made = commands.add_parser("make")
    made.add_argument("--costs", type=Path, required=True)
    timed = commands.add_parser("time")
    for each in (made, timed):
        each.add_argument("--work", type=Path, required=True)
    add_write_option(commands.add_parser("table"))
    args = parser.parse_args()
    if args.command == "table":
        show_tables(HERE, tables(), args.write)
    elif args.command == "make":
        make(args.costs.resolve(), args.work.resolve())
    else:
        measure(args.work.resolve())


if __name__ == "__main__":
    main()
