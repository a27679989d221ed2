"""Here or on a board: the same bench, timing of layer costs and facts, wherever they run.

On a board the same :func:`bench.measure.run.measure` starts the same workers, so a result has the same form and its
numbers the same meaning. A result is brought here; a board is left clean whatever happens.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from msgspec import convert

from bench.costs.measure import COSTS, Costs, check_depth, described, measure_costs
from bench.costs.options import CostsOptions
from bench.costs.worker import TURN
from bench.measure.options import BenchOptions
from bench.measure.result import RESULT, Result, command_line, package_versions
from bench.measure.run import measure
from bench.remote.board import Board, Say
from bench.remote.facts import Facts, probe_facts
from bench.remote.files import Packed, Shipment, pack
from bench.remote.options import BoardOptions
from bench.remote.run import Task, open_board, run_at, run_on
from devices.transport import printable
from export.bundle.manifest import BundleManifest, read_manifest
from saap.base.progress import Progress

HERE_ONLY = ("root",)  # of the options: it means this host


@dataclass(frozen=True)
class Target:
    """A device that measures: the board at ``url``, or this host where that is None.

    ``say`` is told what a person should know, a line each. BoardError names the board and what to do.
    """

    url: str | None = None
    board_options: BoardOptions | None = None
    say: Say | None = None

    def bench(
        self,
        specs: Sequence[str],
        options: BenchOptions,
        *,
        names: Sequence[str] | None = None,
        progress: Progress | None = None,
    ) -> Result:
        """Measure as :func:`bench.measure.run.measure` does."""
        if self.url is None:
            return measure(specs, options, names=names, progress=progress)
        options.check()
        shipment = pack(specs, options.positions, self.board_options)
        return run_at(self.url, shipment, _bench_task(shipment, options, names), progress, self.say)

    def costs(self, stacks: Sequence[Path], options: CostsOptions, *, progress: Progress | None = None) -> Costs:
        """Time as :func:`bench.costs.measure.measure_costs` does; by default with the device's physical cores."""
        if self.url is None:
            return measure_costs(stacks, options, progress=progress)
        base = read_manifest(stacks[0])
        check_depth(base, options.depth)
        shipment = pack([str(path) for path in stacks], options.depth + TURN, self.board_options)

        def read(board: str, document: object) -> Costs:
            return _costs(board, document, base, options.threads)

        task = Task({"kind": "costs", "options": asdict(options)}, None, read)
        return run_at(self.url, shipment, task, progress, self.say)

    def probe(self, bandwidth: bool, *, progress: Progress | None = None) -> Facts:
        """Describe the device as :func:`bench.remote.facts.probe_facts` does."""
        if self.url is None:
            return probe_facts(bandwidth)
        shipment = pack([], 0, self.board_options)
        task = Task({"kind": "probe", "options": {"bandwidth": bandwidth}}, None, lambda _, raw: convert(raw, Facts))
        return run_at(self.url, shipment, task, progress, self.say)


def target(url: str | None, options: BoardOptions | None = None, say: Say | None = None) -> Target:
    """Return this host, or a board under its full name.

    Args:
        url: None for this host, else ``ssh://user@host[:port]``, ``adb://[serial]``, ``labgrid://PLACE`` or
            ``local://``.

    Raises:
        BoardError: it names no board, what it needs here is not installed, or the place of a farm is not acquired.
    """
    if url is None:
        return Target()
    with closing(open_board(url)) as transport:
        return Target(transport.name, options, say)


def measure_on(board: Board, shipment: Shipment, options: BenchOptions, progress: Progress | None = None) -> Result:
    """Measure on one board that is connected already. Raises BoardError: naming the board and what to do."""
    return run_on(board, shipment, _bench_task(shipment, options), progress)


def _bench_task(shipment: Shipment, options: BenchOptions, names: Sequence[str] | None = None) -> Task[Result]:
    kept = {name: value for name, value in asdict(options).items() if name not in HERE_ONLY}

    def read(board: str, document: object) -> Result:
        return _result(board, document, shipment.packed)

    return Task({"kind": "bench", "options": kept, "names": names}, options.positions, read)


def _result(board: str, document: object, packed: Sequence[Packed]) -> Result:
    """Read and check a board's result, under this side's names."""
    result = RESULT.convert(document)
    rounds, left = divmod(len(result.measurements), len(packed))
    if left or not rounds:
        raise ValueError("measurements are missing")
    pairs = list(zip(result.measurements, [*packed] * rounds, strict=True))
    if any(m.bundle_hash != p.manifest.content_hash for m, p in pairs):
        raise ValueError("another bundle")
    # A board's texts are made safe to print: a worker there may have coloured them.
    measurements = [
        replace(
            m, spec=p.spec, name=printable(m.name), reasons=[*map(printable, m.reasons)],
            stderr=[*map(printable, m.stderr)],
        )
        for m, p in pairs
    ]  # fmt: skip
    return replace(
        result,
        measurements=measurements,
        command=command_line(),
        versions={**package_versions("saap"), **result.versions},
        settings={**result.settings, "on": board},
    )


def _costs(board: str, document: object, base: BundleManifest, threads: Sequence[int] | None) -> Costs:
    """Read and check the costs that a board measured of the model that was sent."""
    costs = COSTS.convert(document)
    if costs.model != described(base):
        raise ValueError("costs of another model")
    if threads is not None and [table.n_threads for table in costs.threads] != list(dict.fromkeys(threads)):
        raise ValueError("other thread counts")
    return replace(costs, command=command_line(), versions={**package_versions("saap"), **costs.versions}, on=board)
