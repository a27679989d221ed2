"""``saap devices costs --on``: probe stacks that were written here, timed on a board."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.costs.fit import AttentionCost, FfnCost
from bench.costs.measure import KIND, ROUNDS, SECONDS, check_depth, described
from bench.costs.worker import TURN
from bench.measure.dataclass_types import built
from bench.measure.result import command_line
from bench.remote.board import Say
from bench.remote.files import pack
from bench.remote.run import Errand, own_version, run_on_all, ways_to
from devices.common.files import without_checksum
from devices.common.progress import Progress
from export.bundle.manifest import BundleManifest, read_manifest


def costs_on(
    url: str,
    bundles: Sequence[Path],
    threads: Sequence[int] | None,
    *,
    depth: int,
    rounds: int = ROUNDS,
    seconds: float = SECONDS,
    wheels: Path | None = None,
    own: bool = True,
    progress: Progress | None = None,
    say: Say | None = None,
) -> dict[str, Any]:
    """Time probe stacks on a board; the document that :func:`bench.costs.measure.measure_costs` returned there.

    Args:
        url: as for :func:`bench.remote.bench.bench_on`.
        bundles: the stacks, the base first.
        threads: counts, each measured by itself; None is the number of the board's physical cores.
        depth, rounds, seconds: as for :func:`bench.costs.measure.measure_costs`.
        wheels, own: as for :func:`bench.remote.bench.bench_on`.

    Raises:
        BoardError: naming the board and what to do.
        CostsError, BundleError: the user's input, before the board is asked.
    """
    ways = ways_to([url])
    check_depth(read_manifest(bundles[0]), depth)
    shipment = pack([str(path) for path in bundles], depth + TURN, wheels, own)
    counts = None if threads is None else list(threads)
    job = {"kind": "costs", "threads": counts, "depth": depth, "rounds": rounds, "seconds": seconds}

    def read(board: str, document: Any) -> dict[str, Any]:
        return _checked(board, document, shipment.packed[0].manifest, counts)

    (answer,) = run_on_all(ways, shipment, Errand(job, None, read), progress, say)
    if answer.error is not None:
        raise answer.error
    assert answer.result is not None
    return answer.result


def _checked(board: str, document: Any, base: BundleManifest, threads: Sequence[int] | None) -> dict[str, Any]:
    """Costs of the model that was sent, as numbers."""
    found = without_checksum(document)
    if found["kind"] != KIND or found["model"] != described(base):
        raise ValueError("costs of another model")
    if threads is not None and [table["n_threads"] for table in found["threads"]] != list(threads):
        raise ValueError("other thread counts")
    for table in found["threads"]:
        for cost in table["attention"]:
            built(AttentionCost, cost)
        for cost in table["ffn"]:
            built(FfnCost, cost)
        if not all(isinstance(table[name], int | float) for name in ("step_ms", "constant_ms")):
            raise TypeError("a step without a time")
        if not isinstance(table["n_threads"], int) or not isinstance(table["node_ms"], int | float | None):
            raise TypeError("another table")
    return {**found, "command": command_line(), "versions": {**own_version(), **found["versions"]}, "on": board}
