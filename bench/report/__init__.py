"""The report: tables, verdicts, plots and one self-contained page.

``report(paths, out)`` writes the page of results that ``saap bench --json`` and ``saap eval --json`` wrote.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from saap.base.lazy import handed_out

if TYPE_CHECKING:
    from bench.report.page import report as report

__all__ = ["report"]
__getattr__ = handed_out(__name__, {"report": ".page"})
