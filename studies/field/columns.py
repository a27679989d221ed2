"""Columns of the field's tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from bench.report.quality import metric_of
from studies.common import METHODS, Cell
from studies.field.cells import NAMES, PROTOCOLS, Answers, answers_of, gain, tasks_of

Seeds = dict[str, Cell]
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
    """Perplexities, tasks and MB; means of the cells."""
    rows = []
    for cell in cells:
        last = [cell["quality"][protocol]["rows"][-1] for protocol in PROTOCOLS]
        tasks = {task["task"]: 100 * task[metric_of(task)] for task in tasks_of(cell)}
        quality = [row["perplexity"] for row in last] + [tasks.get(task, math.nan) for task in TASKS]
        rows.append([*quality, last[0]["bytes"] / 1e6])
    return [statistics.fmean(column) for column in zip(*rows, strict=True)]


def answered(ours: Seeds, theirs: Seeds) -> tuple[list[Answers], list[Answers]] | None:
    """Both rows' answers to the tasks, at the seeds that have both; None: at none."""
    both = [seed for seed in theirs if seed in ours and tasks_of(ours[seed]) and tasks_of(theirs[seed])]
    return ([answers_of(ours[seed]) for seed in both], [answers_of(theirs[seed]) for seed in both]) if both else None


def gain_over(ours: Seeds, theirs: Seeds) -> str:
    """SAAP's gain in the tasks with its interval; empty where there is none."""
    pairs = None if ours is theirs else answered(ours, theirs)
    return shown_gain(*pairs) if pairs else ""


def shown_gain(ours: list[Answers], theirs: list[Answers]) -> str:
    """A gain and its 95 % interval: ``+1.72 (+0.56 to +2.89)``."""
    return "{:+.2f} ({:+.2f} to {:+.2f})".format(*gain(ours, theirs))
