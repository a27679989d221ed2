"""Is the new measurement faster, slower, or the same? Ratio of medians of decode time per token, with its interval."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bench.result import INVALID, Measurement, Result
from bench.stats import bootstrap_ratio

FASTER, SLOWER, SAME, NOT_COMPARABLE = "faster", "slower", "same", "not comparable"
LEAST_REPETITIONS = 3


class CompareError(ValueError):
    """The comparison that was asked for has no meaning."""

    exit_code = 2


@dataclass(frozen=True)
class Row:
    """One name at one thread count. ``ratio`` is new / old time per token: below 1 is faster; low..high holds 95 %."""

    name: str
    n_threads: int
    verdict: str
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    reason: str | None = None  # why it is not comparable

    @property
    def speedup(self) -> float | None:
        """Old over new time per token."""
        return 1 / self.ratio if self.ratio else None


@dataclass(frozen=True)
class Comparison:
    """Rows in the order of the old result, then names that only the new one has."""

    min_effect: float
    rows: list[Row] = field(default_factory=list)

    @property
    def comparable(self) -> bool:
        """Whether every row could be compared."""
        return bool(self.rows) and all(row.verdict != NOT_COMPARABLE for row in self.rows)

    @property
    def regressed(self) -> bool:
        """Whether any row became slower."""
        return any(row.verdict == SLOWER for row in self.rows)

    def exit_code(self, fail_on_regression: bool = False) -> int:
        """3 when not comparable, else 1 on a regression where asked for, else 0."""
        if not self.comparable:
            return 3
        return 1 if fail_on_regression and self.regressed else 0


def compare(old: Result, new: Result, min_effect: float = 0.02) -> Comparison:
    """Match measurements by name and thread count and judge each.

    Args:
        old, new: two bench runs on one device.
        min_effect: relative change below which a difference does not matter, in [0, 1).
    """
    _check(min_effect)
    olds = {(m.name, m.n_threads): m for m in old.measurements}
    news = {(m.name, m.n_threads): m for m in new.measurements}
    device = _device_differs(old.device, new.device)
    rows = []
    for key in [*olds, *(k for k in news if k not in olds)]:
        if key not in olds or key not in news:
            reason = f"only in the {'old' if key in olds else 'new'} result"
            rows.append(Row(*key, NOT_COMPARABLE, reason=reason))
        else:
            rows.append(_row(olds[key], news[key], min_effect, paired=False, obstacle=device))
    return Comparison(min_effect, rows)


def compare_within(result: Result, base: str, other: str, min_effect: float = 0.02) -> Comparison:
    """``other`` against ``base`` of the same run, whose interleaved repetitions are taken as pairs.

    Raises:
        CompareError: a name that the result does not have.
    """
    _check(min_effect)
    for name in (base, other):
        if all(m.name != name for m in result.measurements):
            known = ", ".join(m.name for m in result.measurements)
            raise CompareError(f"the result has no measurement {name!r}: it has {known}")
    bases = {m.n_threads: m for m in result.measurements if m.name == base}
    pairs = [(bases[m.n_threads], m) for m in result.measurements if m.name == other and m.n_threads in bases]
    return Comparison(min_effect, [_row(a, b, min_effect, paired=True) for a, b in pairs])


def _check(min_effect: float) -> None:
    if not 0 <= min_effect < 1:
        raise CompareError(f"a smallest effect of {min_effect} is no fraction: give 0 to below 1, e.g. 0.02 for 2 %")


def _row(old: Measurement, new: Measurement, min_effect: float, paired: bool, obstacle: str | None = None) -> Row:
    reason = obstacle or _obstacle(old, new)
    if reason:
        return Row(new.name, new.n_threads, NOT_COMPARABLE, reason=reason)
    ratio, low, high = bootstrap_ratio(old.token_s, new.token_s, paired=paired)
    verdict = SAME
    if high < 1 and ratio <= 1 - min_effect:
        verdict = FASTER
    elif low > 1 and ratio >= 1 + min_effect:
        verdict = SLOWER
    return Row(new.name, new.n_threads, verdict, ratio, low, high)


def _obstacle(old: Measurement, new: Measurement) -> str | None:
    for label, m in (("old", old), ("new", new)):
        if m.status == INVALID:
            return f"the {label} measurement is INVALID: {'; '.join(m.reasons) or 'no reason given'}"
        if len(m.samples) < LEAST_REPETITIONS:
            return f"the {label} measurement has {len(m.samples)} repetitions, {LEAST_REPETITIONS} are needed"
    for name in ("n_prompt", "n_gen", "n_threads"):
        if getattr(old, name) != getattr(new, name):
            return f"{name} differs: {getattr(old, name)} and {getattr(new, name)}"
    return None


def _device_differs(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    prints = old.get("fingerprint"), new.get("fingerprint")
    if None in prints:
        return "a result does not say which device it was measured on"
    return None if prints[0] == prints[1] else f"measured on different devices: {prints[0]} and {prints[1]}"
