"""What a plan kept, layer by structure, and at what price, as inline SVG in the manner of :mod:`bench.report.plots`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bench.judge.wording import as_dict, as_float, as_list, number
from bench.report.plots import GRID, INK, MUTED, SURFACE, Array, drawing, series_colour

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

ROWS = (("query_heads", "query heads"), ("kv_heads", "KV groups"), ("ffn", "FFN width"))
RARE_ROWS = (("conv", "conv channels"), ("delta", "delta heads"))  # of families that have such blocks
# A blue, an orange and a green, which every eye tells apart; no family has both of the last two.
BLOCKS = (
    ("attention", "attention", 5),
    ("ffn", "FFN", 2),
    ("conv", "convolution", 3),
    ("delta", "delta net", 3),
)
KEPT = 1  # series colour of what is kept; how much is told by how full it is
SCALES = {"weights": (1e6, "million weights"), "parameters": (1e6, "million parameters"), "bytes": (1e6, "MB"),
          "ms": (1.0, "millisecond")}  # fmt: skip
_WIDTH = 5.4  # inches


@dataclass(frozen=True)
class Kept:
    """Shares and prices of a plan."""

    shares: Array  # [rows, layers] what is kept of what the dense model had, 0 to 1; NaN where it had none
    totals: Array  # [rows] the same over all layers
    prices: Array | None = None  # [blocks, layers] nats per token; None where the plan has no prices
    rows: tuple[tuple[str, str], ...] = ROWS  # field and title


def kept_of(plan: Mapping[str, object]) -> Kept | None:
    """Shares and prices of a plan as ``saap run`` records it; None where it does not tell what the dense model had."""
    layers, dense = ([as_dict(layer) for layer in as_list(plan.get(key))] for key in ("layers", "dense_layers"))
    if not layers or len(layers) != len(dense):
        return None
    rows = (*ROWS, *(row for row in RARE_ROWS if any(layer.get(row[0]) for layer in dense)))
    counts = [[[as_float(layer.get(name)) or 0.0 for layer in of] for name, _ in rows] for of in (layers, dense)]
    left, had = np.array(counts)
    with np.errstate(invalid="ignore", divide="ignore"):
        shares, totals = (np.where(b > 0, a / b, np.nan) for a, b in ((left, had), (left.sum(1), had.sum(1))))
    if np.isnan(totals).all():
        return None
    return Kept(np.clip(shares, 0, 1), np.clip(totals, 0, 1), _prices(plan, len(layers)), rows)


def _prices(plan: Mapping[str, object], layers: int) -> Array | None:
    """[blocks, layers] nats; None unless every block of the record has a price."""
    found = np.zeros((len(BLOCKS), layers))
    kinds = [kind for kind, _, _ in BLOCKS]
    blocks = [as_dict(block) for block in as_list(as_dict(plan.get("reasons")).get("blocks"))]
    for block in blocks:
        layer, kind, price = block.get("layer"), block.get("kind"), as_float(block.get("price"))
        if price is None or not isinstance(layer, int) or not 0 <= layer < layers:
            return None
        if not isinstance(kind, str) or kind not in kinds:
            return None
        found[kinds.index(kind), layer] += price
    return found if blocks else None


def kept_plot(kept: Kept) -> Markup:
    """Rows of structures by columns of layers, filled by what is kept, and below bars of what that cost."""

    def draw(*panels: Axes) -> None:
        _draw_shares(panels[0], kept)
        if kept.prices is not None:
            _draw_prices(panels[1], kept.prices)
        panels[-1].set_xlabel("layer")
        panels[-1].locator_params(axis="x", integer=True)

    if kept.prices is None:
        return drawing(draw, 1.9, "kept", width=_WIDTH)
    return drawing(draw, 3.6, "kept", panels=2, width=_WIDTH, ratios=(3, 2.4))


def _draw_shares(axes: Axes, kept: Kept) -> None:
    from matplotlib.patches import Patch, Rectangle

    colour = series_colour(KEPT)
    for (row, layer), share in np.ndenumerate(kept.shares):
        if np.isnan(share):
            continue
        corner = (layer - 0.44, row - 0.42)
        axes.add_patch(Rectangle(corner, 0.88, 0.84, facecolor=SURFACE, edgecolor=GRID, linewidth=0.8))
        if share:
            axes.add_patch(Rectangle(corner, 0.88, 0.84, facecolor=colour, alpha=_fullness(share), linewidth=0))
    gone = np.argwhere(kept.shares == 0)
    axes.scatter(gone[:, 1], gone[:, 0], marker="x", s=16, linewidths=1.1, color=MUTED)
    for row, total in enumerate(kept.totals):
        told = "none there" if np.isnan(total) else f"{100 * total:.0f} %"
        axes.text(kept.shares.shape[1] - 0.2, row, told, va="center", color=INK)
    axes.set_yticks(range(len(kept.rows)), [title for _, title in kept.rows])
    axes.set_xlim(-0.7, kept.shares.shape[1] - 0.3)
    axes.set_ylim(len(kept.rows) - 0.5, -0.5)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    shades = {1.0: "all kept", 0.75: "75 %", 0.5: "50 %", 0.25: "25 %"}
    handles: list[Artist] = [Patch(facecolor=colour, alpha=_fullness(at), label=told) for at, told in shades.items()]
    handles.append(axes.scatter([], [], marker="x", s=16, linewidths=1.1, color=MUTED, label="all gone"))
    _key(axes, handles)


def _key(axes: Axes, handles: Sequence[Artist]) -> None:
    axes.legend(
        handles=handles, ncols=len(handles), loc="lower left", bbox_to_anchor=(0, 1), frameon=False, borderaxespad=0.2,
        labelcolor=INK, handlelength=1, handleheight=1, columnspacing=1,
    )  # fmt: skip


def _fullness(share: float) -> float:
    """Opacity: squared, since shares of a plan lie near 1 and have to be told apart there."""
    return 0.06 + 0.94 * share**2


def _draw_prices(axes: Axes, prices: Array) -> None:
    below = np.zeros(prices.shape[1])
    for (kind, name, colour), heights in zip(BLOCKS, prices, strict=True):
        if kind in dict(RARE_ROWS) and not heights.any():
            continue
        axes.bar(range(len(heights)), heights, width=0.74, bottom=below, color=series_colour(colour), label=name)
        below = below + heights
    axes.set_ylabel("price, nats")
    axes.set_ylim(bottom=0)
    axes.locator_params(axis="y", nbins=4)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    _key(axes, axes.get_legend_handles_labels()[0])


def shares_text(kept: Kept) -> str:
    """What is kept over all layers, in words, for who does not see the picture."""
    parts = zip(kept.rows, kept.totals, strict=True)
    return ", ".join(f"{title} {100 * total:.0f} %" for (_, title), total in parts if not np.isnan(total))


def threshold_text(plan: Mapping[str, object]) -> str | None:
    """The dearest step that was taken and the cheapest one that was left, in words; None where that is not known."""
    reasons = as_dict(plan.get("reasons"))
    taken, left = (as_float(reasons.get(key)) for key in ("dearest_taken", "cheapest_left"))
    if taken is None or not isinstance(unit := reasons.get("unit"), str) or unit not in SCALES:
        return None
    scale, name = SCALES[unit]
    text = f"The dearest step taken cost {number(taken * scale, 4)} nats per {name}"
    return f"{text}." if left is None else f"{text}, the cheapest one left would cost {number(left * scale, 4)}."
