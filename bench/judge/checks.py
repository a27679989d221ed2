"""Is a device still as good as its baseline? Speed, load, memory, energy and answers, each judged by itself.

Times, bytes and joules are series, one value per process, and are judged as ``bench.judge.comparison`` judges: an
interval that
excludes 1, an effect that matters, a test that agrees. Effects are wider than those of interleaved runs, since a
baseline is of another day. Answers are exact and need no statistics: tokens differ or not, the likelihood of a text
moved by more than rounding or not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench.judge.comparison import FASTER, NOT_COMPARABLE, SAME, SLOWER, Row, judge_values, obstacle_between
from bench.measure.answers import NLL_TOLERANCE, answer_of
from bench.measure.result import Measurement, Result, Sample
from bench.measure.statistics import summarize, typical

BETTER, WORSE, UNKNOWN = "better", "worse", "not judged"
WORDS = {FASTER: BETTER, SLOWER: WORSE}


@dataclass(frozen=True)
class Limits:
    """Smallest relative changes that count, as fractions."""

    speed: float = 0.05
    memory: float = 0.05
    load: float = 0.25  # the page cache and the disk take part in it
    energy: float = 0.10


@dataclass(frozen=True)
class Check:
    """One quantity. ``old`` and ``new`` are medians in ``unit``; ``ratio`` is new / old, above 1 is worse."""

    what: str
    verdict: str  # better | same | worse | not comparable | not judged
    unit: str = ""
    old: float | None = None
    new: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    reason: str | None = None
    confirmed: bool | None = None  # by a second run; None: none was needed


@dataclass(frozen=True)
class _Series:
    """A quantity of one process; ``least`` is an absolute change below which nothing is said."""

    what: str
    unit: str
    limit: str  # field of Limits
    field: str  # of Sample, whose ``unknown`` says why it is null
    least: float = 0.0


SERIES = (
    _Series("decode", "s/token", "speed", "token_s"),
    _Series("prefill", "s", "speed", "prefill_s", least=0.001),
    _Series("load", "s", "load", "load_s", least=0.02),
    _Series("peak memory, load", "B", "memory", "peak_load_bytes", least=8e6),
    _Series("peak memory, decode", "B", "memory", "peak_decode_bytes", least=8e6),
    _Series("energy", "J/token", "energy", "energy"),
)


def judge_all(old: Result, new: Result, limits: Limits) -> list[Check]:
    """Every check of one model, measured once before and once now, in one setting."""
    before, now = old.measurements[0], new.measurements[0]
    if reason := obstacle_between(before, now):
        checks = [Check("measurement", NOT_COMPARABLE, reason=reason)]  # but what is answered does not depend on time
    else:
        checks = [_judge(series, before, now, limits) for series in SERIES]
    return [*checks, *judge_answers(answer_of(old), answer_of(new))]


def judge_answers(old: dict[str, Any], new: dict[str, Any]) -> list[Check]:
    """Greedy tokens and likelihood, as ``bench.measure.answers`` gave them."""
    if why := old.get("error") or new.get("error"):
        return [Check(what, NOT_COMPARABLE, reason=str(why)) for what in ("greedy tokens", "NLL")]
    return [_tokens(old["tokens"], new["tokens"]), _likelihood(old["nll"], new["nll"])]


def confirmed(first: Sequence[Check], second: Sequence[Check]) -> list[Check]:
    """The first checks, in which only that is worse which a second, fresh run calls worse too.

    Numbers are the second's then: the first was picked for being conspicuous.
    """
    again = {check.what: check for check in second}
    broken = again.get("measurement")
    checks = []
    for check in first:
        other = again.get(check.what) or broken
        if check.verdict != WORSE or other is None:
            checks.append(check)
        elif other.verdict == WORSE:
            checks.append(replace(other, confirmed=True))
        elif other.verdict in (NOT_COMPARABLE, UNKNOWN):  # neither confirmed nor refuted
            reason = f"the second run: {other.reason}"
            checks.append(replace(check, verdict=NOT_COMPARABLE, confirmed=False, reason=reason))
        else:
            reason = f"{check.what} looked worse, a second run did not confirm it"
            checks.append(replace(other, verdict=SAME, confirmed=False, reason=reason))
    return checks


def _judge(series: _Series, before: Measurement, now: Measurement, limits: Limits) -> Check:
    a, b = _values(series, before), _values(series, now)
    empty = Check(series.what, UNKNOWN, series.unit)
    for values, m, run in ((a, before, "the baseline"), (b, now, "this run")):
        if not values:
            why = next((s.unknown[series.field] for s in m.samples if series.field in s.unknown), "not measured")
            return replace(empty, reason=f"{run} has none: {why}")
    if series.field == "energy" and (scopes := _scopes(before, now)):
        return replace(empty, reason=scopes)
    limit = getattr(limits, series.limit)
    row = judge_values(Row(series.what, now.n_threads, SAME, now.test), a, b, limit, paired=False)
    old, new = summarize(a), summarize(b)
    assert old is not None and new is not None
    check = Check(
        series.what, WORDS.get(row.verdict, row.verdict), series.unit, old.median, new.median, row.ratio, row.low,
        row.high, row.p_value, row.reason,
    )  # fmt: skip
    small = abs(new.median - old.median) < series.least
    return replace(check, verdict=SAME, reason=None) if small else check


def _values(series: _Series, m: Measurement) -> list[float]:
    """One positive value per process in the order measured; empty where one does not know it."""
    found = [_value(series, m, s) for s in sorted(m.samples, key=lambda s: s.order)]
    values = [value for value in found if value is not None and value > 0]
    return values if len(values) == len(found) else []


def _value(series: _Series, m: Measurement, s: Sample) -> float | None:
    if series.field == "token_s":
        return (typical(s.token_s) if s.token_s else s.decoding_s / m.n_gen) if m.n_gen else None
    if series.field == "energy":
        return s.energy.decode_j / m.n_gen if s.energy and m.n_gen else None
    value = getattr(s, series.field)
    return None if value is None else float(value)


def _scopes(before: Measurement, now: Measurement) -> str | None:
    """Why two energies are not of the same thing."""
    a, b = ({(s.energy.scope, s.energy.source) for s in m.samples if s.energy} for m in (before, now))
    return None if a == b else f"another sensor: {_sensors(a)} then, {_sensors(b)} now"


def _sensors(sensors: set[tuple[str, str]]) -> str:
    return ", ".join(f"{source} ({scope})" for scope, source in sorted(sensors))


def _tokens(old: list[int], new: list[int]) -> Check:
    if old == new:
        return Check("greedy tokens", SAME, "tokens", len(old), len(new))
    at = next((n for n, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    told = [str(tokens[at]) if at < len(tokens) else "none" for tokens in (old, new)]
    reason = f"token {at + 1} of {len(old)} is {told[1]}, it was {told[0]}"
    return Check("greedy tokens", WORSE, "tokens", len(old), at, reason=reason)


def _likelihood(old: float, new: float) -> Check:
    moved = new - old
    verdict = WORSE if moved > NLL_TOLERANCE else BETTER if moved < -NLL_TOLERANCE else SAME
    if math.isnan(moved):
        return Check("NLL", WORSE, "nats/token", old, None, reason="the likelihood is not a number")
    reason = f"moved by {moved:+.4f} nats per token, {NLL_TOLERANCE} are allowed" if verdict != SAME else None
    return Check("NLL", verdict, "nats/token", old, new, reason=reason)
