"""SAAP and five baselines as tuned int4 bundles: perplexity, zero-shot tasks and size.

    python -m studies.field.study run                               # all rows; many hours on two cores
    python -m studies.field.study run --methods saap,flap --ratios 0.2 --seeds 0 --max-examples 400
    python -m studies.field.study run --methods dense --seeds 0     # what tuning does to the dense model
    python -m studies.field.study table [--write]
    python -m studies.field.study plot studies/field/field.png

A cell is a row of commands that anyone can type (they are in its JSON): prune, tune, export, eval. Cells and steps
that are finished are not made again. Needs
SAAP_DATA for text and, for the tasks, files of the forms that docs/quality.md names in the same folder.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from studies.common import METHODS, ROOT, add_write_option, bar_table, markdown, parser_of, show_tables
from studies.field import equal
from studies.field.cells import cell_of, check_alike, rows_of, seeds_of, tasks_of
from studies.field.columns import TASKS, Seeds, gain_over, named, numbers_of, spread

HERE = Path(__file__).resolve().parent
MODEL, GEMMA = "smollm2-135m", "gemma3-270m"


def tables() -> dict[str, str]:
    """The tables of the README."""
    return {
        "equal": equal.table(MODEL),
        "equal-bars": bar_table(equal.bars(MODEL)),
        "tuned-20": quality_table(MODEL, "0.2"),
        "tuned-50": quality_table(MODEL, "0.5"),
        "gemma-equal": equal.table(GEMMA),
    }


def quality_table(model: str, ratio: str) -> str:
    """Quality and size of the dense bundle and of each row, the best perplexity first."""
    rows, dense = rows_of(model, ratio), {"0": cell_of(model, "dense")}
    check_alike([dense["0"], *(cell for cells in rows.values() for cell in cells.values() if tasks_of(cell))])
    lines = [(numbers_of(list(cells.values()))[0], row_of(named(method), cells, rows["saap"]))
             for method, cells in rows.items()]  # fmt: skip
    top = [row_of("dense", dense, dense), row_of("dense, tuned", seeds_of(model, "dense-tuned"), {})]
    heads = ["model", "seeds", "ppl 128", "ppl 2048", *TASKS.values(), "MB", "SAAP's gain in the tasks (95 %)"]
    return markdown(heads, [*top, *(line for _, line in sorted(lines))])


def row_of(name: str, cells: Seeds, ours: Seeds) -> list[str]:
    """Means over seeds, with single seeds of the perplexities in brackets, and SAAP's gain over the row."""
    columns = list(zip(*(numbers_of([cell]) for cell in cells.values()), strict=True))
    shown = [spread(c, d, d == 2) for c, d in zip(columns, (2, 2, 1, 1, 1), strict=True)]
    return [name, str(len(cells)), *shown, gain_over(ours, cells)]


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = parser_of(__doc__)
    parser.add_argument("what", choices=["run", "table", "plot"])
    parser.add_argument("file", type=Path, nargs="?", help="plot: a PNG or SVG file")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--ratios", default="0.2,0.5")
    parser.add_argument("--speedups", help="instead of ratios, over the dense model by --costs, tuned: 1.5,2")
    parser.add_argument("--costs", type=Path, help="of `saap devices costs`, for --speedups")
    parser.add_argument("--group-size", type=int, default=64, help="of baselines there: 64 where it is faster, else 32")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--max-examples", type=int, help="of each task; default: all")
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "field", help="a folder per model is made there")
    add_write_option(parser)
    args = parser.parse_args(arguments)
    if args.what == "table":
        return show_tables(HERE, tables(), args.write)
    if args.what == "plot":
        from studies.field.plot import draw_all

        return draw_all(args.file or HERE / "field.png")
    if "SAAP_DATA" not in os.environ:
        raise SystemExit("set SAAP_DATA to a folder with WikiText-2, training text and the tasks' files")
    from studies.field.rows import run

    args.work /= Path(args.model).name
    run(args)


if __name__ == "__main__":
    main()
