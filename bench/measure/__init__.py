"""One measurement: what is planned and timed, what went on around it, and whether it may be believed.

``measure`` runs every spec in fresh processes, interleaved; ``result`` is the document that holds the raw samples.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from saap.base.lazy import handed_out

if TYPE_CHECKING:
    from bench.measure.options import BenchOptions as BenchOptions
    from bench.measure.result import Result as Result
    from bench.measure.run import measure as measure

__all__ = ["BenchOptions", "Result", "measure"]
__getattr__ = handed_out(__name__, {"BenchOptions": ".options", "Result": ".result", "measure": ".run"})
