"""Does a pruned model run as fast as its plan said, and how fast are its integers alone?"""

from __future__ import annotations

import re
from collections.abc import Mapping

from bench.judge.comparison import DECODE, compare_within
from bench.judge.wording import as_dict, as_float, threads
from bench.measure.result import Result
from export.engine.table import ONNXRUNTIME


def planned_speed(plan: Mapping[str, object], result: Result) -> str | None:
    """Put the plan's speed-up beside the measured one; None where the plan has no times, or others than were measured.

    Args:
        plan: as ``saap.json`` and ``saap run`` record it.
        result: a bench of two bundles, the dense one first; the dense one in the planned group size may stand beside
            them, and other runtimes.
    """
    planned, counted = as_float(as_dict(plan.get("planned")).get("speedup")), as_dict(plan.get("costs")).get("threads")
    names, plain = _bundles(result)
    engine = as_dict(plan.get("costs")).get("engine", ONNXRUNTIME)
    if planned is None or planned <= 0 or len(names) != 2 or engine != ONNXRUNTIME:
        return None
    base, other = plain or names[0], names[1]
    for row in compare_within(result, base, other).rows:
        if row.what == DECODE and row.n_threads == counted and row.ratio and row.low and row.high:
            measured = 1 / row.ratio
            interval = f"95 %: {1 / row.high:.3f} to {1 / row.low:.3f}"
            off = f"{measured / planned - 1:+.1%}"
            return f"planned {planned:.3f}x with {threads(row.n_threads)}, measured {measured:.3f}x ({interval}): {off}"
    return None


def integers_alone(result: Result) -> str | None:
    """Say what another group size gives without pruning, and what the slim bundle is beside that; None: none is faster.

    ``result``: a bench of a dense and a slim bundle, and of the dense one in the default group size, ``DENSE-gN``.
    """
    names, plain = _bundles(result)
    if plain is None or len(names) != 2:
        return None
    rates = {}
    for name in names:
        row = next(iter(compare_within(result, plain, name).rows), None)
        if row is None or not row.speedup or not row.low or not row.high:
            return None
        rates[name] = f"{row.speedup:.2f}x (95 %: {1 / row.high:.2f} to {1 / row.low:.2f})"
    dense, slim = names
    return f"as fast as {plain}: {dense}, by its integers alone, {rates[dense]}; {slim} {rates[slim]}"


def _bundles(result: Result) -> tuple[list[str], str | None]:
    """Return the names of the bundles, and apart from them that of the dense one in the default group size."""
    names = list(dict.fromkeys(m.name for m in result.measurements if m.kind == "onnx"))
    plain = next((name for name in names[1:] if re.fullmatch(rf"{re.escape(names[0])}-g\d+", name)), None)
    return [name for name in names if name != plain], plain
