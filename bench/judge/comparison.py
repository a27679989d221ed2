"""Is the new measurement faster, slower, or the same? Two results, or two models of one result, setting by setting."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench.judge.verdict import (
    CANNOT_TELL,
    NOT_COMPARABLE,
    SLOWER,
    Verdict,
    confirmed,
    judge_pairs,
    judge_ratio,
    judge_runs,
)
from bench.judge.wording import plain, threads
from bench.measure.result import INVALID, Measurement, Result, ResultError, read_result
from bench.measure.statistics import typical
from saap.base.errors import UserError

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

    @property
    def open(self) -> bool:
        return any(row.verdict == CANNOT_TELL for row in self.rows)

    def exit_code(self, fail_on_regression: bool = False) -> int:
        """3 when not comparable, else 0; where regressions are asked for 1 on one, and 3 when it cannot be told."""
        if not self.comparable:
            return 3
        if not fail_on_regression:
            return 0
        return 1 if self.regressed else 3 if self.open else 0


Runs = Result | str | Path | Sequence[Result]


def compare(old: Runs, new: Runs, min_effect: float = 0.02) -> Comparison:
    """Match measurements by ``Measurement.key`` and judge each.

    Where each side holds one name and they differ, it is one against the other, and the verdict names both.

    Args:
        old, new: bench runs on one device: results, the files that hold them, or folders of such files. Several runs of
            a side tell how much runs differ.
        min_effect: relative change below which a difference does not matter, in [0, 1).

    Raises:
        CompareError: ``min_effect`` is no fraction.
        ResultError: a file is no result, or a folder holds none.
    """
    _check(min_effect)
    olds, news = runs_of(old), runs_of(new)
    now = news[-1].device
    here = [run for run in olds if device_differs(run.device, now) is None]
    device = None if here else device_differs(olds[-1].device, now)
    sides = here or olds, [run for run in news if device_differs(run.device, now) is None] or news
    names = [list(dict.fromkeys(m.name for run in side for m in run.measurements)) for side in sides]
    renamed = all(len(some) == 1 for some in names) and names[0] != names[1]
    before, after = (_by_key(side, whole_key=not renamed) for side in sides)
    rows = []
    for k in [*before, *(k for k in after if k not in before)]:
        if k in before and k in after:
            row = judge(before[k], after[k], min_effect, obstacle=device)
        else:
            mine, elsewhere = (before[k], sides[1]) if k in before else (after[k], sides[0])
            row = _unmatched(mine[-1], elsewhere[-1], "old" if k in before else "new")
        rows.append(replace(row, name=names[1][0], against=names[0][0]) if renamed else row)
    return Comparison(min_effect, rows)


def runs_of(side: Runs) -> list[Result]:
    """Return the runs that a side of a comparison stands for, in the order of time.

    Raises ResultError: a file is no result, or a folder holds none.
    """
    if isinstance(side, Result):
        return [side]
    if not isinstance(side, str | Path):
        return list(side)
    path = Path(side)
    runs = [read_result(each) for each in (sorted(path.glob("*.json")) if path.is_dir() else [path])]
    if not runs:
        raise ResultError(f"{path} holds no results: give a folder of `saap bench --history`")
    return sorted(runs, key=lambda run: run.created)


def only(runs: Sequence[Result], name: str | None) -> list[Result]:
    """Keep of each run what was measured under one name; None: all of it.

    Raises CompareError: nothing was.
    """
    if name is None:
        return list(runs)
    kept = [replace(run, measurements=some) for run in runs if (some := list(run.of(name)))]
    if not kept:
        known = ", ".join(dict.fromkeys(m.name for run in runs for m in run.measurements))
        raise CompareError(f"nothing was measured as {name!r}: give one of {known}")
    return kept


def _by_key(runs: Sequence[Result], whole_key: bool) -> dict[Hashable, list[Measurement]]:
    measurements: dict[Hashable, list[Measurement]] = {}
    for run in runs:
        for m in run.measurements:
            measurements.setdefault(m.key if whole_key else m.key[1:], []).append(m)
    return measurements


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
        of = replace(_row(b), what=metric_of(b))
        if turns := result.ratio(a, b, of.what):
            rows.append(judge_ratio(of, turns, min_effect))
        elif reason := obstacle_between(a, b):
            rows.append(_row(b, reason))
        else:
            before, after = decisive_values(a, b)
            rows.append(judge_pairs(of, before, after, min_effect))
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
    """Keep only those changes of the first comparison that a second, fresh one of the same things shows too."""
    fresh = {(row.name, row.setting, row.n_threads): row for row in second.rows}
    rows = []
    for row in first.rows:
        again = fresh.get((row.name, row.setting, row.n_threads))
        rows.append(confirmed(row, again) if again else row)
    return replace(first, rows=rows)


def judge(
    old: Sequence[Measurement], new: Sequence[Measurement], min_effect: float, obstacle: str | None = None
) -> Verdict:
    """Judge one setting from its runs; those that do not compare are left out where others do.

    Args:
        obstacle: a reason of the caller's not to compare them.
    """
    if reason := obstacle or obstacle_between(old[-1], new[-1]):
        return _row(new[-1], reason)
    a = [m for m in old if obstacle_between(m, new[-1]) is None]
    b = [m for m in new if obstacle_between(old[-1], m) is None]
    values = decisive_values(*a, *b)
    of = replace(_row(new[-1]), what=metric_of(new[-1]))
    return judge_runs(of, values[: len(a)], values[len(a) :], min_effect)


def _row(m: Measurement, reason: str | None = None) -> Verdict:
    """Return the verdict of a measurement before it is compared, or why it is not."""
    return Verdict(NOT_COMPARABLE, name=m.name, setting=m.test, n_threads=m.n_threads, reason=reason)


def metric_of(m: Measurement) -> str:
    """Name the measure that judges a measurement: decode where it has any, else prefill."""
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


def _unmatched(lonely: Measurement, elsewhere: Result, side: str) -> Verdict:
    reason = f"only in the {side} result"
    settings = [f"{m.test} with {threads(m.n_threads)}" for m in elsewhere.of(lonely.name)]
    if settings:
        reason += f", where {lonely.name} was measured with {lonely.test}; the other has {', '.join(settings)}"
    return _row(lonely, reason)


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
    """Say why results of two devices do not compare: the part of their identity that differs; None where they do."""
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
