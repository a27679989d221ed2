"""Verdicts as people and machines read them: tables, a sentence each, JSON, JUnit XML and a GitHub step summary."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from typing import NamedTuple

from bench.judge.comparison import Comparison
from bench.judge.quality import SHARE
from bench.judge.regression import DeviceTest
from bench.judge.verdict import CANNOT_TELL, NOT_COMPARABLE, SAME, SLOWER, UNKNOWN, WORSE, Verdict
from bench.judge.wording import threads
from bench.report.tables import Table, markdown

_KINDS = {SLOWER: "failure", WORSE: "failure", NOT_COMPARABLE: "error", CANNOT_TELL: "error", UNKNOWN: "skipped"}
_PLURALS = {"failure": "failures", "error": "errors", "skipped": "skipped"}
_SCALES = {"s": (1e3, "ms"), "s/token": (1e3, "ms/token"), "B": (1e-6, "MB")}
# What XML 1.0 may hold (its section 2.2); the rest of JSON's strings cannot be escaped in it either.
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def _value(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    scale, shown = _SCALES.get(unit, (1.0, unit))
    return f"{value * scale:.4g} {shown}"


def _score(value: float | None, unit: str, sign: str = "", digits: int = 4) -> str:
    """Nats with four digits, shares in percent; a change (``sign`` "+") without its unit."""
    if value is None:
        return "-"
    if unit == SHARE:
        return f"{100 * value:{sign}.2f}" + ("" if sign else " %")
    return f"{value:{sign}.{digits}f}"


def _interval(v: Verdict) -> str:
    if v.low is None or v.high is None:
        return "-"
    if v.difference is not None:
        return f"{_score(v.low, v.unit, '+')} to {_score(v.high, v.unit, '+')}"
    return f"{v.low:.3f} to {v.high:.3f}"


def _speeds(v: Verdict) -> str:
    return "-" if v.speedup_interval is None else "{:.3f} to {:.3f}".format(*v.speedup_interval)


_COLUMNS: dict[str, Callable[[Verdict], str]] = {
    "name": lambda v: v.label,
    "test": lambda v: f"{v.setting} t{v.n_threads}",
    "of": lambda v: v.what or "-",
    "measure": lambda v: v.what,
    "pairs": lambda v: "-" if v.difference is None else str(v.pairs),
    "old": lambda v: _score(v.old, v.unit),
    "new": lambda v: _score(v.new, v.unit),
    "difference": lambda v: _score(v.difference, v.unit, "+"),
    "baseline": lambda v: _value(v.old, v.unit),
    "now": lambda v: _value(v.new, v.unit),
    "now / baseline": lambda v: _score(v.ratio, "", digits=3),
    "as fast": lambda v: "-" if v.speedup is None else f"{v.speedup:.3f}x",
    "95 % of it": _speeds,
    "95 %": _interval,
    "p": lambda v: "-" if v.p_value is None else f"{v.p_value:.3g}",
    "verdict": lambda v: v.verdict,
    "reason": lambda v: v.reason or "",
}
SPEED = ("name", "test", "of", "as fast", "95 % of it", "p", "verdict")
DEVICE = ("of", "baseline", "now", "now / baseline", "95 %", "verdict")
QUALITY = ("measure", "pairs", "old", "new", "difference", "95 %", "verdict")
LEAST = ("p", "pairs", "of", "95 %", "95 % of it", "old", "baseline")  # go first where a screen is narrow
SUMMARY = ("verdict", "name", "test", "of", "as fast", "95 % of it", "p", "reason")


def verdict_table(verdicts: Sequence[Verdict], columns: Sequence[str]) -> Table:
    """Make a row of each; ``columns`` is ``SPEED``, ``DEVICE``, ``QUALITY`` or ``SUMMARY``."""
    return Table(list(columns), [[_COLUMNS[column](v) for column in columns] for v in verdicts])


def sentence(v: Verdict) -> str:
    parts = [v.verdict]
    if v.ratio is not None and v.low is not None and v.high is not None:
        test = f", p = {v.p_value:.2g}, {v.test}" if v.p_value is not None else ""
        ratio = f"{v.ratio:.3f} times the baseline (95 %: {_interval(v)}{test})"
        parts.append(ratio if v.unit else f"{v.speedup:.3f}x as fast (95 %: {_speeds(v)}{test})")
    if v.reason:
        parts.append(v.reason)
    if v.confirmed:
        parts.append("confirmed by another run")
    elif v.visible is not None and v.verdict == SAME and v.visible < 9:
        parts.append(f"{v.visible:.1%} more would be seen")
    return f"{v.what}: {', '.join(parts)}" if v.what else ", ".join(parts)


def comparison_json(comparison: Comparison) -> dict[str, object]:
    """Return the document of ``saap compare --json`` for two results or two bundles."""
    rows = [
        {
            "name": v.label, "n_threads": v.n_threads, "verdict": v.verdict, "setting": v.setting,
            "metric": v.what or None, "ratio": v.ratio, "low": v.low, "high": v.high, "speed": v.speedup,
            "p_value": v.p_value, "test": v.test, "reason": v.reason, "confirmed": v.confirmed,
        }
        for v in comparison.rows
    ]  # fmt: skip
    return {"schema": 2, "comparable": comparison.comparable, "min_effect": comparison.min_effect, "rows": rows}


def quality_json(verdicts: Sequence[Verdict]) -> dict[str, object]:
    """Return the document of ``saap compare --json`` for two documents of ``saap eval``."""
    rows = [
        {
            "models": [v.against or v.name, v.name], "measure": v.what, "verdict": v.verdict, "old": v.old,
            "new": v.new, "difference": v.difference, "low": v.low, "high": v.high, "pairs": v.pairs,
            "reason": v.reason,
        }
        for v in verdicts
    ]  # fmt: skip
    return {"kind": "saap-quality-comparison", "version": 1, "rows": rows}


class Case(NamedTuple):
    """A test case of JUnit; ``kind`` is what went wrong: failure, error, skipped or nothing."""

    name: str
    kind: str | None
    why: str  # type of the failure, such as slower
    text: str


def comparison_junit(comparison: Comparison) -> str:
    """Slower is a failure, not comparable an error, as both make the exit code differ from 0."""
    return junit("saap compare", [_case(v, f"{v.label}, {v.setting}, {threads(v.n_threads)}") for v in comparison.rows])


def device_junit(test: DeviceTest) -> str:
    """Worse is a failure, not comparable an error, not judged skipped."""
    return junit("saap devices test", [_case(v, v.what) for v in test.checks])


def _case(v: Verdict, name: str) -> Case:
    return Case(name, _KINDS.get(v.verdict), v.verdict, sentence(v))


def junit(suite_name: str, cases: Sequence[Case]) -> str:
    """JUnit XML of one suite."""
    counted = {plural: sum(case.kind == kind for case in cases) for kind, plural in _PLURALS.items()}
    counts = {"tests": str(len(cases)), **{plural: str(number) for plural, number in counted.items()}}
    suite = ElementTree.Element("testsuite", {"name": suite_name, **counts})
    for case in cases:
        names = {"classname": suite_name.replace(" ", "."), "name": _for_xml(case.name)}
        element, words = ElementTree.SubElement(suite, "testcase", names), _for_xml(case.text)
        if case.kind is None:
            ElementTree.SubElement(element, "system-out").text = words
        else:
            ElementTree.SubElement(element, case.kind, {"type": case.why, "message": words}).text = words
    suites = ElementTree.Element("testsuites")
    suites.append(suite)
    ElementTree.indent(suites)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ElementTree.tostring(suites, encoding="unicode")}\n'


def _for_xml(text: str) -> str:
    return _NOT_XML.sub("?", text)


def step_summary(comparison: Comparison) -> str:
    """Write a table for the file that ``GITHUB_STEP_SUMMARY`` names, which is appended to; slower rows come first."""
    order = sorted(comparison.rows, key=lambda v: (v.verdict != SLOWER, v.verdict != NOT_COMPARABLE))
    verdicts = [v.verdict for v in comparison.rows]
    counted = [f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts)]
    title = ", ".join(counted) or "nothing to compare"
    note = f"Changes below {100 * comparison.min_effect:g} % do not count; below 1x is slower."
    return f"### saap compare: {title}\n\n{markdown(verdict_table(order, SUMMARY))}\n{note}\n"
