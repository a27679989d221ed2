"""Is the new measurement faster, slower, or the same? Two results, or two models of one result, setting by setting."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench.judge.verdict import NOT_COMPARABLE, SLOWER, Verdict, confirmed, judge_ratio, judge_values
from bench.judge.wording import plain, threads
from bench.measure.result import INVALID, Measurement, Result, read_result
from bench.measure.statistics import typical
from devices.common.errors import UserError

DECODE, PREFILL = "decode", "prefill"
LEAST_REPETITIONS = 3
# What a device's fingerprint is made of, as a person knows it; "emulated" is of results of older versions.
IDENTITY = (
    "board", "cpu_model", "architecture", "isa", "cores", "memory_bytes", "governor", "os", "python", "onnxruntime",
    "emulated", "power_mode", "clocks", "l4t",
)  # fmt: skip


class CompareError(UserError):
    """The comparison that was asked for has no meaning."""


@dataclass(frozen=True)
class Comparison:
    """Rows in the order of the old result, then settings that only the new one has."""

    min_effect: float
    rows: list[Verdict] = field(default_factory=list)

    @property
    def comparable(self) -> bool:
        return bool(self.rows) and all(row.verdict != NOT_COMPARABLE for row in self.rows)

    @property
    def regressed(self) -> bool:
        return any(row.verdict == SLOWER for row in self.rows)

    def exit_code(self, fail_on_regression: bool = False) -> int:
        """3 when not comparable, else 1 on a regression where asked for, else 0."""
        if not self.comparable:
            return 3
        return 1 if fail_on_regression and self.regressed else 0


def compare(old: Result | str | Path, new: Result | str | Path, min_effect: float = 0.02) -> Comparison:
    """Match measurements by ``Measurement.key`` and judge each.

    Where each result holds one name and they differ, it is one against the other, and the verdict names both.

    Args:
        old, new: two bench runs on one device, or the files that hold them.
        min_effect: relative change below which a difference does not matter, in [0, 1).

    Raises:
        CompareError: ``min_effect`` is no fraction.
        ResultError: a file is no result.
    """
    old, new = (each if isinstance(each, Result) else read_result(each) for each in (old, new))
    _check(min_effect)
    names = [list(dict.fromkeys(m.name for m in result.measurements)) for result in (old, new)]
    renamed = all(len(some) == 1 for some in names) and names[0] != names[1]
    key: Callable[[Measurement], Hashable] = (lambda m: m.key[1:]) if renamed else (lambda m: m.key)
    olds, news = ({key(m): m for m in result.measurements} for result in (old, new))
    device = device_differs(old.device, new.device)
    rows = []
    for k in [*olds, *(k for k in news if k not in olds)]:
        if k in olds and k in news:
            row = judge(olds[k], news[k], min_effect, paired=False, obstacle=device)
        else:
            row = _unmatched(olds.get(k), news.get(k), new if k in olds else old)
        rows.append(replace(row, name=names[1][0], against=names[0][0]) if renamed else row)
    return Comparison(min_effect, rows)


def compare_within(result: Result, base: str, other: str, min_effect: float = 0.02) -> Comparison:
    """``other`` against ``base`` of the same run in every setting, by their turns in bursts.

    A ratio by bursts has an interval of its own and stands where a measurement is INVALID. Where no turns were taken,
    interleaved repetitions are pairs.

    Raises CompareError: a name that the result does not have.
    """
    _check(min_effect)
    for name in (base, other):
        if not any(result.of(name)):
            known = ", ".join(dict.fromkeys(m.name for m in result.measurements))
            raise CompareError(f"the result has no measurement {name!r}: it has {known}")
    bases = {m.key[1:]: m for m in result.of(base)}
    pairs = [(bases[m.key[1:]], m) for m in result.of(other) if m.key[1:] in bases]
    rows = []
    for a, b in pairs:
        found = result.ratio(a, b, metric_of(b))
        of = Verdict(NOT_COMPARABLE, metric_of(b), b.name, setting=b.test, n_threads=b.n_threads)
        rows.append(judge_ratio(of, found, min_effect) if found else judge(a, b, min_effect, paired=True))
    return Comparison(min_effect, rows)


def noise_floor(result: Result, name: str, again: str) -> float:
    """Largest ``|ratio - 1|`` that the 95 % interval of one thing measured against itself still holds.

    Raises CompareError: an unknown name, or a pair that is not comparable.
    """
    limits: list[float] = []
    for row in compare_within(result, name, again, 0.0).rows:
        if row.low is None or row.high is None:
            raise CompareError(f"no noise floor for {row.name}, {row.setting}: {row.reason}")
        limits += [row.low, row.high]
    if not limits:
        raise CompareError(f"no noise floor: {name} and {again} share no setting, measure both with the same ones")
    return max(abs(limit - 1) for limit in limits)


def confirm(first: Comparison, second: Comparison) -> Comparison:
    """The first comparison, in which only those changes are left that a second, fresh one of the same things says."""
    fresh = {(row.name, row.setting, row.n_threads): row for row in second.rows}
    rows = []
    for row in first.rows:
        again = fresh.get((row.name, row.setting, row.n_threads))
        rows.append(confirmed(row, again) if again else row)
    return replace(first, rows=rows)


def judge(
    old: Measurement, new: Measurement, min_effect: float, *, paired: bool, obstacle: str | None = None
) -> Verdict:
    """One verdict. ``obstacle`` is a reason of the caller's not to compare them."""
    row = Verdict(NOT_COMPARABLE, name=new.name, n_threads=new.n_threads, setting=new.test)
    if reason := obstacle or obstacle_between(old, new):
        return replace(row, reason=reason)
    a, b = decisive_values(old, new)
    return judge_values(replace(row, what=metric_of(new)), a, b, min_effect, paired=paired)


def metric_of(m: Measurement) -> str:
    """What a measurement is judged by: decode where it has any, else prefill."""
    return DECODE if m.n_gen else PREFILL


def decisive_values(*measurements: Measurement) -> list[list[float]]:
    """Seconds per measurement and process, in the order measured: :func:`bench.measure.statistics.typical` of the
    decode steps.

    The mean of the steps where any of the measurements knows no single ones, the prompt's time where there is no
    decode.
    """
    mean = any(not s.token_s for m in measurements for s in m.samples)
    return [
        [
            (s.decoding_s / m.n_gen if mean else typical(s.token_s)) if m.n_gen else s.prefill_s or math.nan
            for s in sorted(m.samples, key=lambda s: s.order)
        ]
        for m in measurements
    ]


def _check(min_effect: float) -> None:
    if not 0 <= min_effect < 1:
        raise CompareError(f"a smallest effect of {min_effect} is no fraction: give 0 to below 1, e.g. 0.02 for 2 %")


def _unmatched(old: Measurement | None, new: Measurement | None, elsewhere: Result) -> Verdict:
    found = old or new
    assert found is not None
    reason = f"only in the {'old' if old else 'new'} result"
    settings = [f"{m.test} with {threads(m.n_threads)}" for m in elsewhere.of(found.name)]
    if settings:
        reason += f", where {found.name} was measured with {found.test}; the other has {', '.join(settings)}"
    return Verdict(NOT_COMPARABLE, name=found.name, n_threads=found.n_threads, setting=found.test, reason=reason)


def obstacle_between(old: Measurement, new: Measurement) -> str | None:
    for label, m in (("old", old), ("new", new)):
        if m.status == INVALID:
            return f"the {label} measurement is INVALID: {'; '.join(m.reasons) or 'no reason given'}"
        if len(m.samples) < LEAST_REPETITIONS:
            return f"the {label} measurement has {len(m.samples)} repetitions, {LEAST_REPETITIONS} are needed"
    if old.provider != new.provider:
        return f"provider differs: {old.provider} and {new.provider}"
    if not new.n_gen and any(s.prefill_s is None for m in (old, new) for s in m.samples):
        return "neither decode nor prefill was timed"
    return None


def device_differs(old: Mapping[str, object], new: Mapping[str, object]) -> str | None:
    """Why results of two devices do not compare, or None: what of their identity differs."""
    prints = old.get("fingerprint"), new.get("fingerprint")
    if None in prints:
        return "a result does not say which device it was measured on"
    if prints[0] == prints[1]:
        return None
    pairs = [(name, old.get(name), new.get(name)) for name in IDENTITY]
    differ = [f"{name} {plain(a)} and {plain(b)}" for name, a, b in pairs if a != b]
    if new.get("clocks") is not None and "clocks" not in old:
        differ.append("the older one does not say whether jetson_clocks was on, nor the fan's profile: record it again")
    return f"measured on different devices: {'; '.join(differ) or f'{prints[0]} and {prints[1]}'}"
