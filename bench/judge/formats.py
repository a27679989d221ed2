"""Verdicts for continuous integration: JUnit XML and a GitHub step summary."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from typing import NamedTuple

from bench.judge.comparison import NOT_COMPARABLE, SLOWER, Comparison, Row
from bench.report.tables import Table, markdown
from bench.report.wording import threads

_KINDS = {"failure": "failures", "error": "errors", "skipped": "skipped"}
# What XML 1.0 may hold (its section 2.2); the rest of JSON's strings cannot be escaped in it either.
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class Case(NamedTuple):
    """A test case; ``kind`` is what went wrong: failure, error, skipped or nothing."""

    name: str
    kind: str | None
    why: str  # type of the failure, such as slower
    told: str


def junit_xml(comparison: Comparison) -> str:
    """A test case per row: slower is a failure, not comparable an error, as both make the exit code differ from 0."""
    kinds = {SLOWER: "failure", NOT_COMPARABLE: "error"}
    cases = []
    for row in comparison.rows:
        name = f"{row.name}, {row.setting}, {threads(row.n_threads)}"
        cases.append(Case(name, kinds.get(row.verdict), row.verdict, verdict_text(row)))
    return junit_cases("saap compare", cases)


def junit_cases(suite_name: str, cases: Sequence[Case]) -> str:
    """JUnit XML of one suite."""
    counted = {plural: sum(case.kind == kind for case in cases) for kind, plural in _KINDS.items()}
    counts = {"tests": str(len(cases)), **{plural: str(number) for plural, number in counted.items()}}
    suite = ElementTree.Element("testsuite", {"name": suite_name, **counts})
    for case in cases:
        names = {"classname": suite_name.replace(" ", "."), "name": _for_xml(case.name)}
        element, told = ElementTree.SubElement(suite, "testcase", names), _for_xml(case.told)
        if case.kind is None:
            ElementTree.SubElement(element, "system-out").text = told
        else:
            ElementTree.SubElement(element, case.kind, {"type": case.why, "message": told}).text = told
    suites = ElementTree.Element("testsuites")
    suites.append(suite)
    ElementTree.indent(suites)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ElementTree.tostring(suites, encoding="unicode")}\n'


def step_summary(comparison: Comparison) -> str:
    """A table for the file that ``GITHUB_STEP_SUMMARY`` names, which is appended to; slower rows come first."""
    header = ["verdict", "name", "test", "threads", "time, new / old", "95 %", "p", "reason"]
    order = sorted(comparison.rows, key=lambda row: (row.verdict != SLOWER, row.verdict != NOT_COMPARABLE))
    rows = [
        [
            row.verdict,
            row.name,
            row.setting,
            str(row.n_threads),
            "-" if row.ratio is None else f"{row.ratio:.3f}",
            "-" if row.low is None or row.high is None else f"{row.low:.3f}-{row.high:.3f}",
            "-" if row.p_value is None else f"{row.p_value:.4f}",
            row.reason or "",
        ]
        for row in order
    ]
    note = f"Changes below {100 * comparison.min_effect:g} % do not count; a ratio above 1 is slower."
    return f"### saap compare: {_headline(comparison)}\n\n{markdown(Table(header, rows))}\n{note}\n"


def verdict_text(row: Row) -> str:
    """One row as a sentence for people."""
    if row.ratio is None:
        return f"{row.verdict}: {row.reason}"
    interval = f"95 %: {row.low:.3f} to {row.high:.3f}"
    told = f"{row.verdict}: {row.metric} takes {row.ratio:.3f} times as long ({interval}, p = {row.p_value:.2g}"
    told += f", {row.test})"
    if row.confirmed:
        told += ", confirmed by a second run"
    return f"{told}; {row.reason}" if row.reason else told


def _headline(comparison: Comparison) -> str:
    verdicts = [row.verdict for row in comparison.rows]
    counted = [f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts)]
    return ", ".join(counted) or "nothing to compare"


def _for_xml(text: str) -> str:
    return _NOT_XML.sub("?", text)
