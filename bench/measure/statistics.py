"""Statistics of repeated measurements, computed when a result is read and never stored in it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# One process is judged by a low quantile of its steps. What disturbs a process (another program, an interrupt) only
# ever makes steps slower and often hits a part of them, so the undisturbed ones tell more; a slower model slows all.
TYPICAL_PERCENT = 25
MOST_SUMS = 1 << 22  # in memory at once
# Runs of one thing on one device differ by more than what is seen within a run (studies/README.md, "Settled"). Where
# they are too few to show by how much, this deviation of their logarithms is taken for true.
RUN_DEVIATION, LEAST_RUNS, NORMAL = 0.04, 5, 10**9


@dataclass(frozen=True)
class Summary:
    """Centre and spread of values, in their own unit."""

    median: float
    q1: float
    q3: float


def summarize(values: Sequence[float]) -> Summary | None:
    if not values:
        return None
    q1, median, q3 = np.percentile(np.asarray(values, dtype=np.float64), [25, 50, 75])
    return Summary(float(median), float(q1), float(q3))


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Percentile by linear interpolation, ``percent`` in 0..100; None when there are no values."""
    return float(np.percentile(np.asarray(values, dtype=np.float64), percent)) if values else None


def relative_slope(values: Sequence[float]) -> float | None:
    """Change over the whole series as a fraction of its median, by the Theil-Sen line, which spikes do not move.

    0.05 means that the fitted line ends 5 % of the median above its start. None below 8 values: a slope is noise there.
    """
    array = np.asarray(values, dtype=np.float64)
    if len(array) < 8 or not (median := float(np.median(array))) > 0:
        return None
    i, j = np.triu_indices(len(array), k=1)
    slope = float(np.median((array[j] - array[i]) / (j - i)))
    return slope * (len(array) - 1) / median


def typical(step_s: Sequence[float]) -> float:
    """Return the value by which one process is compared with others, from the seconds of its steps (at least one)."""
    return float(np.percentile(np.asarray(step_s, dtype=np.float64), TYPICAL_PERCENT))


def bootstrap_ratio(
    old: Sequence[float],
    new: Sequence[float],
    *,
    paired: bool = False,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Ratio ``new / old`` with a 95 % percentile bootstrap interval (Efron and Tibshirani 1993, chapter 13).

    Args:
        old, new: positive values, one per process.
        paired: value i of both was taken in the same round, so noise that hit one hit the other. The ratio is then the
            Hodges-Lehmann estimate over the ratios of the pairs, which are resampled; without pairs it is the ratio of
            medians, and the processes of each side are resampled. Series of different lengths are not pairs.

    Returns:
        (ratio, low, high). A single value carries no spread: the interval is then unbounded, (ratio, 0, inf).
    """
    a, b = _logarithms(old), _logarithms(new)
    random = np.random.default_rng(seed)
    if paired and len(a) == len(b):
        ratio, least = float(_hodges_lehmann((b - a)[None])[0]), len(a)
        resampled = _hodges_lehmann((b - a)[random.integers(len(a), size=(resamples, len(a)))]) if least > 1 else None
    else:
        ratio, least = float(np.median(b) - np.median(a)), min(len(a), len(b))
        picks = [side[random.integers(len(side), size=(resamples, len(side)))] for side in (a, b)]
        resampled = np.median(picks[1], axis=1) - np.median(picks[0], axis=1) if least > 1 else None
    if resampled is None:
        return math.exp(ratio), 0.0, math.inf
    low, high = np.percentile(resampled, [2.5, 97.5])
    return math.exp(ratio), math.exp(low), math.exp(high)


def relative_half_width(old: Sequence[float], new: Sequence[float], paired: bool) -> float:
    """Half the width of the ratio's 95 % interval, as a fraction of the ratio; infinite for a single value."""
    ratio, low, high = bootstrap_ratio(old, new, paired=paired)
    return (high - low) / 2 / ratio


def difference_p_value(old: Sequence[float], new: Sequence[float], paired: bool) -> tuple[float, str]:
    """Two-sided p-value that the ratio is 1, and the name of its test.

    Pairs: Wilcoxon's signed-rank test on the log ratios (two-sided and exact up to 50 pairs), which asks for no more
    than symmetry, and two runs of one thing are symmetric whatever the noise. Otherwise Mann and Whitney's U test.
    """
    from scipy.stats import mannwhitneyu, wilcoxon

    a, b = _logarithms(old), _logarithms(new)
    if not (paired and len(a) == len(b)):
        return float(mannwhitneyu(a, b).pvalue), "mann-whitney"
    differences = (b - a)[b != a]  # an exact zero has no sign
    if not len(differences):
        return 1.0, "wilcoxon"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of ties, which rounded times may have
        p = wilcoxon(differences, method="exact" if len(differences) <= 50 else "approx").pvalue
    return float(p), "wilcoxon"


def least_p_value(old: int, new: int, paired: bool) -> float:
    """Return the smallest p-value that a number of values can give: with fewer than 6 pairs it stays above 0.05."""
    return 2 * 0.5**old if paired and old == new else 2 / math.comb(old + new, old)


def _logarithms(values: Sequence[float]) -> Floats:
    if not len(values):
        raise ValueError("a ratio needs at least one value on each side")
    logarithms: Floats = np.log(np.asarray(values, dtype=np.float64))
    return logarithms


def _hodges_lehmann(rows: Floats) -> Floats:
    """Median of all pairwise means of each row, itself included (Hodges and Lehmann 1963); [rows, n] -> [rows]."""
    i, j = np.triu_indices(rows.shape[1])
    some = max(1, MOST_SUMS // len(i))
    medians = []
    for start in range(0, len(rows), some):
        sums = np.take(rows[start : start + some], i, axis=1)
        sums += np.take(rows[start : start + some], j, axis=1)
        sums.sort(axis=1)  # several times faster than np.median, which partitions
        count = sums.shape[1]
        medians.append((sums[:, (count - 1) // 2] + sums[:, count // 2]) / 4)
    return np.concatenate(medians)


@dataclass(frozen=True)
class Ratio:
    """An estimate of a ratio's logarithm with its standard error, judged by Student's t."""

    log: float
    error: float  # infinite where one value a side tells nothing of it
    freedom: int  # degrees of freedom of the error

    @property
    def ratio(self) -> float:
        return math.exp(self.log)

    @property
    def low(self) -> float:
        """Lower end of the 95 % interval."""
        return self.bound(0.025)

    @property
    def high(self) -> float:
        return self.bound(0.975)

    @property
    def half_width(self) -> float:
        """Half the width of the 95 % interval, as a fraction of the ratio."""
        return (self.high - self.low) / 2 / self.ratio

    @property
    def p_value(self) -> float:
        """Two-sided, of a ratio of 1."""
        from scipy.special import stdtr

        return float(2 * stdtr(self.freedom, -abs(self.log) / self.error)) if self.error else float(self.log == 0)

    def bound(self, probability: float) -> float:
        """Return the value below which the ratio is with this probability."""
        reach = self._quantile(probability) * self.error
        return math.exp(self.log + reach) if math.isfinite(reach) else (math.inf if reach > 0 else 0.0)

    def visible(self, alpha: float, power: float = 0.8) -> float:
        """Return the smallest relative increase that a one-sided test at ``alpha`` would find with this probability."""
        reach = (self._quantile(1 - alpha) + self._quantile(power)) * self.error
        return math.expm1(reach) if reach < 700 else math.inf

    def _quantile(self, probability: float) -> float:
        from scipy.special import stdtrit

        return float(stdtrit(self.freedom, probability))


def middle(values: Floats) -> float:
    """Return the Hodges-Lehmann estimate: as robust as it needs to be, and nearly as precise as a mean."""
    return float(_hodges_lehmann(values[None])[0])


def ratio_of_loads(values: Sequence[float], later: Sequence[bool]) -> Ratio:
    """Ratio of two models from the middle log ratios of their loads, of which each is one value.

    Whoever is loaded later may run a few percent faster, so the two orders are two strata: the ratio is the mean of
    their means, its variance that within them (pooled; Cochran 1977, chapter 5).

    Args:
        values: log ratio new / old of each load, both orders at least once and three loads in all.
        later: whether the new one was loaded after the old one.
    """
    groups = [np.asarray([v for v, late in zip(values, later, strict=True) if late == side]) for side in (False, True)]
    variance = _pooled_variance(groups)
    error = math.sqrt(variance * sum(1 / len(group) for group in groups)) / 2
    return Ratio(float(np.mean([group.mean() for group in groups])), error, len(values) - 2)


def ratio_of_sessions(old: Sequence[float], new: Sequence[float]) -> Ratio:
    """Ratio new / old of what differs from session to session, from one positive value a session.

    The two-sample t statistic of logarithms with a pooled variance, which holds what is within a session, too.
    """
    groups = [_logarithms(old), _logarithms(new)]
    log, freedom = float(groups[1].mean() - groups[0].mean()), len(old) + len(new) - 2
    if not freedom:
        return Ratio(log, math.inf, 1)
    return Ratio(log, math.sqrt(_pooled_variance(groups) * sum(1 / len(group) for group in groups)), freedom)


def ratio_of_runs(old: Sequence[Sequence[float]], new: Sequence[Sequence[float]]) -> Ratio:
    """Ratio new / old of the medians of runs, of which each has a positive value a process.

    From ``LEAST_RUNS`` of both sides on, their difference from run to run is measured (:func:`ratio_of_sessions`).
    Fewer are taken to differ by ``RUN_DEVIATION``, beside the error of each median, pi / 2 of that of a mean.
    """
    middles = [[float(np.median(run)) for run in side] for side in (old, new)]
    if len(old) + len(new) >= LEAST_RUNS:
        return ratio_of_sessions(*middles)
    variance = 0.0
    for side in (old, new):
        own = [math.pi / 2 * float(np.var(_logarithms(run), ddof=1)) / len(run) for run in side]
        variance += sum(RUN_DEVIATION**2 + one for one in own) / len(side) ** 2
    log = float(_logarithms(middles[1]).mean() - _logarithms(middles[0]).mean())
    return Ratio(log, math.sqrt(variance), NORMAL)


def _pooled_variance(groups: Sequence[Floats]) -> float:
    freedom = sum(len(group) - 1 for group in groups)
    return sum(float(((group - group.mean()) ** 2).sum()) for group in groups) / freedom
