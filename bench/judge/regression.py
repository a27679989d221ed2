"""Guard a device: record what a model is there, measure it again later, and say what became worse.

A baseline holds raw samples of two runs or more, so that what differs from run to run is in its spread. A test
compares a fresh run with it, and says worse only when a second fresh run agrees. Both ask the model the same tokens.
All of it holds for one device fingerprint: another board, governor, Python or ONNX Runtime is another device.

Times, bytes and joules are series, one value per process, and are judged as two results are
(:mod:`bench.judge.verdict`). Effects are wider than those of interleaved runs, since a baseline is of another day.
Answers are exact and need no statistics: tokens differ or not, the likelihood of a text moved by more than rounding or
not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bench.judge.baselines import Baseline, NoBaselineError, RegressionError, read_baselines
from bench.judge.comparison import LEAST_REPETITIONS, device_differs, obstacle_between
from bench.judge.verdict import (
    BETTER,
    FASTER,
    NOT_COMPARABLE,
    SAME,
    SLOWER,
    UNKNOWN,
    WORSE,
    Verdict,
    confirmed,
    judge_values,
)
from bench.measure.answers import NLL_TOLERANCE, Answer, answer_of
from bench.measure.options import BenchOptions
from bench.measure.result import INVALID, Measurement, Result, Sample
from bench.measure.statistics import typical
from devices.probe.host import probe

RUNS = 2
AGAIN = 2  # times a run that is INVALID is measured once more: most of what makes it so passes
LEAST_TEXT = 8  # tokens: fewer say little

Measure = Callable[[BenchOptions], Result]  # a run of the model on the device, wherever that is


@dataclass(frozen=True)
class Limits:
    """Smallest relative changes that count, as fractions, and how long each run of a test may take."""

    speed: float = 0.05
    memory: float = 0.05
    load: float = 0.25  # the page cache and the disk take part in it
    energy: float = 0.10
    max_time_s: float = 120.0


@dataclass(frozen=True)
class DeviceTest:
    """What a test of a device found, and the runs that it rests on."""

    baseline: Baseline
    checks: list[Verdict]
    results: list[Result]

    @property
    def worse(self) -> list[Verdict]:
        return [check for check in self.checks if check.verdict == WORSE]

    @property
    def exit_code(self) -> int:
        """1 when something is worse, else 3 when something could not be compared, else 0."""
        if self.worse:
            return 1
        return 3 if any(check.verdict == NOT_COMPARABLE for check in self.checks) else 0


def record(
    name: str, measure: Measure, plan: BenchOptions, runs: int = RUNS, say: Callable[[str], None] | None = None
) -> Baseline:
    """Measure a new baseline; a run that is INVALID is measured again, ``AGAIN`` times at most.

    Args:
        plan: of each run, one setting, with the text that the model is asked about.
        say: told of each run that is measured again, and why.

    Raises:
        RegressionError: a plan that says too little, a run that stays INVALID, or a model that does not repeat its
            answers.
    """
    _check(plan, runs)
    results: list[Result] = []
    for number in range(runs):
        result = _valid_run(number + 1, measure, plan if number == 0 else replace(plan, cold=False), say)
        if why := answer_of(result).error:
            raise RegressionError(f"{name} was not asked: {why}")
        results.append(result)
        for check in judge_answers(answer_of(results[0]), answer_of(result)):
            if check.verdict == WORSE:
                raise RegressionError(f"{name} does not answer the same twice on this device: {check.reason}")
        if differs := device_differs(results[0].device, result.device):
            raise RegressionError(f"the device changed between two runs: {differs}")
    return Baseline(name, results)


def _valid_run(number: int, measure: Measure, plan: BenchOptions, say: Callable[[str], None] | None) -> Result:
    for left in reversed(range(AGAIN + 1)):
        result = measure(plan)
        (m,) = result.measurements
        if m.status != INVALID:
            return result
        if say is not None and left:
            say(f"run {number} is INVALID and is measured again: {'; '.join(m.reasons)}")
    times = f"({AGAIN + 1} times in a row)"
    raise RegressionError(f"run {number} is INVALID, so it is no baseline: {'; '.join(m.reasons)} {times}")


def retest(
    folder: Path,
    name: str,
    measure: Measure,
    *,
    on: str | None = None,
    here: str | None = None,
    limits: Limits | None = None,
) -> DeviceTest:
    """Measure again and judge against the baseline of this device.

    Args:
        on: the board's address, None for this host: of several baselines the one recorded there gives the setting.
        here: the device's fingerprint where it is known before measuring.

    Raises:
        NoBaselineError: none of that name, or none of this device.
    """
    allowed = limits or Limits()

    def measured(baseline: Baseline) -> Result:
        return measure(replace(plan_of(baseline), max_time_s=allowed.max_time_s))

    found = read_baselines(folder, name)
    if here is not None and all(b.fingerprint != here for b in found):
        raise _other_device(name, found, probe())
    chosen = next((b for b in found if b.fingerprint == here), None) or next((b for b in found if b.on == on), found[0])
    first = measured(chosen)
    same = next((b for b in found if b.fingerprint == first.device.get("fingerprint")), None)
    if same is None:
        raise _other_device(name, found, first.device)
    if plan_of(same) != plan_of(chosen):  # recorded with other lengths or another text
        first = measured(same)
    results = [first]
    checks = judge_all(same.pooled, first, allowed)
    if any(check.verdict == WORSE for check in checks):
        results.append(measured(same))
        if differs := device_differs(first.device, results[1].device):  # a governor, a power mode
            raise NoBaselineError(f"the device changed between two runs: {differs}; test again")
        checks = _confirmed(checks, judge_all(same.pooled, results[1], allowed))
    return DeviceTest(same, checks, results)


def _confirmed(first: Sequence[Verdict], second: Sequence[Verdict]) -> list[Verdict]:
    """The first checks, in which only that is worse which a second, fresh run calls worse too."""
    again = {check.what: check for check in second}
    broken = again.get("measurement")  # the second run as a whole
    return [
        confirmed(check, other) if (other := again.get(check.what) or broken) is not None else check for check in first
    ]


def plan_of(baseline: Baseline) -> BenchOptions:
    result = baseline.results[0]
    (m,) = result.measurements
    return BenchOptions(
        prompt=m.n_prompt, generate=m.n_gen, depth=m.n_depth, threads=m.n_threads, provider=m.provider,
        repetitions=result.settings.get("repetitions"), seed=result.settings.get("seed", 0),
        text=tuple(result.settings.get("text", ())), greedy=len(answer_of(result).tokens), cold=False,
    )  # fmt: skip


def _check(plan: BenchOptions, runs: int) -> None:
    if len(plan.settings()) != 1:
        raise RegressionError("a baseline is of one setting: give one prompt length, one depth and one thread count")
    if len(plan.text) < LEAST_TEXT:
        raise RegressionError(f"a text of {len(plan.text)} tokens says too little: give {LEAST_TEXT} or more")
    if runs < 1:
        raise RegressionError(f"{runs} runs record nothing: give 1 or more")
    # A test measures one run of as many: it must be comparable, too.
    if plan.repetitions is not None and (plan.repetitions < LEAST_REPETITIONS or plan.repetitions * runs < 6):
        raise RegressionError(f"{plan.repetitions} repetitions are too few to tell a change later: give 6 or more")


def _other_device(name: str, found: Sequence[Baseline], device: Mapping[str, object]) -> NoBaselineError:
    told = [device_differs(b.results[0].device, device) or "" for b in found]
    differs = "; ".join(dict.fromkeys(text.removeprefix("measured on different devices: ") for text in told))
    return NoBaselineError(
        f"no baseline of {name} is of this device: {differs}; record one here with `saap devices baseline BUNDLE`"
    )


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


def judge_all(old: Result, new: Result, limits: Limits) -> list[Verdict]:
    """Every check of one model, measured once before and once now, in one setting."""
    before, now = old.measurements[0], new.measurements[0]
    if reason := obstacle_between(before, now):
        checks = [Verdict(NOT_COMPARABLE, "measurement", reason=reason)]  # but what is answered does not depend on time
    else:
        checks = [_judge(series, before, now, limits) for series in SERIES]
    return [*checks, *judge_answers(answer_of(old), answer_of(new))]


def judge_answers(old: Answer, new: Answer) -> list[Verdict]:
    """Greedy tokens and likelihood."""
    if why := old.error or new.error:
        return [Verdict(NOT_COMPARABLE, what, reason=why) for what in ("greedy tokens", "NLL")]
    return [_tokens(old.tokens, new.tokens), _likelihood(old.nll, new.nll)]


def _judge(series: _Series, before: Measurement, now: Measurement, limits: Limits) -> Verdict:
    a, b = _values(series, before), _values(series, now)
    empty = Verdict(UNKNOWN, series.what, now.name, setting=now.test, n_threads=now.n_threads, unit=series.unit)
    for values, m, run in ((a, before, "the baseline"), (b, now, "this run")):
        if not values:
            why = next((s.unknown[series.field] for s in m.samples if series.field in s.unknown), "not measured")
            return replace(empty, reason=f"{run} has none: {why}")
    if series.field == "energy" and (scopes := _scopes(before, now)):
        return replace(empty, reason=scopes)
    old, new = (float(np.median(values)) for values in (a, b))
    judged = judge_values(replace(empty, old=old, new=new), a, b, getattr(limits, series.limit), paired=False)
    if abs(new - old) < series.least:
        return replace(judged, verdict=SAME, reason=None)
    return replace(judged, verdict={FASTER: BETTER, SLOWER: WORSE}.get(judged.verdict, judged.verdict))


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
    a, b = ({(s.energy.scope, s.energy.source) for s in m.samples if s.energy} for m in (before, now))
    return None if a == b else f"another sensor: {_sensors(a)} then, {_sensors(b)} now"


def _sensors(sensors: set[tuple[str, str]]) -> str:
    return ", ".join(f"{source} ({scope})" for scope, source in sorted(sensors))


def _tokens(old: list[int], new: list[int]) -> Verdict:
    if old == new:
        return Verdict(SAME, "greedy tokens", unit="tokens", old=len(old), new=len(new))
    at = next((n for n, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    told = [str(tokens[at]) if at < len(tokens) else "none" for tokens in (old, new)]
    reason = f"token {at + 1} of {len(old)} is {told[1]}, it was {told[0]}"
    return Verdict(WORSE, "greedy tokens", unit="tokens", old=len(old), new=at, reason=reason)


def _likelihood(old: float, new: float) -> Verdict:
    moved, of = new - old, Verdict(SAME, "NLL", unit="nats/token", old=old, new=new)
    if math.isnan(moved):
        return replace(of, verdict=WORSE, new=None, reason="the likelihood is not a number")
    if abs(moved) <= NLL_TOLERANCE:
        return of
    reason = f"moved by {moved:+.4f} nats per token, {NLL_TOLERANCE} are allowed"
    return replace(of, verdict=WORSE if moved > 0 else BETTER, reason=reason)
