"""Measuring on boards and farms: the bench sends itself there, runs detached, and brings the result back.

``target`` gives this host or a board behind one interface.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.remote.options import BoardOptions as BoardOptions
    from bench.remote.target import Target as Target
    from bench.remote.target import bench_on as bench_on

__all__ = ["BoardOptions", "Target", "bench_on"]
_MODULES = {
    "BoardOptions": "bench.remote.options",
    "Target": "bench.remote.target",
    "bench_on": "bench.remote.target",
}


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
