"""Sentences that sum up a bench result: the speeds, which model is faster, and whether the measurements are OK."""

from __future__ import annotations

from bench.judge.comparison import DECODE, compare_within, metric_of
from bench.judge.verdict import CANNOT_TELL, FASTER, NOT_COMPARABLE, SAME, SLOWER
from bench.judge.wording import number, threads
from bench.measure.result import OK, Measurement, Result
from bench.report.tables import table_rows
from saap.base.wording import counted

COMPARED = {
    FASTER: "is faster than", SLOWER: "is slower than", SAME: "is as fast as",
    CANNOT_TELL: "is neither clearly faster nor slower than", NOT_COMPARABLE: "cannot be compared with",
}  # fmt: skip


def sentences(result: Result) -> list[str]:
    """Return three sentences; where a sweep has several settings, the first two are about its first setting."""
    first = result.measurements[0]
    rows = [m for m in result.measurements if m.key[1:] == first.key[1:]]
    return [_speeds(result, first), _comparison(result, rows), _status(result)]


def _speeds(result: Result, first: Measurement) -> str:
    metric = metric_of(first)
    rates = [
        (m.name, number(row[f"{metric}_ts"]))
        for m, row in zip(result.measurements, table_rows(result), strict=True)
        if m.key[1:] == first.key[1:] and m.samples
    ]
    if not rates:
        return "Nothing was measured."
    (name, rate), *others = rates
    what = "decodes {} tokens" if metric == DECODE else "reads {} prompt tokens"
    clauses = [f"{name} {what.format(rate)} per second", *(f"{name} {rate}" for name, rate in others)]
    return f"{', '.join(clauses)} ({first.test}, {threads(first.n_threads)})."


def _comparison(result: Result, rows: list[Measurement]) -> str:
    base, *others = rows
    clauses = []
    for other in others:
        compared = compare_within(result, base.name, other.name).rows
        row = next(row for row in compared if (row.setting, row.n_threads) == (other.test, other.n_threads))
        ratio = f" ({row.speedup:.2f}x)" if row.speedup else ""
        clauses.append(f"{other.name} {COMPARED[row.verdict]} {base.name}{ratio}")
    return f"{', '.join(clauses)}." if clauses else "There is no second model to compare with."


def _status(result: Result) -> str:
    statuses = [m.status for m in result.measurements if m.status != OK]
    if not statuses:
        return "Every measurement is OK."
    share = f"{len(statuses)} of {counted(len(result.measurements), 'measurement')}"
    verb = "is" if len(statuses) == 1 else "are"
    return f"{share} {verb} {' or '.join(dict.fromkeys(statuses))}, for the reasons below the table."
