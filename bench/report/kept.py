"""Shares of a plan, layer by structure, as inline SVG in the manner of :mod:`bench.report.plots`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bench.judge.wording import as_dict, as_float, as_list
from bench.report.plots import GRID, INK, MUTED, SURFACE, Array, drawing, series_colour

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

ROWS = (("query_heads", "query heads"), ("kv_heads", "KV groups"), ("ffn", "FFN width"))
RARE_ROWS = (("conv", "conv channels"), ("delta", "delta heads"))  # of families that have such blocks
KEPT = 1  # series colour of what is kept; how much is told by how full it is
_WIDTH = 5.4  # inches


@dataclass(frozen=True)
class Kept:
    """Shares of the dense model that a plan keeps."""

    shares: Array  # [rows, layers] what is kept of what the dense model had, 0 to 1; NaN where it had none
    totals: Array  # [rows] the same over all layers
    rows: tuple[tuple[str, str], ...] = ROWS  # field and title


def kept_of(plan: Mapping[str, object]) -> Kept | None:
    """Read the shares of a plan as ``saap run`` records it; None where the record lacks the dense model's sizes."""
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
    return Kept(np.clip(shares, 0, 1), np.clip(totals, 0, 1), rows)


def kept_plot(kept: Kept) -> Markup:
    """Rows of structures by columns of layers, filled by the kept share."""
    return drawing(lambda axes: _draw_shares(axes, kept), 1.9, "kept", width=_WIDTH)


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
        share = "none there" if np.isnan(total) else f"{100 * total:.0f} %"
        axes.text(kept.shares.shape[1] - 0.2, row, share, va="center", color=INK)
    axes.set_yticks(range(len(kept.rows)), [title for _, title in kept.rows])
    axes.set_xlim(-0.7, kept.shares.shape[1] - 0.3)
    axes.set_ylim(len(kept.rows) - 0.5, -0.5)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    shades = {1.0: "all kept", 0.75: "75 %", 0.5: "50 %", 0.25: "25 %"}
    handles: list[Artist] = [Patch(facecolor=colour, alpha=_fullness(at), label=share) for at, share in shades.items()]
    handles.append(axes.scatter([], [], marker="x", s=16, linewidths=1.1, color=MUTED, label="all gone"))
    axes.set_xlabel("layer")
    axes.locator_params(axis="x", integer=True)
    axes.legend(
        handles=handles, ncols=len(handles), loc="lower left", bbox_to_anchor=(0, 1), frameon=False, borderaxespad=0.2,
        labelcolor=INK, handlelength=1, handleheight=1, columnspacing=1,
    )  # fmt: skip


def _fullness(share: float) -> float:
    """Opacity: squared, since shares of a plan lie near 1 and have to be told apart there."""
    return 0.06 + 0.94 * share**2


def shares_text(kept: Kept) -> str:
    """Say the shares that are kept over all layers in words, for who does not see the picture."""
    parts = zip(kept.rows, kept.totals, strict=True)
    return ", ".join(f"{title} {100 * total:.0f} %" for (_, title), total in parts if not np.isnan(total))
