"""Guard a device: record what a model is there, measure it again later, and say what became worse.

A baseline holds the raw samples of several sessions, each of fresh processes: what differs from session to session
(heat, memory layout, neighbors) is measured, not taken for a change. A test adds a session of now, and up to two more
while it is not clear what they say. Both ask the model the same tokens. All of it holds for one device fingerprint:
another board, governor, Python or ONNX Runtime is another device.

Times, bytes and joules are judged by one value a session (:func:`bench.judge.verdict.judge_sessions`). Answers are
exact and need no statistics: tokens differ or not, the likelihood of a text moved by more than rounding or not.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from bench.judge.baselines import Baseline, BlindBaselineError, NoBaselineError, RegressionError, write_baseline
from bench.judge.comparison import LEAST_REPETITIONS, device_differs, obstacle_between
from bench.judge.confirm import bundle_gone
from bench.judge.verdict import (
    BETTER,
    CANNOT_TELL,
    FASTER,
    NOT_COMPARABLE,
    SAME,
    SESSION_ALPHA,
    SLOWER,
    UNKNOWN,
    WORSE,
    Verdict,
    judge_ratio,
    judge_sessions,
)
from bench.measure.answers import NLL_TOLERANCE, Answer, answer_of
from bench.measure.options import TURNS_S, BenchOptions
from bench.measure.result import INVALID, Measurement, Result, Sample
from bench.measure.statistics import ratio_of_sessions, typical
from devices.probe.host import probe
from saap.base.errors import UserError

KEPT = ("repetitions", "seed", "warmup", "choice")  # settings of a session, besides its lengths
SESSIONS = 5  # of a baseline
MOST_FRESH = 3  # sessions of a test
MOST_KEPT = 30  # sessions; of those that tests added the oldest go
BOTH_NOW = ", both now"
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
    """The verdicts of a device's test, and the runs that they rest on."""

    baseline: Baseline
    checks: list[Verdict]
    results: list[Result]

    @property
    def worse(self) -> list[Verdict]:
        return [check for check in self.checks if check.verdict == WORSE]

    @property
    def exit_code(self) -> int:
        """1 when something is worse, else 3 when something could not be compared or told, else 0."""
        if self.worse:
            return 1
        both = [check for check in self.checks if check.what.endswith(BOTH_NOW) and check.verdict != CANNOT_TELL]
        settled = {check.what.removesuffix(BOTH_NOW) for check in both}
        open_ = [check for check in self.checks if check.verdict == CANNOT_TELL and check.what not in settled]
        return 3 if open_ or any(check.verdict == NOT_COMPARABLE for check in self.checks) else 0


@dataclass(frozen=True)
class Recording:
    """Settings of a recording: the number of sessions, begun evenly over ``spread_s`` seconds."""

    sessions: int = SESSIONS
    spread_s: float = 0.0
    add_to: Baseline | None = None  # whose sessions stay
    min_effect: float | None = None  # relative change of speed that the baseline must be able to show
    sleep: Callable[[float], None] = time.sleep
    say: Callable[[str], None] | None = None  # told of what is measured again, and why


def record(name: str, measure: Measure, plan: BenchOptions, how: Recording | None = None) -> Baseline:
    """Measure a baseline; a session that is INVALID is measured again, ``AGAIN`` times at most.

    Args:
        plan: of each session, one setting, with the text that the model is asked about.

    Raises:
        RegressionError: a plan that says too little, a session that stays INVALID, or a model that does not repeat its
            answers.
        BlindBaselineError: sessions that differ too much.
    """
    how = how or Recording()
    _check(plan, how.sessions)
    results = list(how.add_to.results) if how.add_to else []
    before, begun = len(results), time.monotonic()
    for number in range(how.sessions):
        if number and (left := begun + number * how.spread_s / (how.sessions - 1) - time.monotonic()) > 0:
            how.sleep(left)
        session = f"session {len(results) + 1} is INVALID"
        result = _measured(measure, plan if number == 0 else replace(plan, cold=False), how.say, session)
        if (m := result.measurements[0]).status == INVALID:
            times = f"({AGAIN + 1} times in a row)"
            raise RegressionError(f"{session}, so it is no baseline: {'; '.join(m.reasons)} {times}")
        if why := answer_of(result).error:
            raise RegressionError(f"{name} was not asked: {why}")
        results.append(result)
        for check in judge_answers(answer_of(results[0]), answer_of(result)):
            if check.verdict == WORSE:
                then = "as its baseline does" if before else "the same twice"
                raise RegressionError(f"{name} does not answer {then} on this device: {check.reason}")
        if differs := device_differs(results[0].device, result.device):
            raise RegressionError(f"the device changed between two sessions: {differs}")
    baseline = replace(how.add_to, results=results) if how.add_to else Baseline(name, results)
    if how.min_effect is not None:
        _check_sight(baseline, how.min_effect)
    return baseline


def _check_sight(baseline: Baseline, min_effect: float) -> None:
    """Refuse a baseline against which a test could not see a change of this size."""
    blind = {what: change for what, change in visible_changes(baseline).items() if change > min_effect}
    if blind:
        shown = ", ".join(f"{what} {change:.0%}" for what, change in blind.items())
        raise BlindBaselineError(
            f"sessions differ too much here: a test would show a change of {shown}, and {min_effect:.0%} is asked for, "
            "so this is no baseline: stop other programs, record more --sessions or longer ones (-n), or give a larger "
            "--min-effect"
        )


def _measured(
    measure: Measure, plan: BenchOptions, say: Callable[[str], None] | None = None, session: str = ""
) -> Result:
    """Measure; a run that is INVALID is measured again, ``AGAIN`` times at most."""
    for _ in range(AGAIN):
        if (m := (result := measure(plan)).measurements[0]).status != INVALID:
            return result
        if say is not None:
            say(f"{session} and is measured again: {'; '.join(m.reasons)}")
    return measure(plan)


def retest(
    baselines: Sequence[Baseline],
    measure: Measure,
    *,
    on: str | None = None,
    here: str | None = None,
    limits: Limits | None = None,
    beside: Callable[[str, BenchOptions], Result] | None = None,
) -> DeviceTest:
    """Measure again and judge against the baseline of this device.

    Args:
        baselines: of the model, on all devices.
        on: the board's address, None for this host: of several baselines the one recorded there gives the setting.
        here: the device's fingerprint where it is known before measuring.

    Raises:
        NoBaselineError: none of this device.
    """
    allowed = limits or Limits()

    def measured(baseline: Baseline) -> Result:
        return _measured(measure, replace(plan_of(baseline), max_time_s=allowed.max_time_s))

    if here is not None and all(b.fingerprint != here for b in baselines):
        raise _other_device(baselines, probe())
    chosen = next((b for b in baselines if b.fingerprint == here), None) or next(
        (b for b in baselines if b.on == on), baselines[0]
    )
    first = measured(chosen)
    same = next((b for b in baselines if b.fingerprint == first.device.get("fingerprint")), None)
    if same is None:
        raise _other_device(baselines, first.device)
    if plan_of(same) != plan_of(chosen):  # recorded with other lengths or another text
        first = measured(same)
    results = [first]
    while True:
        checks = judge_all(same.results, results, allowed)
        open_ = [check for check in checks if check.verdict in (WORSE, CANNOT_TELL)]
        exact = all(check.test is None for check in open_)  # answers, which one more run confirms
        if not open_ or len(results) >= (2 if exact else MOST_FRESH):
            if beside is not None:
                checks += _both_now(same, first, partial(beside, same.results[0].measurements[0].spec), allowed)
            return DeviceTest(same, checks, results)
        results.append(measured(same))
        if differs := device_differs(first.device, results[-1].device):  # a governor, a power mode
            raise NoBaselineError(f"the device changed between two sessions: {differs}; test again")


def _both_now(
    baseline: Baseline, fresh: Result, measure: Callable[[BenchOptions], Result], limits: Limits
) -> list[Verdict]:
    """Decode and prefill of the model against the bundle of its baseline, measured now; worse only if twice."""
    (then,), (now,) = baseline.results[0].measurements, fresh.measurements
    if then.bundle_hash == now.bundle_hash or bundle_gone(then):
        return []
    plan = replace(plan_of(baseline), repetitions=1, cold=False, ratio_time_s=min(limits.max_time_s, TURNS_S), text=())
    first = _turns(measure(plan), limits)
    if not any(check.verdict == WORSE for check in first):
        return first
    again = {check.what: check for check in _turns(measure(plan), limits)}
    return [
        _all_say([check, again[check.what]]) if check.verdict == WORSE and check.what in again else check
        for check in first
    ]


def _turns(result: Result, limits: Limits) -> list[Verdict]:
    then, now = result.measurements
    checks = []
    for what in ("decode", "prefill"):
        if (turns := result.ratio(then, now, what)) is not None:
            of = Verdict(SAME, what + BOTH_NOW, now.name, then.name, now.test, now.n_threads)
            judged = judge_ratio(of, turns, limits.speed)
            if judged.verdict == SAME and turns.high >= 1 + limits.speed:
                judged = replace(judged, verdict=CANNOT_TELL, reason="turns of a longer --max-time would tell")
            checks.append(replace(judged, verdict={FASTER: BETTER, SLOWER: WORSE}.get(judged.verdict, judged.verdict)))
    return checks


def keep_tested(folder: Path, test: DeviceTest) -> None:
    """Add the sessions of a good test to its baseline; a folder that cannot be written stays as it is."""
    if all(check.verdict in (SAME, UNKNOWN) for check in test.checks):
        with contextlib.suppress(OSError, UserError):
            write_baseline(folder, test.baseline.with_tested(test.results, MOST_KEPT))


def visible_changes(baseline: Baseline) -> dict[str, float]:
    """Relative changes for the worse of decode and prefill that one more session would show 8 times of 10."""
    changes = {}
    for series in SERIES[:2]:
        sessions = [_values(series, result.measurements[0]) for result in baseline.results]
        if len(sessions) > 1 and all(sessions):
            middles = [float(np.median(values)) for values in sessions]
            next_session = ratio_of_sessions(middles, [float(np.mean(middles))])
            changes[series.what] = next_session.visible(SESSION_ALPHA)
    return changes


def plan_of(baseline: Baseline) -> BenchOptions:
    result = baseline.results[0]
    (m,) = result.measurements
    return BenchOptions(
        prompt=m.n_prompt, generate=m.n_gen, depth=m.n_depth, threads=m.n_threads, provider=m.provider,
        **{name: result.settings[name] for name in KEPT if name in result.settings},
        text=tuple(result.settings.get("text", ())), greedy=len(answer_of(result).tokens), cold=False,
    )  # fmt: skip


def _check(plan: BenchOptions, sessions: int) -> None:
    if len(plan.settings()) != 1:
        raise RegressionError("a baseline is of one setting: give one prompt length, one depth and one thread count")
    if len(plan.text) < LEAST_TEXT:
        raise RegressionError(f"a text of {len(plan.text)} tokens says too little: give {LEAST_TEXT} or more")
    if sessions < 1:
        raise RegressionError(f"{sessions} sessions record nothing: give 1 or more")
    # A test measures one run of as many: it must be comparable, too.
    if plan.repetitions is not None and (plan.repetitions < LEAST_REPETITIONS or plan.repetitions * sessions < 6):
        raise RegressionError(f"{plan.repetitions} repetitions are too few to tell a change later: give 6 or more")


def _other_device(baselines: Sequence[Baseline], device: Mapping[str, object]) -> NoBaselineError:
    reasons = [device_differs(b.results[0].device, device) or "" for b in baselines]
    differs = "; ".join(dict.fromkeys(text.removeprefix("measured on different devices: ") for text in reasons))
    return NoBaselineError(
        f"no baseline of {baselines[0].name} is of this device: {differs}; record one here with "
        "`saap devices baseline BUNDLE`"
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


def judge_all(old: Sequence[Result], new: Sequence[Result], limits: Limits) -> list[Verdict]:
    """Every check of one model, from sessions then and now in one setting."""
    before, now = ([result.measurements[0] for result in side] for side in (old, new))
    obstacles = [reason for m in now if (reason := obstacle_between(before[0], m))]
    if obstacles:  # but what is answered does not depend on time
        checks = [Verdict(NOT_COMPARABLE, "measurement", reason=obstacles[0])]
    else:
        checks = [_judge(series, before, now, limits) for series in SERIES]
    answered = [judge_answers(answer_of(old[0]), answer_of(result)) for result in new]
    return [*checks, *(_all_say(rows) for rows in zip(*answered, strict=True))]


def _all_say(rows: Sequence[Verdict]) -> Verdict:
    """Join the verdicts of the fresh sessions on an answer: worse only if all of them say so."""
    first, *others = rows
    if first.verdict != WORSE or not others:
        return first
    if all(row.verdict == WORSE for row in others):
        return replace(first, confirmed=True)
    return replace(first, verdict=SAME, confirmed=False, reason=f"{first.verdict}: a second run did not confirm it")


def judge_answers(old: Answer, new: Answer) -> list[Verdict]:
    """Greedy tokens and likelihood."""
    if why := old.error or new.error:
        return [Verdict(NOT_COMPARABLE, what, reason=why) for what in ("greedy tokens", "NLL")]
    return [_tokens(old.tokens, new.tokens), _likelihood(old.nll, new.nll)]


def _judge(series: _Series, before: Sequence[Measurement], now: Sequence[Measurement], limits: Limits) -> Verdict:
    m, limit = now[-1], getattr(limits, series.limit)
    empty = Verdict(UNKNOWN, series.what, m.name, setting=m.test, n_threads=m.n_threads, unit=series.unit)
    sides: list[list[float]] = []
    for measurements, run in ((before, "the baseline"), (now, "this run")):
        values = [_values(series, one) for one in measurements]
        if not all(values):
            samples = [s for one in measurements for s in one.samples]
            why = next((s.unknown[series.field] for s in samples if series.field in s.unknown), "not measured")
            return replace(empty, reason=f"{run} has none: {why}")
        sides.append([float(np.median(some)) for some in values])
    if series.field == "energy":
        first, *others = [_sensors(one) for one in (before[0], *now)]
        if changed := [sensors for sensors in others if sensors != first]:
            return replace(empty, reason=f"another sensor: {first} then, {changed[0]} now")
    a, b = sides
    old, new = (float(np.median(side)) for side in sides)
    judged = judge_sessions(replace(empty, old=old, new=new), a, b, limit)
    if abs(new - old) < series.least and judged.verdict != CANNOT_TELL:
        return replace(judged, verdict=SAME)
    if judged.verdict == CANNOT_TELL:
        if judged.high is not None and old * (judged.high - 1) < series.least:
            return replace(judged, verdict=SAME)
        visible = f"{judged.visible:.1%}" if judged.visible is not None and judged.visible < 9 else "any change"
        reason = f"its {len(a)} sessions and {len(b)} of now would show {visible}, {limit:.0%} is asked for"
        return replace(judged, reason=f"{reason}: add sessions with `saap devices baseline --add`")
    waited = [_waited(before), _waited(now)] if series.unit.startswith("s") else [0.0, 0.0]
    if judged.verdict == WORSE and waited[1] - waited[0] > limit:
        # Whoever shares its cores is slower, whatever the bundle is.
        reason = f"the bench waited for a core {waited[1]:.0%} of the time, {waited[0]:.0%} in the baseline"
        return replace(judged, verdict=CANNOT_TELL, reason=f"{reason}: stop other processes and test again")
    return replace(judged, confirmed=True if judged.verdict == WORSE and len(b) > 1 else None)


def _waited(measurements: Sequence[Measurement]) -> float:
    """Return the share of time in which runnable processes had no core: the median of the sessions' medians."""
    shares = [[s.counters.get("wait_share") or 0.0 for s in m.samples] for m in measurements]
    return float(np.median([float(np.median(some)) for some in shares if some] or [0.0]))


def _values(series: _Series, m: Measurement) -> list[float]:
    """One positive value per process in the order measured; empty where one does not know it."""
    readings = [_value(series, m, s) for s in sorted(m.samples, key=lambda s: s.order)]
    values = [value for value in readings if value is not None and value > 0]
    return values if len(values) == len(readings) else []


def _value(series: _Series, m: Measurement, s: Sample) -> float | None:
    if series.field == "token_s":
        return (typical(s.token_s) if s.token_s else s.decoding_s / m.n_gen) if m.n_gen else None
    if series.field == "energy":
        return s.energy.decode_j / m.n_gen if s.energy and m.n_gen else None
    value = getattr(s, series.field)
    return None if value is None else float(value)


def _sensors(m: Measurement) -> str:
    """Name the sensors of a measurement's energy, with what they see."""
    sensors = {(s.energy.scope, s.energy.source) for s in m.samples if s.energy}
    return ", ".join(f"{source} ({scope})" for scope, source in sorted(sensors))


def _tokens(old: list[int], new: list[int]) -> Verdict:
    if old == new:
        return Verdict(SAME, "greedy tokens", unit="tokens", old=len(old), new=len(new))
    at = next((n for n, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    words = [str(tokens[at]) if at < len(tokens) else "none" for tokens in (old, new)]
    reason = f"token {at + 1} of {len(old)} is {words[1]}, it was {words[0]}"
    return Verdict(WORSE, "greedy tokens", unit="tokens", old=len(old), new=at, reason=reason)


def _likelihood(old: float, new: float) -> Verdict:
    moved, of = new - old, Verdict(SAME, "NLL", unit="nats/token", old=old, new=new)
    if math.isnan(moved):
        return replace(of, verdict=WORSE, new=None, reason="the likelihood is not a number")
    if abs(moved) <= NLL_TOLERANCE:
        return of
    reason = f"moved by {moved:+.4f} nats per token, {NLL_TOLERANCE} are allowed"
    return replace(of, verdict=WORSE if moved > 0 else BETTER, reason=reason)
