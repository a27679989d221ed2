"""The field at an equal planned speed: SAAP and its baselines, tuned alike."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from studies.common import Bar, Cell, markdown
from studies.field.cells import NAMES, cells_of, check_alike, gain, rows_of, tasks_of
from studies.field.columns import TASKS, Seeds, answered, gain_over, named, numbers_of, shown_gain, spread

LEVEL = -0.3  # points of the tasks: a gain whose 95 % lower bound is above is at least level


def rows_by_speed(model: str) -> dict[str, dict[str, Seeds]]:
    """The tuned cells by planned speed, method and seed; those that answered tasks answered the same."""
    speeds = sorted({path.stem.split("-")[1] for path in cells_of(model).glob("*x-tuned-seed*.json")})
    by_speed = {speed: rows_of(model, speed) for speed in speeds}
    for rows in by_speed.values():
        check_alike([cell for cells in rows.values() for cell in cells.values() if tasks_of(cell)])
    return by_speed


def table(model: str) -> str:
    """Rows and what SAAP gains in the tasks, at the seeds that have them; of a speed the best perplexity first."""
    lines = []
    for speed, rows in rows_by_speed(model).items():
        for method, cells in rows.items():
            columns = [speed, named(method), str(len(cells)), *_quality(list(cells.values()))]
            columns.append(gain_over(rows["saap"], cells))
            lines.append((speed, numbers_of(list(cells.values()))[0], columns))
    heads = ["planned", "method", "seeds", "ppl 128", "ppl 2048", *TASKS.values()]
    heads += ["answers: agreement, %", "repetition, %", "SAAP's gain in the tasks (95 %)"]
    return markdown(heads, [columns for *_, columns in sorted(lines)])


def bars(model: str) -> list[Bar]:
    """SAAP against each baseline at each speed."""
    return [
        bar
        for speed, rows in rows_by_speed(model).items()
        for method, cells in rows.items()
        if method not in ("saap", "published")
        for bar in _bars(speed, NAMES[method], rows["saap"], cells)
    ]


def _bars(speed: str, name: str, ours: Seeds, theirs: Seeds) -> Iterator[Bar]:
    seeds = [seed for seed in theirs if seed in ours]
    over = [_over(ours[seed], theirs[seed]) for seed in seeds]
    ratios = "; ".join(", ".join(f"{each:.2f}x" for each in windows) for windows in zip(*over, strict=True))
    yield Bar(f"{speed}: perplexity over {name}'s, 128; 2,048", "lower at each seed", ratios, max(map(max, over)) < 1)
    mine, its = (100 * statistics.fmean(_agreement(cells[seed]) for seed in seeds) for cells in (ours, theirs))
    yield Bar(f"{speed}: answers that agree, against {name}'s", "more", f"{mine:.1f} and {its:.1f} %", mine > its)
    if pairs := answered(ours, theirs):
        bar = f"95 % lower bound > {LEVEL:g}"
        yield Bar(f"{speed}: gain over {name} in the tasks", bar, shown_gain(*pairs), gain(*pairs)[1] > LEVEL)


def _quality(cells: Sequence[Cell]) -> list[str]:
    columns = list(zip(*(numbers_of([cell])[:4] for cell in cells), strict=True))
    shown = [spread(column, digits, True) for column, digits in zip(columns, (2, 2, 1, 1), strict=True)]
    answers = [cell["quality"]["answers"] for cell in cells]
    return shown + [spread([100 * each[key] for each in answers], 0, True) for key in ("agreement", "repetition")]


def _over(ours: Cell, theirs: Cell) -> list[float]:
    """SAAP's perplexities over the other's."""
    return [own / other for own, other in zip(numbers_of([ours])[:2], numbers_of([theirs])[:2], strict=True)]


def _agreement(cell: Cell) -> float:
    return float(cell["quality"]["answers"]["agreement"])
