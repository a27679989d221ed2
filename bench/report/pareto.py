"""Quality against price: which models no other model here beats at both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.report.plots import GRID, INK, MUTED, drawing, label, series_colour


@dataclass(frozen=True)
class Point:
    """A model: its price (less is better) and its quality."""

    name: str
    price: float
    quality: float


def pareto_front(points: Sequence[Point], less: bool) -> list[Point]:
    """The points that no other equals or beats in both while beating in one, from the cheapest up.

    Args:
        points: any.
        less: whether less quality value is better, as for a perplexity.
    """
    sign = 1 if less else -1
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.price, sign * p.quality)):
        if not front or sign * point.quality < sign * front[-1].quality:
            front.append(point)
    return front


def pareto_plot(points: Sequence[Point], price: str, quality: str, less: bool) -> str:
    """A dot per model with its name, filled on the front, and the front as steps."""
    front = pareto_front(points, less)

    def draw(axes: Any) -> None:
        for index, point in enumerate(points):
            fill = series_colour(index) if point in front else "none"
            axes.scatter(
                [point.price], [point.quality], s=44, facecolors=fill, edgecolors=series_colour(index), zorder=3
            )
        steps = [*front, Point("", max(point.price for point in points), front[-1].quality)]
        axes.step(
            [p.price for p in steps], [p.quality for p in steps], where="post", color=MUTED, linewidth=1, zorder=2
        )
        axes.margins(x=0.12, y=0.22)
        _name(axes, points)
        axes.set_xlabel(price)
        axes.set_ylabel(quality)
        axes.grid(color=GRID, linewidth=0.8)

    return drawing(draw, 3.2, f"pareto {price}")


def _name(axes: Any, points: Sequence[Point]) -> None:
    """Names beside the dots, on the side where there is room; neighbours go above and below in turn."""
    low, high = axes.get_xlim()
    order = sorted(points, key=lambda p: (p.quality, p.price))
    for turn, point in enumerate(order):
        right = point.price < (low + high) / 2
        axes.annotate(
            label(point.name, 20), (point.price, point.quality), xytext=(7 if right else -7, 6 if turn % 2 else -6),
            textcoords="offset points", ha="left" if right else "right", va="bottom" if turn % 2 else "top",
            color=INK, fontsize=9,
        )  # fmt: skip
