"""Guard a device: record what a model is there, measure it again later, and say what became worse.

A baseline holds raw samples of two runs or more, so that what differs from run to run is in its spread. A test
compares a fresh run with it, and says worse only when a second fresh run agrees. Both ask the model the same tokens.
All of it holds for one device fingerprint: another board, governor, Python or ONNX Runtime is another device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench.judge.baselines import Baseline, OtherDeviceError, RegressionError, read_baselines
from bench.judge.checks import UNKNOWN, WORSE, Check, Limits, confirmed, judge_all, judge_answers
from bench.judge.comparison import LEAST_REPETITIONS, NOT_COMPARABLE, device_differs
from bench.judge.formats import Case
from bench.measure.answers import answer_of
from bench.measure.plan import Plan
from bench.measure.result import INVALID, Result

RUNS = 2
AGAIN = 2  # times a run that is INVALID is measured once more: most of what makes it so passes
LEAST_TEXT = 8  # tokens: fewer say little
HOW = "record one here with `saap devices baseline BUNDLE`"

Measure = Callable[[Plan], Result]  # a run of the model on the device, wherever that is


@dataclass(frozen=True)
class Verdict:
    """What a test of a device found, and the runs that it rests on."""

    baseline: Baseline
    checks: list[Check]
    results: list[Result]

    @property
    def worse(self) -> list[Check]:
        """What became worse."""
        return [check for check in self.checks if check.verdict == WORSE]

    @property
    def exit_code(self) -> int:
        """1 when something is worse, else 3 when something could not be compared, else 0."""
        if self.worse:
            return 1
        return 3 if any(check.verdict == NOT_COMPARABLE for check in self.checks) else 0


def record(
    name: str, measure: Measure, plan: Plan, runs: int = RUNS, say: Callable[[str], None] | None = None
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
        if why := answer_of(result).get("error"):
            raise RegressionError(f"{name} was not asked: {why}")
        results.append(result)
        for check in judge_answers(answer_of(results[0]), answer_of(result)):
            if check.verdict == WORSE:
                raise RegressionError(f"{name} does not answer the same twice on this device: {check.reason}")
        if differs := device_differs(results[0].device, result.device):
            raise RegressionError(f"the device changed between two runs: {differs}")
    return Baseline(name, results)


def _valid_run(number: int, measure: Measure, plan: Plan, say: Callable[[str], None] | None) -> Result:
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
    max_time_s: float = 120.0,
) -> Verdict:
    """Measure again and judge against the baseline of this device.

    Args:
        on: the board's address, None for this host: of several baselines the one recorded there gives the setting.
        here: the device's fingerprint where it is known before measuring.

    Raises:
        RegressionError: no baseline of that name.
        OtherDeviceError: none of this device.
    """
    found = read_baselines(folder, name)
    if here is not None and all(b.fingerprint != here for b in found):
        raise OtherDeviceError(f"no baseline of {name} is of this device: {_differing(found, None)}; {HOW}")
    chosen = next((b for b in found if b.fingerprint == here), None) or next((b for b in found if b.on == on), found[0])
    plan = replace(plan_of(chosen), max_time_s=max_time_s)
    first = measure(plan)
    same = next((b for b in found if b.fingerprint == first.device.get("fingerprint")), None)
    if same is None:
        raise OtherDeviceError(f"no baseline of {name} is of this device: {_differing(found, first)}; {HOW}")
    if plan_of(same) != plan_of(chosen):  # recorded with other lengths or another text
        first = measure(replace(plan_of(same), max_time_s=max_time_s))
    limits, results = limits or Limits(), [first]
    checks = judge_all(same.pooled, first, limits)
    if any(check.verdict == WORSE for check in checks):
        results.append(measure(replace(plan_of(same), max_time_s=max_time_s)))
        if differs := device_differs(first.device, results[1].device):  # a governor, a power mode
            raise OtherDeviceError(f"the device changed between two runs: {differs}; test again")
        checks = confirmed(checks, judge_all(same.pooled, results[1], limits))
    return Verdict(same, checks, results)


def plan_of(baseline: Baseline) -> Plan:
    """The setting that a baseline was recorded in."""
    result = baseline.results[0]
    (m,) = result.measurements
    answered = answer_of(result)
    return Plan(
        prompt=m.n_prompt,
        generate=m.n_gen,
        depth=m.n_depth,
        threads=m.n_threads,
        provider=m.provider,
        repetitions=result.settings.get("repetitions"),
        seed=result.settings.get("seed", 0),
        text=tuple(result.settings.get("text", ())),
        greedy=len(answered.get("tokens", ())),
        cold=False,
    )


def _check(plan: Plan, runs: int) -> None:
    if len(plan.settings()) != 1:
        raise RegressionError("a baseline is of one setting: give one prompt length, one depth and one thread count")
    if len(plan.text) < LEAST_TEXT:
        raise RegressionError(f"a text of {len(plan.text)} tokens says too little: give {LEAST_TEXT} or more")
    if runs < 1:
        raise RegressionError(f"{runs} runs record nothing: give 1 or more")
    # A test measures one run of as many: it must be comparable, too.
    if plan.repetitions is not None and (plan.repetitions < LEAST_REPETITIONS or plan.repetitions * runs < 6):
        raise RegressionError(f"{plan.repetitions} repetitions are too few to tell a change later: give 6 or more")


def _differing(found: Sequence[Baseline], now: Result | None) -> str:
    """What differs between this device and those there are baselines of."""
    from devices.probe.host import probe

    device = probe() if now is None else now.device
    told = [device_differs(b.results[0].device, device) or "" for b in found]
    return "; ".join(dict.fromkeys(text.removeprefix("measured on different devices: ") for text in told))


def verdict_cases(verdict: Verdict) -> list[Case]:
    """A JUnit case per check: worse is a failure, not comparable an error, not judged skipped."""
    kinds = {WORSE: "failure", NOT_COMPARABLE: "error", UNKNOWN: "skipped"}
    return [Case(check.what, kinds.get(check.verdict), check.verdict, told(check)) for check in verdict.checks]


def told(check: Check) -> str:
    """One check as a sentence for people."""
    parts = [check.verdict]
    if check.ratio is not None and check.low is not None and check.high is not None:
        parts.append(f"{check.ratio:.3f} times the baseline (95 %: {check.low:.3f} to {check.high:.3f})")
    if check.reason:
        parts.append(check.reason)
    if check.confirmed:
        parts.append("confirmed by a second run")
    return f"{check.what}: {', '.join(parts)}"
