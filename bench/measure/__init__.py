"""One measurement: what is planned and timed, what went on around it, and whether it may be believed.

``measure`` runs every spec in fresh processes, interleaved; ``result`` is the document that holds the raw samples.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.measure.options import BenchOptions as BenchOptions
    from bench.measure.result import Result as Result
    from bench.measure.run import measure as measure

__all__ = ["BenchOptions", "Result", "measure"]
_MODULES = {
    "BenchOptions": "bench.measure.options",
    "Result": "bench.measure.result",
    "measure": "bench.measure.run",
}


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
