"""SAAP and nine baselines as int4 bundles, tuned alike: perplexity, zero-shot tasks, size and speed.

    python -m studies.field.study run                               # all rows; many hours on two cores
    python -m studies.field.study run --methods saap,flap --ratios 0.2 --seeds 0 --max-examples 400
    python -m studies.field.study run --model gemma3-270m --methods saap,flap --ratios 0.2 --seeds 0 --tuned no
    python -m studies.field.study run --methods dense --seeds 0     # what tuning does to the dense model
    python -m studies.field.study run --skip bench                  # quality, beside other work; run again to time
    python -m studies.field.study table [--write]
    python -m studies.field.study plot studies/field/field.png

A cell is a row of commands that anyone can type (they are in its JSON): prune, tune, export, eval, bench against the
dense bundle. Cells and steps that are finished are not made again; tuned and not, a cell is of one pruned model. Needs
SAAP_DATA for text and, for the tasks, files of the forms that docs/quality.md names in the same folder.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from pathlib import Path

from bench.measure.result import read_result
from studies.common import (
    METHODS,
    ROOT,
    Bar,
    Cell,
    add_write_option,
    bar_table,
    decode_over,
    markdown,
    parser_of,
    show_tables,
)
from studies.field import equal
from studies.field.cells import (
    CELLS,
    Answers,
    answers_of,
    cell_of,
    check_alike,
    gain,
    points,
    rows_of,
    seeds_of,
    tops_of,
)
from studies.field.columns import TASKS, named, numbers_of, spread, told_gain

HERE = Path(__file__).resolve().parent
MODEL, GEMMA = "smollm2-135m", "gemma3-270m"
SHARE, CLOSEST, AHEAD = 0.75, 2.5, 2.0  # bars: of a baseline's loss; points behind dense; points ahead


def tables() -> dict[str, str]:
    """The tables of the README."""
    found = {}
    for ratio, percent in (("0.2", "20"), ("0.5", "50")):
        for how in ("tuned", "untuned"):
            found[f"{how}-{percent}"] = quality_table(MODEL, ratio, how)
        found[f"gains-{percent}"] = gains_table(MODEL, ratio)
        found[f"speed-{percent}"] = speed_table(percent)
    found |= {"bars": bar_table(all_bars()), "equal": equal.table(MODEL), "equal-bars": bar_table(equal.bars(MODEL))}
    found |= {"gemma": quality_table(GEMMA, "0.2", "untuned"), "gemma-gains": gains_table(GEMMA, "0.2")}
    return {**found, "gemma-equal": equal.table(GEMMA), "gemma-equal-bars": bar_table(equal.bars(GEMMA))}


def quality_table(model: str, ratio: str, how: str) -> str:
    """Quality, size and speed of the dense bundle and of each row, the best perplexity first."""
    rows = {named(method): list(cells.values()) for method, cells in rows_of(model, ratio, how).items()}
    lines = [(numbers_of(cells)[0], row_of(name, cells)) for name, cells in rows.items()]
    dense = [row_of("dense", [cell_of(model, "dense")])]
    if how == "tuned" and (alike := seeds_of(model, "dense-tuned")):
        dense.append(row_of("dense, tuned", list(alike.values())))
    heads = ["model", "seeds", "ppl 128", "ppl 2048", *TASKS.values(), "M params", "MB", "decode, x dense", "peak MB"]
    return markdown(heads, [*dense, *(line for _, line in sorted(lines))])


def row_of(name: str, cells: list[Cell]) -> list[str]:
    """Means over seeds; single seeds in brackets where they differ."""
    digits = [2, 2, 1, 1, 1, 1, 2, 0]
    columns = list(zip(*(list(numbers_of([cell])) for cell in cells), strict=True))
    several = (True, True, True, True, False, False, True, False)  # which columns show their seeds
    told = [spread(c, d, s) for c, d, s in zip(columns, digits, several, strict=True)]
    return [name, str(len(cells)), *told]


def gains_table(model: str, ratio: str) -> str:
    """What each method loses of the tasks, and what SAAP gains over it, tuned and not; the best of each first."""
    dense, lines = cell_of(model, "dense"), []
    rows = {
        (method, how): cells for how in ("tuned", "untuned") for method, cells in rows_of(model, ratio, how).items()
    }
    check_alike([dense, *(cell for cells in rows.values() for cell in cells.values())])
    for (method, how), cells in rows.items():
        ours = rows.get(("saap", how), {})
        both = [seed for seed in cells if method == "saap" or seed in ours]
        if not both:
            continue
        top, (reached, share, told) = tops_of(model, how)["int4"], gained(model, how, ours, cells, both)
        words = [how, named(method), str(len(both)), f"{reached:.2f}", f"{top - reached:.2f}"]
        lines.append((how, -reached, [*words, *(("", "") if method == "saap" else (share, told))]))
    heads = ["", "method", "seeds", "points", "lost", "SAAP's loss over its", "SAAP's gain (95 %)"]
    return markdown(heads, [line for *_, line in sorted(lines)])


def gained(
    model: str, how: str, ours: dict[str, Cell], cells: dict[str, Cell], seeds: Sequence[str]
) -> tuple[float, str, str]:
    """Points of a row; SAAP's loss over its loss, against each dense model; SAAP's gain with its interval."""
    theirs, mine = [answers_of(cells[seed]) for seed in seeds], [answers_of(ours[seed]) for seed in seeds]
    reached, own = mean_points(theirs), mean_points(mine)
    shares = [f"{(top - own) / (top - reached):.2f}x" for top in tops_of(model, how).values()]
    return reached, " / ".join(shares), told_gain(mine, theirs)


def mean_points(answers: list[Answers]) -> float:
    """Mean over seeds."""
    return statistics.fmean(map(points, answers))


def all_bars() -> list[Bar]:
    """The bars at 20 %, tuned: against the baselines that have all three seeds, the best first."""
    rows = rows_of(MODEL, "0.2", "tuned")
    answers = {m: [answers_of(c) for c in cells.values()] for m, cells in rows.items() if len(cells) == 3}
    ours, top = answers.pop("saap"), tops_of(MODEL, "tuned")["int4"]
    lost, bars = top - mean_points(ours), []
    rivals = sorted(answers, key=lambda method: -mean_points(answers[method]))
    for method in rivals:
        theirs, (mean, low, high) = top - mean_points(answers[method]), gain(ours, answers[method])
        name = METHODS[method]
        told = f"{lost / theirs:.2f}x: {lost:.2f} over {theirs:.2f} points"
        bars.append(Bar(f"SAAP's loss of the tasks over {name}'s", f"<= {SHARE}x", told, lost <= SHARE * theirs))
        told = f"{mean:+.2f} points ({low:+.2f} to {high:+.2f})"
        bars.append(Bar(f"SAAP's gain over {name}", "95 % lower bound > 0", told, low > 0))
    ahead, *_ = gain(ours, answers[rivals[0]])
    bars.append(Bar("stretch: SAAP's distance from dense int4", f"<= {CLOSEST} points", f"{lost:.2f}", lost <= CLOSEST))
    told = f"{ahead:+.2f}"
    return [*bars, Bar("stretch: its gain over the best baseline", f">= {AHEAD:g} points", told, ahead >= AHEAD)]


def speed_table(percent: str) -> str:
    """Decode of the baselines over the dense bundle, in one interleaved run on each machine."""
    ratio, lines = f"0.{percent[0]}", []
    machines = {"Zen 4": "", "Zen 3": "-zen3"}
    results = [read_result(CELLS / "speed" / f"{MODEL}-{percent}{suffix}.json") for suffix in machines.values()]
    for method in METHODS.keys() - {"saap"}:
        lines.append([named(method), *(decode_over(result, "dense", f"{method}-{ratio}") for result in results)])
    return markdown(["not tuned", *(f"{machine}: over dense" for machine in machines)], sorted(lines))


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
    parser.add_argument("--tuned", default="both", choices=["both", "yes", "no"])
    parser.add_argument("--max-examples", type=int, help="of each task; default: all")
    parser.add_argument("--skip", choices=["bench"], help="what a later run does: nothing else may run beside a bench")
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "field", help="a folder per model is made there")
    add_write_option(parser)
    given = parser.parse_args(arguments)
    if given.what == "table":
        return show_tables(HERE, tables(), given.write)
    if given.what == "plot":
        from studies.field.plot import draw_all

        return draw_all(given.file or HERE / "field.png")
    if "SAAP_DATA" not in os.environ:
        raise SystemExit("set SAAP_DATA to a folder with WikiText-2, training text and the tasks' files")
    from studies.field.rows import run

    given.work /= Path(given.model).name
    run(given)


if __name__ == "__main__":
    main()
