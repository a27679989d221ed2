"""The cells of the field: where they are, what was answered right, and what a method gains over another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.report.quality import metric_of
from studies.common import METHODS, Cell

CELLS = Path(__file__).resolve().parent / "cells"
# Chunk and windows of a perplexity; about 20,000 predictions each.
PROTOCOLS = {"ppl128": (128, 160), "ppl2048": (2048, 10)}
RESAMPLES, SEED = 9999, 0
NAMES = {**METHODS, "published": "SAAP's scores as published (vector and element, what fluctuates goes first)"}
Answers = dict[str, NDArray[np.int64]]  # task -> right (1) or not (0) by the metric that is quoted, [examples]


def cells_of(model: str) -> Path:
    """A folder per model."""
    return CELLS / Path(model).name


def cell_of(model: str, name: str) -> Cell:
    """One cell."""
    return dict(json.loads((cells_of(model) / f"{name}.json").read_text()))


def seeds_of(model: str, row: str) -> dict[str, Cell]:
    """The cells of a row, such as ``saap-0.2-tuned``, by their seed."""
    paths = sorted(cells_of(model).glob(f"{row}-seed*.json"))
    return {path.stem.rsplit("-seed", 1)[1]: json.loads(path.read_text()) for path in paths}


def rows_of(model: str, target: str) -> dict[str, dict[str, Cell]]:
    """The tuned cells of a target, ``0.2`` or ``1.5x``, by method and seed."""
    names = sorted(cells_of(model).glob(f"*-{target}-tuned-seed*.json"))
    methods = dict.fromkeys(path.stem.split(f"-{target}-", 1)[0] for path in names)
    return {method: seeds_of(model, f"{method}-{target}-tuned") for method in methods}


def tasks_of(cell: Cell) -> list[dict[str, Any]]:
    """A cell's results of each task."""
    return list(cell["quality"].get("tasks", {}).get("tasks", []))


def answers_of(cell: Cell) -> Answers:
    """Whether each example was answered right, in their order."""
    return {task["task"]: np.array([int(digit) for digit in task["right"][metric_of(task)]]) for task in tasks_of(cell)}


def check_alike(cells: list[Cell]) -> None:
    """Refuse cells of other tasks or other examples, whose means do not compare."""
    questions = [
        {task["task"]: (task["sha256"], len(task["right"][metric_of(task)])) for task in tasks_of(cell)}
        for cell in cells
    ]
    for cell, each in zip(cells, questions, strict=True):
        if each != questions[0] or not each:
            raise SystemExit(
                f"{cell['name']} and {cells[0]['name']} are not of the same tasks and examples: make them again"
            )


def points(answers: Answers) -> float:
    """Mean over the tasks, in points."""
    return 100 * float(np.mean([right.mean() for right in answers.values()]))


def gain(ours: list[Answers], theirs: list[Answers]) -> tuple[float, float, float]:
    """Mean gain in points and its 95 % interval, seeds and examples drawn anew.

    Examples that differ alike at every seed are drawn together. With only three seeds the interval is somewhat too
    narrow.

    Args:
        ours, theirs: of the same seeds, on the same examples.
    """
    random = np.random.default_rng(SEED)
    seeds = random.multinomial(len(ours), np.full(len(ours), 1 / len(ours)), RESAMPLES) / len(ours)
    drawn, means = np.zeros(RESAMPLES), []
    for task in ours[0]:
        differences = np.array([a[task] - b[task] for a, b in zip(ours, theirs, strict=True)])  # [seeds, examples]
        means.append(differences.mean())
        patterns, counts = np.unique(differences, axis=1, return_counts=True)
        picked = random.multinomial(counts.sum(), counts / counts.sum(), RESAMPLES) / counts.sum()
        drawn += ((picked @ patterns.T) * seeds).sum(1)
    low, high = 100 * np.quantile(drawn / len(means), [0.025, 0.975])
    return 100 * float(np.mean(means)), float(low), float(high)
