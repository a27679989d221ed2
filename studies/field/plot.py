"""The field at an equal speed as a picture: quality of the tuned bundles over the speed that was planned.

Means over the seeds that have a cell, with the seeds' range, on the CPU of the tables of costs that the README names.
"""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean

from studies.common import METHODS, Cell
from studies.field.cells import answers_of, cell_of, check_alike, points, seeds_of, tasks_of

MODEL, SPEEDS, SHOWN = "smollm2-135m", (1.2, 1.5, 2.0), {"saap": "o", "shortgpt": "s"}
PANELS = {
    "perplexity, WikiText-2, windows of 128": "log",
    "perplexity, windows of 2,048": "log",
    "ARC-Easy and PIQA, %": "linear",
}


def quality_of(cell: Cell) -> tuple[float, float, float]:
    """A cell in the order of PANELS."""
    long, short = (float(cell["quality"][name]["rows"][-1]["perplexity"]) for name in ("ppl2048", "ppl128"))
    return short, long, points(answers_of(cell)) if tasks_of(cell) else math.nan


def dots(method: str) -> list[list[tuple[float, float, float]]]:
    """Mean, least and most of the seeds: by panel, then by speed."""
    points_of_speeds = []
    for speed in SPEEDS:
        cells = list(seeds_of(MODEL, f"{method}-{speed:g}x-tuned").values())
        check_alike([cell_of(MODEL, "dense"), *(cell for cell in cells if tasks_of(cell))])
        columns = [[v for v in column if not math.isnan(v)] for column in zip(*map(quality_of, cells), strict=True)]
        points_of_speeds.append([(fmean(column), min(column), max(column)) for column in columns])
    return [list(panel) for panel in zip(*points_of_speeds, strict=True)]


def draw_all(file: Path) -> None:
    """A PNG or SVG file."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(11, 4), layout="constrained")
    rows = {method: dots(method) for method in SHOWN}
    dense = quality_of(cell_of(MODEL, "dense-tuned-seed0"))
    for number, (panel, (label, scale)) in enumerate(zip(axes, PANELS.items(), strict=True)):
        for method, marker in SHOWN.items():
            mean, least, most = zip(*rows[method][number], strict=True)
            arms = [[m - low for m, low in zip(mean, least, strict=True)],
                    [high - m for m, high in zip(mean, most, strict=True)]]  # fmt: skip
            panel.errorbar(SPEEDS, mean, arms, label=METHODS[method], marker=marker, capsize=3)
        panel.plot(1, dense[number], marker="h", color="black", linestyle="", label="dense, tuned")
        panel.set(yscale=scale, xlabel="decode, times as fast as dense (planned)", title=label)
        if scale == "log":
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_formatter("{x:g}")
        panel.grid(visible=True, which="both", alpha=0.3)
    axes[0].legend()
    figure.savefig(file, dpi=130)
