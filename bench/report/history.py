"""A folder of results over time: one document per run, series per device and setting, and where they step."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.judge.comparison import decisive_values, metric_of
from bench.judge.wording import date, moment
from bench.measure.result import INVALID, RESULT, Result, ResultError, read_result, write_result
from bench.measure.statistics import summarize
from saap.base.progress import Progress, advance

Array = NDArray[np.float64]

LEAST_SEGMENT = 5  # runs between two change points: fewer are outliers


@dataclass(frozen=True)
class Point:
    """One run of one setting."""

    created: str  # ISO 8601, UTC
    file: str
    median_s: float  # over its processes: per token, or of the prompt where nothing is generated


@dataclass(frozen=True)
class Series:
    """The runs of one ``Measurement.key`` on one device in the order of time; INVALID ones are left out."""

    fingerprint: str
    device: str  # its name for people
    name: str
    setting: str  # Measurement.test
    n_threads: int
    metric: str  # decode | prefill
    points: list[Point]

    @property
    def changes(self) -> list[str]:
        """The changes of its level, a sentence each."""
        values = [point.median_s for point in self.points]
        steps = change_points(values)
        levels = [float(np.median(values[a:b])) for a, b in pairwise([0, *steps, len(values)])]
        sentences = []
        for step, (before, after) in zip(steps, pairwise(levels), strict=True):
            word, share = "slower" if after > before else "faster", 100 * abs(after / before - 1)
            point = self.points[step]
            sentences.append(f"{share:.1f} % {word} from {date(point.created)} on ({point.file})")
        return sentences


Key = tuple[str, str, str, str, int, str]  # the fields of a series before its points


def add(folder: Path, result: Result) -> Path:
    """Keep a result as ``<created>-<hash>.json``; the same one again changes nothing.

    Raises ResultError: ``created`` is no time.
    """
    digest = hashlib.sha256(RESULT.text(result, indent=None).encode()).hexdigest()[:12]
    path = folder / f"{_moment(result.created, 'the result'):%Y%m%dT%H%M%SZ}-{digest}.json"
    if not path.exists():
        write_result(path, result)
    return path


def series(folder: Path, progress: Progress | None = None) -> list[Series]:
    """All series of a folder, ordered by device, name and setting.

    Documents without a device fingerprint are in no series: they may be of any device. Raises ResultError: no such
    folder, or a document that cannot be read; delete it.
    """
    if not folder.is_dir():
        raise ResultError(f"no folder {folder}: `saap bench --history {folder}` makes it")
    points: dict[Key, list[Point]] = {}
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise ResultError(f"{folder} holds no results: give a folder of `saap bench --history`")
    for done, path in enumerate(paths, 1):
        for key, point in _points(path, read_result(path)):
            points.setdefault(key, []).append(point)
        advance(progress, "reading results (files)", done, len(paths))
    return [Series(*(*key, sorted(points[key], key=lambda p: (p.created, p.file)))) for key in sorted(points)]


def change_points(values: Sequence[float]) -> list[int]:
    """Return the indices at which the level of a series changes; each is the first value of a new level.

    The logarithms are cut where squared distances from the levels are least, with a penalty of 3 log n per cut
    (modified BIC, Zhang and Siegmund 2007), in units of the noise, which is told from neighbours' differences. Outliers
    are drawn to 1.5 noises from the running median before, and a cut must then hold on the values themselves: a
    Mann-Whitney test of the levels beside it.

    Args:
        values: positive, in the order of time.
    """
    from scipy.ndimage import median_filter

    logs = np.log(np.asarray(values, dtype=np.float64))
    if len(logs) < 2 * LEAST_SEGMENT:
        return []
    noise = float(np.median(np.abs(np.diff(logs)))) * 1.4826 / np.sqrt(2)
    noise = max(noise, 1e-6)  # equal values have none, and still step
    running = median_filter(logs, size=2 * LEAST_SEGMENT - 3, mode="nearest")
    clipped = np.clip(logs, running - 1.5 * noise, running + 1.5 * noise) / noise
    return _holding(logs, best_cuts(clipped, 3 * np.log(len(logs))))


def best_cuts(values: Array, penalty: float) -> list[int]:
    """Return the cuts with the smallest sum of squared distances from the levels' means and a penalty per cut.

    Optimal partitioning (Jackson et al. 2005): the best cuts of a beginning are its last cut and the best cuts before.
    No level is shorter than ``LEAST_SEGMENT``.
    """
    count, centred = len(values), values - values.mean()
    sums, squares = (np.concatenate([[0.0], np.cumsum(each)]) for each in (centred, centred**2))
    least, last = np.full(count + 1, np.inf), np.zeros(count + 1, int)
    least[0] = -penalty
    for end in range(LEAST_SEGMENT, count + 1):
        starts = np.arange(end - LEAST_SEGMENT + 1)
        level = squares[end] - squares[starts] - (sums[end] - sums[starts]) ** 2 / (end - starts)
        total = least[starts] + penalty + level
        last[end] = total.argmin()
        least[end] = total[last[end]]
    cuts = [int(last[count])]
    while cuts[0]:
        cuts.insert(0, int(last[cuts[0]]))
    return cuts[1:]


def _holding(logs: Array, cuts: list[int]) -> list[int]:
    """Drop cuts whose levels do not differ, the weakest first, since its neighbours then grow."""
    from scipy.stats import mannwhitneyu

    alpha = min(0.01, 0.5 / len(logs))  # longer series offer more cuts to be wrong about
    while cuts:
        levels = np.split(logs, cuts)
        p = [float(mannwhitneyu(a, b).pvalue) for a, b in pairwise(levels)]
        weakest = int(np.argmax(p))
        if p[weakest] < alpha:
            break
        cuts = cuts[:weakest] + cuts[weakest + 1 :]
    return cuts


def _points(path: Path, result: Result) -> Iterator[tuple[Key, Point]]:
    """Each measurement that can be believed: the fields of its series, and its point."""
    created = _moment(result.created, str(path)).isoformat()
    device = str(result.device.get("board") or result.device.get("cpu_model") or "unknown device")
    for m in result.measurements:
        summary = summarize(decisive_values(m)[0]) if m.status != INVALID and m.samples else None
        if summary and result.device.get("fingerprint") is not None:
            key = str(result.device["fingerprint"]), device, m.name, m.test, m.n_threads, metric_of(m)
            yield key, Point(created, path.name, summary.median)


def _moment(created: str, source: str) -> datetime:
    try:
        return moment(created)
    except ValueError:
        raise ResultError(
            f"{source} was created at {created!r}, which is no ISO 8601 time: run the bench again"
        ) from None
