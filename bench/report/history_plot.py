"""The history of a setting as inline SVG, in the manner of :mod:`bench.report.plots`, and the page's words about it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from itertools import pairwise
from typing import Any

import numpy as np

from bench.report.history import Series, change_points
from bench.report.plots import GRID, INK, MUTED, drawing, series_colour

_MOST_POINTS = 256  # drawn; longer histories are binned, so that a page stays small
_UNITS = {"decode": "ms per token", "prefill": "ms per prompt"}


def history_plot(series: Series, changes: Sequence[int], salt: str) -> str:
    """Median milliseconds of every run over time, quartiles shaded, each level's median, a line per change.

    Args:
        series: at least one point.
        changes: indices into its points (:func:`bench.report.history.change_points`).
        salt: different for every plot of a page.
    """

    def draw(axes: Any) -> None:
        times = np.array([datetime.fromisoformat(point.created).timestamp() for point in series.points])
        days = times / 86400
        values = 1e3 * np.array([[p.median_s, p.q1_s, p.q3_s] for p in series.points])
        low, high = _limits(values[:, 0])
        _draw_runs(axes, days, np.clip(values, low, high))
        axes.set_ylim(low, high)
        edges = [0, *changes, len(days)]
        for first, last in pairwise(edges):
            level = np.median(values[first:last, 0])
            axes.plot([days[first], days[last - 1]], [level, level], color=INK, linewidth=1.4)
        for change in changes:
            axes.axvline(days[change], color=MUTED, linewidth=1.2, linestyle=(0, (2, 2)))
        _date_axis(axes, days)
        axes.set_ylabel(_UNITS[series.metric])
        axes.grid(axis="y", color=GRID, linewidth=0.8)

    return drawing(draw, 2.6, salt)


def changes_text(series: Series, changes: Sequence[int]) -> list[str]:
    """One sentence per change: when, and by how much the level moved."""
    values, edges = np.array(series.median_s), [0, *changes, len(series.points)]
    levels = [float(np.median(values[a:b])) for a, b in pairwise(edges)]
    told = []
    for change, (before, after) in zip(changes, pairwise(levels), strict=True):
        word = "slower" if after > before else "faster"
        share = 100 * abs(after / before - 1)
        point = series.points[change]
        told.append(f"{share:.1f} % {word} from {point.created[:16].replace('T', ' ')} on ({point.file})")
    return told


def history_panels(found: Sequence[Series]) -> list[dict[str, Any]]:
    """What the page shows per series: title, description, changes and drawing."""
    from markupsafe import Markup

    panels = []
    for index, series in enumerate(found):
        changes = change_points(series.median_s)
        panels.append(
            {
                "title": f"{series.name}, {series.setting}",
                "series": series,
                "runs": len(series.points),
                "changes": changes_text(series, changes),
                "svg": Markup(history_plot(series, changes, f"history{index}")),
            }
        )
    return panels


def _draw_runs(axes: Any, days: Any, values: Any) -> None:
    colour = series_colour(1)
    if len(days) > _MOST_POINTS:
        parts = np.array_split(np.arange(len(days)), _MOST_POINTS)
        days = np.array([np.median(days[part]) for part in parts])
        values = np.array([np.median(values[part], axis=0) for part in parts])
    axes.fill_between(days, values[:, 1], values[:, 2], color=colour, alpha=0.18, linewidth=0)
    axes.scatter(days, values[:, 0], s=10, color=colour, linewidths=0, clip_on=False)


def _limits(medians: Any) -> tuple[float, float]:
    """Of the y axis: single wild runs stand at its edge, so that they do not flatten the rest."""
    low, high = np.percentile(medians, [5, 95])
    room = max(high - low, 0.02 * high)
    return low - room, high + room


def _date_axis(axes: Any, days: Any) -> None:
    """Dates in the place of days since 1970; matplotlib's own would need mathematics, which is off for the names."""
    from matplotlib import dates

    untyped: Any = dates
    axes.xaxis.set_major_locator(untyped.AutoDateLocator(minticks=2, maxticks=4))
    axes.xaxis.set_major_formatter(untyped.DateFormatter("%Y-%m-%d" if np.ptp(days) > 3 else "%m-%d %H:%M"))
    if len(days) == 1:
        axes.set_xlim(days[0] - 1, days[0] + 1)
