"""The plot of the report as inline SVG: drawn by matplotlib, coloured by the page.

Colours are placeholders that become CSS variables, and text stays text in the page's font, so one drawing serves the
light and the dark page, is small, and can be read by a screen reader.
"""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bench.measure.result import INVALID, Measurement
from bench.measure.statistics import summarize
from saap.base.files import cache_directory

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes

SERIES = 6  # colours that the page has, --s1 to --s6
INK, MUTED, GRID = "#010203", "#010204", "#010205"
_COLOURS = {INK: "--ink", MUTED: "--muted", GRID: "--line"} | {
    f"#0a0b{index:02x}": f"--s{index}" for index in range(1, SERIES + 1)
}
_WIDTH = 4.4  # inches at 100 px: narrow, so that letters stay legible on a phone


@dataclass(frozen=True)
class Figure:
    """A plot of the page."""

    title: str
    text: str  # its caption
    label: str  # what it shows, in words, for who does not see it
    svg: Markup


def series_colour(index: int) -> str:
    """Return the placeholder of the ``index``-th series colour, from 0; they repeat after ``SERIES``."""
    return f"#0a0b{index % SERIES + 1:02x}"


def decode_rates(measurements: Sequence[Measurement], ceilings: Sequence[float | None], names: Sequence[str]) -> Markup:
    """Tokens per second: one row per measurement, a dot per repetition, the median and the bandwidth ceiling."""

    def draw(axes: Axes) -> None:
        for row, (measurement, ceiling) in enumerate(zip(measurements, ceilings, strict=True)):
            rates = measurement.decode_ts
            # Dots are spread in the order they were measured, so drift within the run shows as a slope.
            spread = np.linspace(-0.16, 0.16, len(rates)) if len(rates) > 1 else np.zeros(len(rates))
            fill = "none" if measurement.status == INVALID else series_colour(row)
            axes.scatter(rates, row + spread, s=22, facecolors=fill, edgecolors=series_colour(row), alpha=0.8)
            numbers = ""
            if centre := summarize(rates):
                axes.plot([centre.median] * 2, [row - 0.26, row + 0.26], color=INK, linewidth=1.6)
                numbers = f"{centre.median:.1f}"
            if ceiling is not None:
                axes.plot([ceiling] * 2, [row - 0.26, row + 0.26], color=MUTED, linewidth=1.2, linestyle=(0, (2, 2)))
                numbers += f", ceiling {ceiling:.0f}"
            # Name and numbers have a line of their own, where no dot can meet them.
            across = axes.get_yaxis_transform()
            axes.text(0, row - 0.33, label(names[row]), va="bottom", color=INK, transform=across)
            axes.text(1, row - 0.33, numbers, va="bottom", ha="right", color=INK, transform=across)
        axes.set_yticks([])
        axes.set_ylim(len(names) - 0.5, -0.75)
        axes.set_xlim(left=0)
        axes.set_xlabel("generated tokens per second")
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x", color=GRID, linewidth=0.8)

    return drawing(draw, 0.75 * len(names) + 0.7)


def label(name: str, most: int = 34) -> str:
    """Make a name fit a plot: printable, and shortened in the middle, since both ends tell models apart."""
    text = "".join(character if character.isprintable() else "?" for character in name)
    return text if len(text) <= most else f"{text[: most // 2 - 1]}…{text[-(most // 2) :]}"


def drawing(draw: Callable[[Axes], None], height: float) -> Markup:
    """Return a drawing of so many inches as SVG in the page's colours, with every name escaped by matplotlib."""
    # matplotlib keeps a list of fonts: in our cache, not in one of its own.
    os.environ.setdefault("MPLCONFIGDIR", str(cache_directory() / "matplotlib"))
    import matplotlib as mpl
    from markupsafe import Markup
    from matplotlib.figure import Figure as Canvas

    style = mpl.rc_context({
        "svg.fonttype": "none", "svg.hashsalt": "saap", "text.parse_math": False,  # a $ in a model's name is a $
        "font.size": 10, "axes.edgecolor": MUTED, "axes.labelcolor": MUTED, "xtick.color": MUTED,
        "ytick.color": MUTED, "xtick.labelcolor": INK, "ytick.labelcolor": INK, "axes.spines.top": False,
        "axes.spines.right": False, "axes.axisbelow": True,
    })  # fmt: skip
    with style, warnings.catch_warnings():
        # Letters that matplotlib's own font lacks are drawn by the page's.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Canvas(figsize=(_WIDTH, height), layout="constrained")
        draw(figure.subplots())
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return Markup(_for_the_page(text.getvalue()))


def _for_the_page(svg: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r"<[^>]*>", _restyled, svg)  # not between tags, where a model may be called like a style
    return svg.replace("<svg ", '<svg aria-hidden="true" ', 1)


def _restyled(tag: re.Match[str]) -> str:
    """Give a tag the page's colours, without matplotlib's list of fonts, which would win over the page's family."""
    text = tag[0]
    for placeholder, variable in _COLOURS.items():
        text = text.replace(placeholder, f"var({variable})")
    text = re.sub(r"font: (?:[\w ]*?)([\d.]+px) [^;\"]*", r"font-size: \1", text)
    return re.sub(r"font-family: [^;\"]*;?", "", text)
