"""Sentences that sum up a bench result: the speeds, which model is faster, and whether the measurements are OK."""

from __future__ import annotations

from bench.judge.comparison import DECODE, compare_within, metric_of
from bench.judge.verdict import CANNOT_TELL, FASTER, NOT_COMPARABLE, SAME, SLOWER
from bench.judge.wording import number, threads
from bench.measure.result import OK, Measurement, Result
from bench.report.tables import table_rows
from saap.base.wording import counted

COMPARED = {
    FASTER: "is faster than", SLOWER: "is slower than", SAME: "is as fast as", NOT_COMPARABLE: "does not compare with",
    CANNOT_TELL: "is neither clearly faster nor slower than",
}  # fmt: skip


def sentences(result: Result) -> list[str]:
    """Return three sentences; where a sweep has several settings, the first two are about its first setting."""
    all_rows, (first, *_) = zip(result.measurements, table_rows(result), strict=True), result.measurements
    rows = [(m, row) for m, row in all_rows if m.key[1:] == first.key[1:]]
    metric = metric_of(first)
    verb, unit = ("decodes", "tokens") if metric == DECODE else ("reads", "prompt tokens")
    rates = [f"{m.name} {verb} {number(row[f'{metric}_ts'])}" for m, row in rows if m.samples]
    speeds = f"{', '.join(rates)} {unit} per second ({first.test}, {threads(first.n_threads)})."
    compared = ", ".join(_compared(result, first, m) for m, _ in rows[1:])
    doubts, count = [m.status for m in result.measurements if m.status != OK], len(result.measurements)
    marked = f"{len(doubts)} of {counted(count, 'measurement')}, for the reasons below the table."
    return [
        speeds if rates else "Nothing was measured.",
        f"{compared}." if compared else "There is no second model to compare with.",
        f"{' or '.join(dict.fromkeys(doubts))} marks {marked}" if doubts else "Every measurement is OK.",
    ]


def _compared(result: Result, base: Measurement, other: Measurement) -> str:
    rows = compare_within(result, base.name, other.name).rows
    row = next(row for row in rows if (row.setting, row.n_threads) == (other.test, other.n_threads))
    return f"{other.name} {COMPARED[row.verdict]} {base.name}{f' ({row.speedup:.2f}x)' if row.speedup else ''}"
