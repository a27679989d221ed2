"""The cells of the pruning studies: their settings, their names, and the seeds of a row."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from studies.common import METHODS, Cell

SEQUENCES, LENGTH, HELD = 64, 256, 40
SEEDS = (0, 1, 2)
SCREEN, CONFIRM = 40, 160  # chunks of the test on which rows are screened, and confirmed

STRONGEST_FIRST = (
    "flap", "param_second", "param_first", "wanda_sp", "param_mix", "vector", "shortgpt", "magnitude", "random",
)  # fmt: skip
Variant = dict[str, Any]  # options of PruneOptions, with fusion's and adaptive's under their own names


def slug(variant: Variant) -> str:
    """A file name for a cell."""
    parts = [f"{k}={','.join(map(str, v)) if isinstance(v, list) else v}" for k, v in sorted(variant.items())]
    return "_".join(parts).replace("/", "-") or "dense"


def value_of(text: str) -> Any:
    """A setting as it was typed: JSON, or a word."""
    try:
        return json.loads(text.lower())
    except json.JSONDecodeError:
        return text


@dataclass
class Row:
    """The cells of one variant by their seed."""

    variant: Variant
    cells: dict[int, Cell] = field(default_factory=dict)

    def values(self, text: str, seeds: Iterable[int]) -> list[float] | None:
        """NLL per seed, nats per token; None where one is missing."""
        found = [self.cells[s]["nll"].get(text) if s in self.cells else None for s in seeds]
        known = [value for value in found if value is not None]
        return known if known and len(known) == len(found) else None

    def mean(self, text: str, seeds: Iterable[int]) -> float | None:
        """Mean NLL over the seeds."""
        values = self.values(text, seeds)
        return None if values is None else statistics.fmean(values)

    def removed(self, seeds: Iterable[int]) -> float:
        """Mean share of the layers' weights that went."""
        return statistics.fmean(self.cells[s]["achieved"]["ratio"] for s in seeds)

    def words(self) -> str:
        """Method and settings, to read."""
        rest = {k: v for k, v in self.variant.items() if k not in ("ratio", "method")}
        return ", ".join([METHODS[self.variant["method"]], *(f"`{k}={v}`" for k, v in sorted(rest.items()))])

    def __str__(self) -> str:
        return slug({k: v for k, v in self.variant.items() if k != "ratio"})


def rows_of(*folders: Path) -> list[Row]:
    """The cells of some folders by variant; of two cells of one name the first folder's counts."""
    rows: dict[str, Row] = {}
    for folder in folders:
        for path in sorted(folder.glob("*.json")):
            cell = json.loads(path.read_text())
            variant = {k: v for k, v in cell["variant"].items() if k != "seed"}
            rows.setdefault(slug(variant), Row(variant)).cells.setdefault(cell["variant"]["seed"], cell)
    return list(rows.values())
