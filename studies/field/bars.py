"""The bars of the field's table: what SAAP and the baselines lose of the tasks, and whether the difference is one.

    python -m studies.field.bars                                     # SmolLM2, tuned, 20 %
    python -m studies.field.bars --ratio 0.5 --how untuned
    python -m studies.field.bars --how tuned-3e-3                    # as study.py was asked

Reads the cells of study.py. A gain is SAAP's mean over the tasks less the baseline's, in points, over the seeds
that both have; its interval is of a bootstrap over examples, paired, and over seeds. What is lost is against the dense
int4 bundle; where studies.tasks was run, against the dense model in float; and where study.py made it, against
the dense int4 bundle tuned alike.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.compare_quality import metric_of
from studies.field.study import METHODS, cells_of

ROOT = Path(__file__).resolve().parents[2]
RESAMPLES, SEED = 9999, 0
Answers = dict[str, NDArray[np.float64]]  # task -> right (1) or not (0) by the metric that is quoted, [examples]


def answers_of(path: Path) -> Answers:
    """Right or wrong, in the order of the examples."""
    tasks: list[dict[str, Any]] = json.loads(path.read_text())["quality"]["tasks"]["tasks"]
    return {task["task"]: np.array([float(digit) for digit in task["right"][metric_of(task)]]) for task in tasks}


def check_alike(paths: list[Path]) -> None:
    """Means over other tasks, or over other examples, do not compare."""
    asked = {}
    for path in paths:
        tasks = json.loads(path.read_text())["quality"].get("tasks", {}).get("tasks", [])
        asked[path] = {task["task"]: (task["sha256"], len(task["right"][metric_of(task)])) for task in tasks}
    for path, found in asked.items():
        if found != asked[paths[0]] or not found:
            raise SystemExit(f"{path.name} and {paths[0].name} are not of the same tasks and examples: make them again")


def points(answers: Answers) -> float:
    """Mean over the tasks, in points."""
    return 100 * float(np.mean([right.mean() for right in answers.values()]))


def gain(ours: list[Answers], theirs: list[Answers]) -> tuple[float, float, float]:
    """Mean gain in points and its 95 % interval, seeds and examples drawn anew.

    Drawn from only three seeds it is somewhat too narrow: in a simulation it held the truth in 87 to 93 %.

    Args:
        ours, theirs: of the same seeds, on the same examples.
    """
    random = np.random.default_rng(SEED)
    seeds = random.multinomial(len(ours), np.full(len(ours), 1 / len(ours)), RESAMPLES) / len(ours)
    drawn, means = np.zeros(RESAMPLES), []
    for task in ours[0]:
        differences = np.array([a[task] - b[task] for a, b in zip(ours, theirs, strict=True)])  # [seeds, examples]
        means.append(differences.mean())
        count = differences.shape[1]
        for at in range(0, RESAMPLES, 1000):
            picked = random.multinomial(count, np.full(count, 1 / count), len(seeds[at : at + 1000])) / count
            drawn[at : at + 1000] += ((picked @ differences.T) * seeds[at : at + 1000]).sum(1)
    low, high = 100 * np.quantile(drawn / len(means), [0.025, 0.975])
    return 100 * float(np.mean(means)), float(low), float(high)


def float_points(tasks: Answers) -> float | None:
    """SmolLM2 in float, where studies.tasks, which knows no other model, has answered all of the tasks."""
    found = []
    for task in tasks:
        path = ROOT / "studies" / "tasks" / "cells" / f"{task}-torch.json"
        if not path.is_file():
            return None
        cell = json.loads(path.read_text())
        found.append(cell[metric_of(cell)])
    return 100 * float(np.mean(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--ratio", default="0.2")
    parser.add_argument("--how", default="tuned", help="as in the names of cells; default: %(default)s")
    given = parser.parse_args()
    folder = cells_of(given.model)
    rows: dict[str, dict[str, Answers]] = {}
    for method in METHODS:
        paths = sorted(folder.glob(f"{method}-{given.ratio}-{given.how}-seed*.json"))
        if paths:
            rows[method] = {path.stem.rsplit("-", 1)[1]: answers_of(path) for path in paths}
    names = [f"{method}-{given.ratio}-{given.how}-{seed}" for method, seeds in rows.items() for seed in seeds]
    check_alike([folder / "dense.json", *(folder / f"{name}.json" for name in names)])
    tops = tops_of(given.model, given.how)
    print("dense:", ", ".join(f"{top:.2f} as {name}" for name, top in tops.items()), "(points)")
    if "saap" not in rows:
        raise SystemExit(f"no cell of saap at {given.ratio}, {given.how}: run studies.field.study")
    heads = [
        "method",
        "seeds",
        "points",
        *(f"lost, {name}" for name in tops),
        "SAAP's loss over it",
        "SAAP's gain (95 %)",
    ]
    print("|", " | ".join(heads), "|")
    print("|---" * len(heads), end="|\n")
    for method, cells in rows.items():
        both = [seed for seed in cells if seed in rows["saap"]]
        if not both:
            continue
        reached = float(np.mean([points(cells[seed]) for seed in both]))
        ours = float(np.mean([points(rows["saap"][seed]) for seed in both]))
        columns = [method, str(len(both)), f"{reached:.2f}", *(f"{top - reached:.2f}" for top in tops.values())]
        if method == "saap":
            columns += ["", ""]
        else:
            shares = [(top - ours) / (top - reached) for top in tops.values()]
            mean, low, high = gain([rows["saap"][seed] for seed in both], [cells[seed] for seed in both])
            columns += [" / ".join(f"{share:.2f}x" for share in shares), f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"]
        print("|", " | ".join(columns), "|")


def tops_of(model: str, how: str) -> dict[str, float]:
    """What a loss is counted from, in points: the dense model as int4, in float and as int4 tuned like the rows."""
    dense = answers_of(cells_of(model) / "dense.json")
    tops = {"int4": points(dense)}
    floating = float_points(dense) if model == "smollm2-135m" else None
    if floating is not None:
        tops["float"] = floating
    tuned = cells_of(model) / f"dense-{re.sub(r'-[0-9]+sequences', '', how)}-seed0.json"  # which nothing calibrates
    if tuned.is_file():
        tops["int4 tuned alike"] = points(answers_of(tuned))
    return tops


if __name__ == "__main__":
    main()
