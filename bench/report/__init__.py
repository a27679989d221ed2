"""The report: tables, verdicts, plots and one self-contained page.

``report(paths, out)`` writes the page of results that ``saap bench --json`` and ``saap eval --json`` wrote.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.report.page import report as report

__all__ = ["report"]


def __getattr__(name: str) -> object:
    if name in __all__:
        from bench.report import page

        return getattr(page, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
