"""Where the cells of tuning are, and what a cell is when it names nothing."""

from __future__ import annotations

from pathlib import Path

from studies.pruning.cells import Variant

CELLS = Path(__file__).resolve().parent / "cells"
DEFAULTS: Variant = {"ratio": 0.2, "tokens": 400_000, "fold": "scale", "teacher": 0.5}
