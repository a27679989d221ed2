"""Does a pruned model run as fast as its plan said?"""

from __future__ import annotations

from collections.abc import Mapping

from bench.judge.comparison import DECODE, compare_within
from bench.judge.wording import as_dict, as_float, threads
from bench.measure.result import Result
from export.engine.table import ONNXRUNTIME


def planned_speed(plan: Mapping[str, object], result: Result) -> str | None:
    """Put the plan's speed-up beside the measured one; None where the plan has no times, or others than were measured.

    Args:
        plan: as ``saap.json`` and ``saap run`` record it.
        result: a bench of two bundles, the dense one first; other runtimes may stand beside them.
    """
    planned, counted = as_float(as_dict(plan.get("planned")).get("speedup")), as_dict(plan.get("costs")).get("threads")
    names = list(dict.fromkeys(m.name for m in result.measurements if m.kind == "onnx"))
    engine = as_dict(plan.get("costs")).get("engine", ONNXRUNTIME)
    if planned is None or planned <= 0 or len(names) != 2 or engine != ONNXRUNTIME:
        return None
    base, other = names
    for row in compare_within(result, base, other).rows:
        if row.what == DECODE and row.n_threads == counted and row.ratio and row.low and row.high:
            measured = 1 / row.ratio
            interval = f"95 %: {1 / row.high:.3f} to {1 / row.low:.3f}"
            off = f"{measured / planned - 1:+.1%}"
            return f"planned {planned:.3f}x with {threads(row.n_threads)}, measured {measured:.3f}x ({interval}): {off}"
    return None
