"""Judgement: comparisons of results and of qualities, recorded baselines and device tests.

``compare(old, new)`` takes two results of ``saap bench``, or the files that they were written to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from saap.base.lazy import handed_out

if TYPE_CHECKING:
    from bench.judge.comparison import Comparison as Comparison
    from bench.judge.comparison import compare as compare

__all__ = ["Comparison", "compare"]
__getattr__ = handed_out(__name__, {"Comparison": ".comparison", "compare": ".comparison"})
