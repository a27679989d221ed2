"""The rows and cells of this study: what is compared, what is asked for next, and what a timing says."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from studies.common import Cell
from studies.pruning.cells import STRONGEST_FIRST, Variant, slug

HERE = Path(__file__).resolve().parent
BUNDLES = HERE.parents[1] / "out" / "pruning-speed"
COSTS = HERE / "cells" / "costs-t1.json"
SPEEDUPS, PAIRS, THREADS = (1.25, 1.5), 24, 1
CLOSE, TRIES = 0.02, 3
OWN_COMPENSATION = {"saap": "refit", "flap": "bias"}  # of the others: none


@dataclass(frozen=True)
class Setup:
    """Where things are, and what is measured.

    Attributes:
        model_dir: the dense model.
        texts: calibration by method and seed, and the test.
        costs: the table of layer costs.
        cells, bundles: folders.
        chunks: of the test, 256 tokens each.
        pairs: interleaved runs of each bundle and the dense one.
        elsewhere: whether a machine that is not the table's may measure speed.
    """

    model_dir: Path
    texts: Any
    costs: Path = COSTS
    cells: Path = HERE / "cells" / "host1"
    bundles: Path = BUNDLES
    chunks: int = 40
    pairs: int = PAIRS
    elsewhere: bool = False

    def cell(self, name: str) -> Cell | None:
        """What is known of a bundle."""
        path = self.cells / f"{name}.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def write(self, name: str, cell: Cell) -> None:
        """Write beside and rename."""
        from saap.system.files import write_json

        write_json(self.cells / f"{name}.json", cell)

    def row(self, variant: Variant) -> list[Cell]:
        """The cells of a row, in the order of their attempts."""
        found = (self.cell(attempt_name(variant, attempt)) for attempt in range(TRIES))
        return [cell for cell in found if cell]


def row_variants(published: bool = False) -> list[Variant]:
    """SAAP with and without whole blocks, and every baseline on our text with its own compensation and the refit.

    Args:
        published: each baseline on its authors' text and layers too, with its own compensation.
    """
    rows: list[Variant] = [{"method": "saap", "compensate": "refit"}]
    rows.append({**rows[0], "keep": "blocks"})
    for method in STRONGEST_FIRST:
        kinds = (OWN_COMPENSATION.get(method, "none"), "refit")
        rows += [{"method": method, "text": "alike", "compensate": kind} for kind in kinds]
    if published:
        rows += [
            {"method": method, "text": "published", "compensate": OWN_COMPENSATION.get(method, "none")}
            for method in STRONGEST_FIRST
        ]
    return rows


def attempt_name(variant: Variant, attempt: int) -> str:
    """The name of a row's cell and of its bundle."""
    return slug({**variant, "attempt": attempt})


def next_asked(cells: list[Cell], target: float) -> float | None:
    """The speed-up to ask the table for next.

    None where the last bundle is still to be timed, could not be made, is as fast as it should be, or was the last try.
    """
    if not cells:
        return target
    measured = (cells[-1].get("speed") or {}).get("speedup")
    if measured is None or len(cells) >= TRIES or abs(measured / target - 1) <= CLOSE:
        return None
    return round(cells[-1]["asked"] * target / measured, 4)


def closest(cells: list[Cell], target: float) -> Cell | None:
    """The cell of a row whose measured speed-up is the nearest; None where none is measured."""
    timed = [cell for cell in cells if cell.get("speed")]
    return min(timed, key=lambda cell: abs(math.log(cell["speed"]["speedup"] / target)), default=None)


def speed_of(live: Any) -> dict[str, Any] | str:
    """Median speed-up over the pairs with its 95 % bootstrap interval, and the bench's own; or why there is none."""
    from bench.judge.comparison import decisive_values
    from bench.judge.verdict import NOT_COMPARABLE

    (row,), result = live.comparison.rows, live.results[-1]
    if row.verdict == NOT_COMPARABLE:
        return row.reason or row.verdict
    dense, slim = result.measurements
    seconds = [np.array(side) for side in decisive_values(dense, slim)]
    if len(seconds[0]) != len(seconds[1]):
        return f"{len(seconds[0])} and {len(seconds[1])} repetitions are no pairs"
    ratios = seconds[0] / seconds[1]
    picks = np.random.default_rng(0).integers(len(ratios), size=(2000, len(ratios)))
    low, high = np.percentile(np.median(ratios[picks], axis=1), [2.5, 97.5])
    return {
        "speedup": float(np.median(ratios)),
        "low": float(low),
        "high": float(high),
        "pairs": len(ratios),
        "test": row.setting,
        "threads": row.n_threads,
        "bench": {"speedup": row.speedup, "low": 1 / row.high, "high": 1 / row.low},
        "status": [m.status for m in result.measurements],
        "reasons": [m.reasons for m in result.measurements],
        "ms": [[round(1e3 * s, 4) for s in side.tolist()] for side in seconds],
        "dense": dense.bundle_hash,
        "device": {key: result.device.get(key) for key in ("board", "cpu_model", "fingerprint", "onnxruntime")},
        "created": result.created,
    }


def read_rows(setup: Setup) -> list[list[Cell]]:
    """All rows that have cells, each in the order of its attempts."""
    rows: dict[str, list[Cell]] = {}
    for path in sorted(setup.cells.glob("*.json")):
        cell = json.loads(path.read_text())
        if cell["variant"]:
            rows.setdefault(slug(cell["variant"]), []).append(cell)
    return [sorted(cells, key=lambda cell: cell["attempt"]) for cells in rows.values()]
