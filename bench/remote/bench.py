"""``saap bench --on``: the bench, run on boards by itself, and its results brought here.

On the board the same :func:`bench.measure.run.bench` starts the same workers, so a result has the same form and its
numbers the
same meaning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench.measure.plan import Plan
from bench.measure.result import Measurement, Result, command_line
from bench.measure.store import result_from_dict
from bench.remote.board import Board, Say
from bench.remote.files import Packed, Shipment, pack, positions_of
from bench.remote.run import Answer, Errand, own_version, run_on, run_on_all, ways_to
from devices.common.progress import Progress
from devices.transport import printable

HERE_ONLY = ("root",)  # of a plan: it means this host


def bench_on(
    urls: Sequence[str],
    specs: Sequence[str],
    plan: Plan | None = None,
    *,
    wheels: Path | None = None,
    own: bool = True,
    progress: Progress | None = None,
    say: Say | None = None,
) -> list[Answer[Result]]:
    """Measure the specs on every board, all boards at once.

    Args:
        urls: ``ssh://user@host[:port]``, ``adb://[serial]``, ``labgrid://PLACE`` or ``local://``.
        specs: bundles and ``prepacked:`` bundles, as paths here.
        wheels: a folder of wheels for boards that reach no package index.
        own: install into a venv of its own there; False: use the packages of the board's Python.
        progress, say: called from several threads, one at a time.

    Returns:
        one answer per board, in their order. An interrupt cleans the boards up before it goes on.

    Raises:
        BoardError, PeerError, BundleError, DecoderError: the user's input, before a board is asked.
    """
    plan = plan or Plan()
    plan.check()
    ways = ways_to(urls)
    shipment = pack(specs, positions_of(plan), wheels, own)
    return run_on_all(ways, shipment, _errand(shipment, plan), progress, say)


def measure_on(board: Board, shipment: Shipment, plan: Plan, progress: Progress | None = None) -> Result:
    """Measure on one board; it is left clean whatever happens.

    Raises:
        BoardError: naming the board and what to do.
    """
    return run_on(board, shipment, _errand(shipment, plan), progress)


def _errand(shipment: Shipment, plan: Plan) -> Errand[Result]:
    kept = {name: value for name, value in asdict(plan).items() if name not in HERE_ONLY}

    def read(board: str, document: Any) -> Result:
        return _result(board, document, shipment.packed)

    return Errand({"kind": "bench", "plan": kept, "names": None}, positions_of(plan), read)


def _result(board: str, document: Any, packed: Sequence[Packed]) -> Result:
    """Whole, of what was asked for, and with this side's names for it."""
    result = result_from_dict(document)
    rounds, left = divmod(len(result.measurements), len(packed))
    if left or not rounds:
        raise ValueError("measurements are missing")
    pairs = list(zip(result.measurements, [*packed] * rounds, strict=True))
    if any(m.bundle_hash != p.manifest.content_hash for m, p in pairs):
        raise ValueError("another bundle")
    return replace(
        result,
        measurements=[_readable(m, p.spec) for m, p in pairs],
        command=command_line(),
        versions={**own_version(), **result.versions},
        settings={**result.settings, "on": board},
    )


def _readable(m: Measurement, spec: str) -> Measurement:
    """Its texts are printed here, and come from another machine: a worker there may have coloured its last lines."""
    return replace(
        m, spec=spec, name=printable(m.name), reasons=[*map(printable, m.reasons)], stderr=[*map(printable, m.stderr)]
    )
