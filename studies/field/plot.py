"""The field as a picture: quality of the tuned bundles over their speed, at both ratios.

Quality: the tuned cells of study.py, the mean over their seeds with the seeds' range. Speed: decode over the
dense bundle with its 95 % interval, of the one interleaved run per ratio in cells/speed (the README has
its command), whose bundles are not tuned: tuning changes no size. A method that has no valid speed there is left out,
and said; so are magnitude and random widths, which are far behind.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.judge.comparison import compare_within
from bench.measure.result import Result, read_result
from studies.common import METHODS, Cell
from studies.field.cells import CELLS, answers_of, cell_of, check_alike, points, seeds_of

MODEL, RATIOS = "smollm2-135m", ("0.2", "0.5")
PANELS = {
    "perplexity, WikiText-2 test,\nwindows of 128 (less is better)": "log",
    "mean of ARC-Easy and PIQA, %\n(more is better)": "linear",
}
SHOWN = [method for method in METHODS if method not in ("magnitude", "random")]  # so far behind that others would touch
MARKERS = dict(zip(SHOWN, "o^svPX<D", strict=True))
Interval = tuple[float, float, float]  # middle, low, high


def quality_of(cell: Cell) -> tuple[float, float]:
    """Perplexity in windows of 128 tokens and points of the tasks, of a cell."""
    return float(cell["quality"]["ppl128"]["rows"][-1]["perplexity"]), points(answers_of(cell))


def speed_of(result: Result, name: str) -> Interval | None:
    """Decode over the dense bundle; None where there is no measurement, or one that does not count."""
    statuses = {measurement.name: measurement.status for measurement in result.measurements}
    if "INVALID" in (statuses.get(name, "INVALID"), statuses["dense"]):
        return None
    (pair,) = compare_within(result, "dense", name).rows
    if pair.ratio is None or pair.low is None or pair.high is None:
        return None
    return 1 / pair.ratio, 1 / pair.high, 1 / pair.low


def dots(ratio: str) -> dict[str, tuple[Interval, list[Interval]]]:
    """For each method that has both: its speed, and its quality in the order of PANELS."""
    result = read_result(CELLS / "speed" / f"{MODEL}-{round(100 * float(ratio))}.json")
    found = {}
    for method in SHOWN:
        cells = list(seeds_of(MODEL, f"{method}-{ratio}-tuned").values())
        speed = speed_of(result, f"{method}-{ratio}") if cells else None
        if not cells or speed is None:
            print(f"{method} at {ratio}: left out, {'no valid speed' if cells else 'no tuned cell'}")
            continue
        check_alike([cell_of(MODEL, "dense"), *cells])
        columns = zip(*map(quality_of, cells), strict=True)
        found[method] = speed, [(sum(c) / len(c), min(c), max(c)) for c in columns]
    return found


def arms(interval: Interval) -> list[list[float]]:
    """Error bars as matplotlib wants them: [[below], [above]]."""
    middle, low, high = interval
    return [[middle - low], [high - middle]]


def draw(axes: Any, column: int) -> None:
    """A column of panels, one ratio."""
    ratio, dense = RATIOS[column], quality_of(cell_of(MODEL, "dense"))
    found = dots(ratio)
    for row, (label, scale) in enumerate(PANELS.items()):
        panel = axes[row, column]
        for method, (speed, quality) in found.items():
            first, colour = method == "saap", f"C{SHOWN.index(method)}"
            panel.errorbar(
                speed[0], quality[row][0], arms(quality[row]), arms(speed), label=METHODS[method],
                fmt=MARKERS[method], markersize=9 if first else 6, color=colour, elinewidth=0.6,
                zorder=3 if first else 2,
            )  # fmt: skip
        panel.plot(1, dense[row], marker="h", color="black", linestyle="", label="dense, not tuned")
        panel.set(yscale=scale, xlabel="decode, times as fast as dense" if row else "", ylabel=label)
        if scale == "log":
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_formatter("{x:g}" if panel.get_ylim()[1] < 10 * panel.get_ylim()[0] else "")
        panel.grid(visible=True, which="both", alpha=0.3)
    axes[0, column].set_title(f"{float(ratio):.0%} of the layers gone, tuned")


def draw_all(file: Path) -> None:
    """A PNG or SVG file."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(RATIOS), figsize=(9, 8), layout="constrained")
    for column in range(len(RATIOS)):
        draw(axes, column)
    named = {label: h for panel in axes[0] for h, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=5, fontsize="small")
    figure.savefig(file, dpi=130)
