"""What tables of the field show of its cells."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from bench.report.quality import metric_of
from studies.common import METHODS, Cell
from studies.field.cells import NAMES, PROTOCOLS, Answers, gain, tasks_of

TASKS = {"arc_easy": "ARC-Easy", "piqa": "PIQA"}


def named(method: str) -> str:
    """A row's name; ours stands out."""
    return f"**{METHODS[method]}**" if method == "saap" else NAMES[method]


def spread(values: Sequence[float], digits: int, several: bool) -> str:
    """The mean of those that were measured, and each; ``-`` where there are none."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return "-"
    if max(known) > 1000:
        return f"{statistics.fmean(known):,.0f}" if max(known) < 100_000 else f"{statistics.fmean(known):.1e}"
    mean = f"{statistics.fmean(known):.{digits}f}"
    if len(values) == 1 or not several:
        return mean
    return f"{mean} ({', '.join(f'{value:.{digits}f}' for value in known)})"


def numbers_of(cells: list[Cell]) -> list[float]:
    """Perplexities, tasks, million parameters, MB, decode over dense and peak MB; means of the cells."""
    found = []
    for cell in cells:
        rows = [cell["quality"][protocol]["rows"][-1] for protocol in PROTOCOLS]
        tasks = {task["task"]: 100 * task[metric_of(task)] for task in tasks_of(cell)}
        timed = cell["bench"] or {}
        faster = (timed.get("speedup") or [1.0 if cell["name"] == "dense" else math.nan])[0]
        peak = timed["peak_decode_bytes"] / 1e6 if timed else math.nan
        sizes = [rows[0]["parameters"] / 1e6, rows[0]["bytes"] / 1e6]
        quality = [row["perplexity"] for row in rows] + [tasks.get(task, math.nan) for task in TASKS]
        found.append([*quality, *sizes, faster, peak])
    return [statistics.fmean(column) for column in zip(*found, strict=True)]


def told_gain(ours: list[Answers], theirs: list[Answers]) -> str:
    """A gain and its 95 % interval: ``+1.72 (+0.56 to +2.89)``."""
    return "{:+.2f} ({:+.2f} to {:+.2f})".format(*gain(ours, theirs))
