"""Quality in a report: perplexities with their protocol, and zero-shot tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bench.judge.wording import as_dict, as_float, as_list, number, percent, plain
from bench.measure.result import Result
from bench.report.tables import Table

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

    Nor are tasks on other examples, or different results of one name.
    """
    sections: list[Section] = []
    for source in map(as_dict, [run.get("quality"), *(result.quality for result in results), *documents]):
        protocol = as_dict(source.get("protocol"))
        rows, tasks = ([as_dict(row) for row in as_list(source.get(key))] for key in ("rows", "tasks"))
        if not rows:
            continue
        same = next((s for s in sections if s.protocol == protocol and _agree(s, rows, tasks)), None)
        if same is None:
            sections.append(same := Section(protocol))
        same.rows += [row for row in rows if row not in same.rows]
        same.tasks += [task for task in tasks if task not in same.tasks]
    return sections


def _agree(section: Section, rows: Sequence[Row], tasks: Sequence[Row]) -> bool:
    """Whether the same names have the same results in both, and the same tasks the same examples."""
    known = {plain(row.get("name")): row for row in section.rows}
    scores = {(plain(row.get("model")), plain(row.get("task"))): row for row in section.tasks}
    examples = {plain(row.get("task")): _examples(row) for row in section.tasks}
    return (
        all(known.get(plain(row.get("name")), row) == row for row in rows)
        and all(scores.get((plain(task.get("model")), plain(task.get("task"))), task) == task for task in tasks)
        and all(examples.get(plain(task.get("task")), _examples(task)) == _examples(task) for task in tasks)
    )


def _examples(row: Row) -> tuple[str, list[str]]:
    return plain(row.get("sha256")), [plain(as_dict(each).get("index")) for each in as_list(row.get("examples"))]


def task_table(tasks: Sequence[Row]) -> Table | None:
    """Header and rows of accuracies, acc_norm where a task has it, with standard errors and their mean."""
    if not tasks:
        return None
    names = list(dict.fromkeys(plain(row.get("task")) for row in tasks))
    models = list(dict.fromkeys(plain(row.get("model")) for row in tasks))
    by_name = {(plain(row.get("model")), plain(row.get("task"))): row for row in tasks}
    rows = []
    for model in models:
        scores = [by_name.get((model, name), {}) for name in names]
        known = [value for row in scores if (value := as_float(row.get(metric_of(row)))) is not None]
        mean = sum(known) / len(known) if len(known) == len(names) else None
        rows.append([model, *map(_score_text, scores), percent(mean)])
    counts = {
        name: max(len(as_list(row.get("examples"))) for row in tasks if plain(row.get("task")) == name)
        for name in names
    }
    return Table(["model", *(f"{name} ({counts[name]})" for name in names), "mean"], rows)


def metric_of(task: Row) -> str:
    """Name the accuracy to quote: acc_norm where the task has it (BoolQ and WinoGrande have not), else acc."""
    return "acc" if task.get("acc_norm") is None else "acc_norm"


def _score_text(row: Row) -> str:
    metric = metric_of(row)
    value, error = as_float(row.get(metric)), as_float(row.get(f"{metric}_stderr"))
    return percent(value) if value is None or error is None else f"{percent(value)} ± {number(100 * error, 1)}"
