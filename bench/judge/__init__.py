"""Judgement: comparisons of results and of qualities, recorded baselines and device tests.

``compare(old, new)`` takes two results of ``saap bench``, or the files that they were written to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.judge.comparison import Comparison as Comparison
    from bench.judge.comparison import compare as compare

__all__ = ["Comparison", "compare"]


def __getattr__(name: str) -> object:
    if name in __all__:
        from bench.judge import comparison

        return getattr(comparison, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
