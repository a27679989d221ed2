"""Statistics of repeated measurements, computed when a result is read and never stored in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Summary:
    """Centre and spread of ``n`` values, in the values' own unit."""

    n: int
    mean: float
    stddev: float | None  # of the sample, n - 1; None for a single value
    median: float
    q1: float
    q3: float

    @property
    def iqr(self) -> float:
        """Interquartile range."""
        return self.q3 - self.q1


def summarize(values: Sequence[float]) -> Summary | None:
    """Summary of the values, or None when there are none."""
    if not values:
        return None
    array = np.asarray(values, dtype=np.float64)
    q1, median, q3 = np.percentile(array, [25, 50, 75])
    stddev = float(array.std(ddof=1)) if len(array) > 1 else None
    return Summary(len(array), float(array.mean()), stddev, float(median), float(q1), float(q3))


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


def bootstrap_ratio(
    old: Sequence[float],
    new: Sequence[float],
    *,
    paired: bool = False,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Ratio of medians ``new / old`` with a percentile bootstrap interval (Efron and Tibshirani 1993, chapter 13).

    Args:
        old, new: positive values of the repetitions.
        paired: value i of both was taken in the same round, so noise that hit one hit the other; they are resampled
            together. Series of different lengths (a repetition failed) are not.

    Returns:
        (ratio, low, high). A single value carries no spread: the interval is then unbounded, (ratio, 0, inf).
    """
    a, b = np.asarray(old, dtype=np.float64), np.asarray(new, dtype=np.float64)
    if not len(a) or not len(b):
        raise ValueError("a ratio needs at least one value on each side")
    ratio = float(np.median(b) / np.median(a))
    if min(len(a), len(b)) < 2:
        return ratio, 0.0, math.inf
    random = np.random.default_rng(seed)
    pick_a = random.integers(len(a), size=(resamples, len(a)))
    together = paired and len(a) == len(b)
    pick_b = pick_a if together else random.integers(len(b), size=(resamples, len(b)))
    ratios = np.median(b[pick_b], axis=1) / np.median(a[pick_a], axis=1)
    tail = 50 * (1 - confidence)
    low, high = np.percentile(ratios, [tail, 100 - tail])
    return ratio, float(low), float(high)
