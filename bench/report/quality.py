"""Quality in a report: perplexities with their protocol, zero-shot tasks, and quality against speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING

from bench.judge.wording import UNKNOWN, as_dict, as_float, as_list, number, percent, plain
from bench.measure.result import INVALID, Result
from bench.report.headline import Entry, model_of
from bench.report.plots import GRID, INK, MUTED, Figure, drawing, label, series_colour
from bench.report.tables import Table

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes

Row = dict[str, object]  # of a document of ``saap eval``, or of an older one: any key may be missing


@dataclass
class Section:
    """Documents of one protocol, with tasks of the same examples."""

    protocol: Row
    rows: list[Row] = field(default_factory=list)
    tasks: list[Row] = field(default_factory=list)

    @property
    def measured(self) -> bool:
        return any(as_float(row.get("perplexity")) or as_float(row.get("kl")) for row in self.rows)

    @property
    def task_table(self) -> Table | None:
        return task_table(self.tasks)


def sections_of(
    results: Sequence[Result], run: Mapping[str, object], documents: Sequence[Mapping[str, object]]
) -> list[Section]:
    """Protocol, rows and tasks; documents of one protocol are shown together, others never in one table.

    Nor are tasks on other examples. What two documents call alike and found to be different is numbered.
    """
    sections: list[Section] = []
    for source in map(as_dict, [run.get("quality"), *(result.quality for result in results), *documents]):
        protocol = as_dict(source.get("protocol"))
        rows, tasks = ([as_dict(row) for row in as_list(source.get(key))] for key in ("rows", "tasks"))
        if not rows:
            continue
        same = next((s for s in sections if s.protocol == protocol and _same_examples(s.tasks, tasks)), None)
        if same is None:
            sections.append(same := Section(protocol))
        _join(same, rows, tasks)
    return sections


def _same_examples(some: Sequence[Row], others: Sequence[Row]) -> bool:
    """Whether tasks that both hold are of the same file and the same examples of it."""
    examples = {plain(row.get("task")): _examples(row) for row in some}
    return all(examples.get(plain(row.get("task")), _examples(row)) == _examples(row) for row in others)


def _examples(row: Row) -> tuple[str, list[str]]:
    return plain(row.get("sha256")), [plain(as_dict(each).get("index")) for each in as_list(row.get("examples"))]


def _join(section: Section, rows: Sequence[Row], tasks: Sequence[Row]) -> None:
    """Add a document's rows to a section; what is there already is not shown twice."""
    known = {plain(row.get("name")): row for row in section.rows}
    scores = {(plain(row.get("model")), plain(row.get("task"))): row for row in section.tasks}
    renamed: dict[str, str] = {}
    for row in rows:
        name = plain(row.get("name"))
        mine = [task for task in tasks if plain(task.get("model")) == name]
        again = [scores.get((name, plain(task.get("task"))), task) == task for task in mine]
        if name in known and not (known[name] == row and all(again)):
            renamed[name] = next(new for n in count(2) if (new := f"{name} #{n}") not in known)
        if renamed.get(name, name) not in known:
            section.rows.append({**row, "name": renamed.get(name, row.get("name"))})
    for task in tasks:
        name = plain(task.get("model"))
        if (renamed.get(name, name), plain(task.get("task"))) not in scores:
            section.tasks.append({**task, "model": renamed.get(name, task.get("model"))})


def task_table(tasks: Sequence[Row]) -> Table | None:
    """Header and rows of accuracies, acc_norm where a task has it, with standard errors and their mean."""
    if not tasks:
        return None
    names = list(dict.fromkeys(plain(row.get("task")) for row in tasks))
    models = list(dict.fromkeys(plain(row.get("model")) for row in tasks))
    by_name = {(plain(row.get("model")), plain(row.get("task"))): row for row in tasks}
    rows = []
    for model in models:
        scores = [_score(by_name.get((model, name), {})) for name in names]
        known = [value for value, _ in scores if value is not None]
        mean = sum(known) / len(known) if len(known) == len(names) else None
        rows.append([model, *map(_score_text, scores), UNKNOWN if mean is None else percent(mean)])
    counts = {
        name: max(len(as_list(row.get("examples"))) for row in tasks if plain(row.get("task")) == name)
        for name in names
    }
    return Table(["model", *(f"{name} ({counts[name]})" for name in names), "mean"], rows)


def tradeoffs(entries: Sequence[Entry], sections: Sequence[Section]) -> list[Figure]:
    """Quality against speed: a plot for each protocol under which two timed models or more were evaluated."""
    plots = []
    for section in sections:
        quality, what, less = _quality_by_name(section)
        points, axis, reason = _timed(entries, quality), "ms per generated token", ""
        if len({point.name for point in points}) < 2:
            points, axis, reason = _by_turns(entries, quality)
        if len({point.name for point in points}) < 2:
            continue
        best = ", ".join(sorted({point.name for point in pareto_front(points, less)}))
        values = "; ".join(f"{p.name} {number(p.price, 2)} and {number(p.quality, 3)}" for p in points)
        text = (
            f"{_where(section, sections)}{reason}{'Lower' if less else 'Higher'} is better, further left is faster; "
            "filled: no other model here is better at both."
        )
        words = f"{what} against {axis}: {values}; best trade-offs: {best}"
        plots.append(Figure("Quality against speed", text, words, pareto_plot(points, axis, what, less)))
    return plots


def _where(section: Section, sections: Sequence[Section]) -> str:
    """Name the text, where there are several protocols."""
    protocol = section.protocol
    if len(sections) == 1 or not protocol:
        return ""
    return f"{plain(protocol.get('text'))}, chunks of {plain(protocol.get('chunk'))}. "


def _timed(entries: Sequence[Entry], quality: Mapping[str, float]) -> list[Point]:
    """Milliseconds per token of the valid measurements whose models were evaluated."""
    points = []
    for entry in entries:
        rate, value = as_float(entry.row.get("decode_ts")), quality.get(model_of(entry, list(quality)) or "")
        if rate and value is not None and entry.measurement.status != INVALID:
            points.append(Point(entry.name, 1e3 / rate, value))
    return points


def _by_turns(entries: Sequence[Entry], quality: Mapping[str, float]) -> tuple[list[Point], str, str]:
    """Speeds by turns, where no speed by itself is to be believed; what the axis says, and why it is this one."""
    points: dict[str, Point] = {}
    first = ""
    for entry in entries:
        base = next(
            e for e in entries if e.result is entry.result and e.measurement.key[1:] == entry.measurement.key[1:]
        )
        turns = entry.result.ratio(base.measurement, entry.measurement, "decode")  # None of the base itself
        for each, price in ((base, 1.0), (entry, turns.ratio)) if turns else ():
            measured = quality.get(model_of(each, list(quality)) or "")
            if measured is not None:
                points[each.name] = Point(each.name, price, measured)
                first = base.measurement.name
    reason = "The clock moved too much to quote times; ratios of models that took turns hold. "
    return list(points.values()), f"time per generated token, {first} = 1", reason


def _quality_by_name(section: Section) -> tuple[dict[str, float], str, bool]:
    """Quality of each model, what it is, and whether less is better: perplexity, or the mean of the tasks."""
    perplexities = {
        plain(row.get("name")): value for row in section.rows if (value := as_float(row.get("perplexity"))) is not None
    }
    if perplexities:
        return perplexities, "perplexity", True
    table: dict[str, list[float | None]] = {}
    for row in section.tasks:
        table.setdefault(plain(row.get("model")), []).append(_score(row)[0])
    means = {
        name: 100 * sum(v for v in values if v is not None) / len(values)
        for name, values in table.items()
        if None not in values
    }
    return means, "mean accuracy, %", False


def metric_of(task: Row) -> str:
    """Name the accuracy to quote: acc_norm where the task has it (BoolQ and WinoGrande have not), else acc."""
    return "acc" if task.get("acc_norm") is None else "acc_norm"


def _score(row: Row) -> tuple[float | None, float | None]:
    metric = metric_of(row)
    return as_float(row.get(metric)), as_float(row.get(f"{metric}_stderr"))


def _score_text(score: tuple[float | None, float | None]) -> str:
    value, error = score
    if value is None:
        return UNKNOWN
    return percent(value) if error is None else f"{percent(value)} ± {number(100 * error, 1)}"


@dataclass(frozen=True)
class Point:
    """A model: its price (less is better) and its quality."""

    name: str
    price: float
    quality: float


def pareto_front(points: Sequence[Point], less: bool) -> list[Point]:
    """Return the points that no other equals or beats in both while beating in one, from the cheapest up.

    Args:
        points: any.
        less: whether less quality value is better, as for a perplexity.
    """
    sign = 1 if less else -1
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.price, sign * p.quality)):
        if not front or sign * point.quality < sign * front[-1].quality:
            front.append(point)
    return front


def pareto_plot(points: Sequence[Point], price: str, quality: str, less: bool) -> Markup:
    """Draw a dot per model with its name, filled on the front, and the front as steps."""
    front = pareto_front(points, less)

    def draw(axes: Axes) -> None:
        for index, point in enumerate(points):
            fill = series_colour(index) if point in front else "none"
            axes.scatter(
                [point.price], [point.quality], s=44, facecolors=fill, edgecolors=series_colour(index), zorder=3
            )
        steps = [*front, Point("", max(point.price for point in points), front[-1].quality)]
        axes.step(
            [p.price for p in steps], [p.quality for p in steps], where="post", color=MUTED, linewidth=1, zorder=2
        )
        axes.margins(x=0.12, y=0.22)
        _name(axes, points)
        axes.set_xlabel(price)
        axes.set_ylabel(quality)
        axes.grid(color=GRID, linewidth=0.8)

    return drawing(draw, 3.2, f"pareto {price}")


def _name(axes: Axes, points: Sequence[Point]) -> None:
    """Names beside the dots, on the side where there is room; neighbours go above and below in turn."""
    low, high = axes.get_xlim()
    order = sorted(points, key=lambda p: (p.quality, p.price))
    for turn, point in enumerate(order):
        right = point.price < (low + high) / 2
        axes.annotate(
            label(point.name, 24), (point.price, point.quality), xytext=(7 if right else -7, 6 if turn % 2 else -6),
            textcoords="offset points", ha="left" if right else "right", va="bottom" if turn % 2 else "top",
            color=INK, fontsize=9,
        )  # fmt: skip
