"""Verdicts on one quantity from two measurements, and the evidence that a change needs.

A change needs three things: an interval that excludes 1, an effect that matters, and a test that agrees. One
comparison still errs in about 4 of 100 (``ALPHA``), so a change is only said once a second, fresh one says it too
(:func:`confirmed`): both err in the same direction in about 1 of 1000. Two things are the same when the interval
excludes an effect that matters. What lies between cannot be told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from bench.measure.statistics import (
    Ratio,
    bootstrap_ratio,
    difference_p_value,
    least_p_value,
    ratio_of_runs,
    ratio_of_sessions,
)
from saap.base.wording import counted

FASTER, SLOWER, BETTER, WORSE, SAME = "faster", "slower", "better", "worse", "same"
NOT_COMPARABLE, UNKNOWN, CANNOT_TELL = "not comparable", "not judged", "cannot tell"
ALPHA = 0.05  # of one comparison and in both directions: that of the 95 % interval beside it
SESSION_ALPHA = 0.01  # of sessions, one-sided: how often a quiet device is called worse
SAME_ALPHA = 0.002  # how often a change of the smallest effect is called the same


@dataclass(frozen=True)
class Verdict:
    """One quantity of one model in one setting, new against old; the two values are in ``unit``."""

    verdict: str  # faster | slower | better | worse | same | cannot tell | not comparable | not judged
    what: str = ""  # decode (time per token), prefill (time of the prompt), load, NLL, a task; empty: nothing compared
    name: str = ""  # of the model
    against: str = ""  # the old model's name, where it is another one
    setting: str = ""  # Measurement.test, such as pp128+tg128
    n_threads: int = 1
    unit: str = ""
    old: float | None = None
    new: float | None = None
    ratio: float | None = None  # new / old: of times and sizes, so that below 1 is better
    difference: float | None = None  # new - old: of nats and shares
    low: float | None = None  # low..high holds 95 % of the ratio, or of the difference
    high: float | None = None
    p_value: float | None = None
    test: str | None = None  # wilcoxon (pairs), mann-whitney, bursts, runs or sessions
    pairs: int = 0  # windows or examples that both answered
    reason: str | None = None  # why it is not comparable, or why a change is not said
    visible: float | None = None  # relative change for the worse that would be seen 8 times of 10
    confirmed: bool | None = None  # by a second run; None: none was asked for

    @property
    def speedup(self) -> float | None:
        return 1 / self.ratio if self.ratio else None

    @property
    def speedup_interval(self) -> tuple[float, float] | None:
        """The speed that 95 % holds, lower end first; None where there is none."""
        return (1 / self.high, 1 / self.low) if self.speedup and self.low and self.high else None

    @property
    def label(self) -> str:
        return f"{self.name} against {self.against}" if self.against else self.name


def judge_pairs(of: Verdict, a: Sequence[float], b: Sequence[float], min_effect: float) -> Verdict:
    """Judge interleaved processes: two series of positive values, of which less is better."""
    ratio, low, high = bootstrap_ratio(a, b, paired=True)
    p, test = difference_p_value(a, b, paired=True)
    of = replace(of, ratio=ratio, low=low, high=high, p_value=p, test=test)
    verdict = _speed(ratio, low, high, min_effect)
    if verdict in (FASTER, SLOWER) and least_p_value(len(a), len(b), paired=True) >= ALPHA:
        reason = f"it looks {verdict}, but {counted(len(b), 'repetition')} cannot tell: measure 6 or more"
        return replace(of, verdict=NOT_COMPARABLE, reason=reason)
    if verdict in (FASTER, SLOWER) and p >= ALPHA:
        verdict = CANNOT_TELL
    return _with_reason(replace(of, verdict=verdict), min_effect, "measure more repetitions (-r)")


def judge_runs(of: Verdict, a: Sequence[Sequence[float]], b: Sequence[Sequence[float]], min_effect: float) -> Verdict:
    """Judge runs then and now, each a series of positive values of its processes."""
    ratio = ratio_of_runs(a, b)
    of = replace(of, test="runs", visible=ratio.visible(ALPHA / 2))
    return _by_interval(of, ratio, min_effect, "compare folders of more runs, or bundles that can be measured together")


def judge_sessions(of: Verdict, old: Sequence[float], new: Sequence[float], min_effect: float) -> Verdict:
    """Judge sessions then and now, each one positive value, of which less is better.

    Worse needs an effect that matters and a p-value below ``SESSION_ALPHA``; the same, that such an effect is excluded.
    What lies between cannot be told.
    """
    ratio = ratio_of_sessions(old, new)
    visible = ratio.visible(SESSION_ALPHA)
    verdict = CANNOT_TELL
    if ratio.ratio >= 1 + min_effect and ratio.bound(SESSION_ALPHA) > 1:
        verdict = WORSE
    elif ratio.bound(1 - SAME_ALPHA) < 1 + min_effect:
        verdict = BETTER if ratio.ratio <= 1 - min_effect and ratio.bound(1 - SESSION_ALPHA) < 1 else SAME
    return replace(
        of, verdict=verdict, ratio=ratio.ratio, low=ratio.low, high=ratio.high, p_value=ratio.p_value, test="sessions",
        visible=visible,
    )  # fmt: skip


def judge_ratio(of: Verdict, ratio: Ratio, min_effect: float) -> Verdict:
    """Judge a ratio of models that took turns (:mod:`bench.measure.bursts`)."""
    return _by_interval(replace(of, test="bursts"), ratio, min_effect, "give turns more time (--ratio-time)")


def _by_interval(of: Verdict, ratio: Ratio, min_effect: float, remedy: str) -> Verdict:
    verdict = _speed(ratio.ratio, ratio.low, ratio.high, min_effect)
    of = replace(of, verdict=verdict, ratio=ratio.ratio, low=ratio.low, high=ratio.high, p_value=ratio.p_value)
    return _with_reason(of, min_effect, remedy)


def _speed(ratio: float, low: float, high: float, min_effect: float) -> str:
    """Return the verdict of an interval of times."""
    if high < 1 and ratio <= 1 - min_effect:
        return FASTER
    if low > 1 and ratio >= 1 + min_effect:
        return SLOWER
    return SAME if 1 - min_effect < low and high < 1 + min_effect else CANNOT_TELL


def _with_reason(of: Verdict, min_effect: float, remedy: str) -> Verdict:
    """Add the reason where a change cannot be told."""
    if of.verdict != CANNOT_TELL or of.low is None or of.high is None:
        return of
    reason = f"between {of.low - 1:+.1%} and {of.high - 1:+.1%}, so {min_effect:.1%} is not excluded: {remedy}"
    return replace(of, reason=reason)


def confirmed(first: Verdict, second: Verdict) -> Verdict:
    """Join two comparisons of the same things into one verdict; anything but a change stays as it is.

    The numbers are the second's: the first was picked for being conspicuous, so its ratio exaggerates. A second that
    says nothing neither confirms nor refutes.
    """
    if first.verdict not in (FASTER, SLOWER, WORSE):
        return first
    if second.verdict in (NOT_COMPARABLE, UNKNOWN):
        return replace(first, verdict=NOT_COMPARABLE, confirmed=False, reason=f"the second run: {second.reason}")
    if second.verdict == first.verdict:
        return replace(second, confirmed=True)
    if second.verdict == CANNOT_TELL:
        reason = f"{first.verdict}, and a second run cannot tell: {second.reason}"
        return replace(second, confirmed=False, reason=reason)
    return replace(second, verdict=SAME, confirmed=False, reason=f"{first.verdict}: a second run did not confirm it")
