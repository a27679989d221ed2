"""Bundles of a speed-up: made, timed beside the dense one, and judged on the test."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from saap.models.record import read_record
from saap.prune.options import PruneOptions
from saap.prune.pruning import prune
from saap.system.errors import UserError
from studies.common import Cell, provenance
from studies.pruning.cells import Variant
from studies.pruning.measure import options_of
from studies.speedup.rows import THREADS, Setup, attempt_name, closest, next_asked, speed_of


def speed_options(variant: Variant, asked: float, costs: Path, onnxruntime: str | None = None) -> PruneOptions:
    """PruneOptions of a row's bundle."""
    return replace(
        options_of({**variant, "ratio": 0.5}), ratio=None, speedup=asked, costs=costs, threads=THREADS,
        onnxruntime=onnxruntime,
    )  # fmt: skip


def make_costs(setup: Setup) -> None:
    """Measure the table where there is none; refuse one of another machine."""
    if not setup.costs.is_file():
        from bench.costs import CostsOptions
        from bench.costs.measure import write_costs
        from bench.remote.target import Target
        from saap.cli.devices.costs import CostsCommand, probe_costs

        asked = CostsCommand(CostsOptions(threads=(THREADS,)))
        write_costs(setup.costs, probe_costs(setup.model_dir, setup.costs, asked, Target()))
    runtime_of(setup.costs)


def table_runtime(costs: Path) -> str:
    """The ONNX Runtime of the table, of any machine: what quality is measured of may be made anywhere."""
    from saap.system.files import read_object

    return str(read_object(costs, "make it with `studies.speedup.study costs`")["device"]["onnxruntime"])


def runtime_of(costs: Path) -> str:
    """The ONNX Runtime that the table was measured with, on this machine."""
    from saap.cli.prune import runtime_here

    if not costs.is_file():
        raise UserError(f"{costs} is not there: make it with `studies.speedup.study costs`")
    version = runtime_here(costs, here=True)
    if version is None:
        raise UserError(f"{costs} is damaged: remove it, and make it with `studies.speedup.study costs`")
    return version


def make_dense(setup: Setup) -> Cell:
    """Export the dense model where its bundle is not there."""
    cell = setup.cell("dense") or {"variant": {}, "asked": 1.0, "quality": {}}
    bundle = export(setup.model_dir, setup.bundles / "dense")
    if cell.get("bundle") != bundle:
        cell = _renewed(cell, bundle)
        setup.write("dense", cell)
    return cell


def make_bundle(setup: Setup, variant: Variant, attempt: int, asked: float, onnxruntime: str | None = None) -> Cell:
    """Prune to a speed-up by the table and export; a bundle that is no other than an earlier one takes its numbers."""
    name = attempt_name(variant, attempt)
    cell: Cell = {"variant": variant, "attempt": attempt, "asked": asked, "quality": {}, **(setup.cell(name) or {})}
    options = speed_options(variant, asked, setup.costs, onnxruntime)
    ids = setup.texts.of(variant)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        slim = Path(folder) / "slim"
        try:
            prune(setup.model_dir, options, output=slim, calibration=ids)
        except UserError as error:
            setup.write(name, {**cell, "refused": str(error)})
            return {**cell, "refused": str(error)}
        record = read_record(slim)
        shutil.rmtree(setup.bundles / name, ignore_errors=True)  # of a run that was cut short
        bundle = export(slim, setup.bundles / name)
    plan = record["plan"]
    about = {
        "calibration": record["lineage"]["calibration"],
        "planned": plan["planned"],
        "sizes": [[len(k["query_heads"]), len(k["kv_heads"]), len(k["ffn"])] for k in plan["layers"]],
        "price": plan["price_nats"],
        "costs": plan["costs"],
        "table_onnxruntime": onnxruntime,
        "seconds": round(time.monotonic() - began, 1),
        **provenance(),
    }
    cell = _renewed({**cell, **about}, bundle)
    for same in setup.row(variant)[:attempt]:
        if same.get("bundle") == bundle:
            cell |= {key: same[key] for key in ("quality", "speed") if same.get(key)}
    setup.write(name, cell)
    return cell


def _renewed(cell: Cell, bundle: dict[str, Any]) -> Cell:
    """The cell with its bundle; what was measured of another one is not kept."""
    if cell.get("bundle") not in (None, bundle):
        cell = {**cell, "quality": {}, "speed": None}
    return {**cell, "bundle": bundle}


def export(model_dir: Path, out: Path) -> dict[str, Any]:
    """Write the bundle that `saap export` writes by default; its hash, parameters and bytes."""
    from export import ExportOptions, export
    from export.bundle.manifest import read_manifest

    if not out.is_dir():
        export(model_dir, ExportOptions(parity="none"), output=out)
    manifest = read_manifest(out)
    size = sum(entry.bytes for name, entry in manifest.files.items() if ".onnx" in name)
    return {"hash": manifest.content_hash, "parameters": manifest.parameters, "bytes": size}


def measure_quality(setup: Setup, name: str, cell: Cell) -> Cell:
    """NLL of a bundle on the test, nats per token."""
    from saap.cli.eval import Bundle
    from saap.evaluate.perplexity import score_models
    from saap.system.gpu import CPU

    scorer = Bundle(name, setup.bundles / name).scorer(CPU)
    (found,) = score_models({name: scorer}, setup.texts.test(setup.chunks))
    cell = {**cell, "quality": {**cell["quality"], f"test{setup.chunks}": found.nll}}
    setup.write(name, cell)
    return cell


def measure_speed(setup: Setup, name: str, cell: Cell) -> Cell:
    """Decode speed of a bundle against the dense one, as `saap compare` measures it; an invalid run is not kept."""
    from bench.judge.confirm import compare_live
    from bench.measure.options import BenchOptions

    plan = BenchOptions(threads=THREADS, repetitions=setup.pairs, cold=False)
    specs = [str(setup.bundles / "dense"), str(setup.bundles / name)]
    live = compare_live(specs, plan, confirm=False, names=["dense", "slim"])
    speed = speed_of(live)
    if isinstance(speed, str):
        print(f"{name}: not kept: {speed}", flush=True)
        return cell
    cell = {**cell, "speed": speed}
    setup.write(name, cell)
    return cell


def is_wanting(setup: Setup, cell: Cell) -> bool:
    """Whether a bundle is still needed: something is to be measured of it."""
    return "refused" not in cell and not (cell.get("speed") and f"test{setup.chunks}" in cell["quality"])


def prune_rows(setup: Setup, variants: list[Variant]) -> None:
    """The bundles that are asked for next, and those that are gone and still to be measured."""
    onnxruntime = table_runtime(setup.costs)
    make_dense(setup)
    for variant in variants:
        cells = setup.row(variant)
        asked = next_asked(cells, variant["speedup"])
        todo = [(cell["attempt"], cell["asked"]) for cell in cells if is_wanting(setup, cell) and counts(cell, cells)]
        for attempt, ask in [*todo, *([(len(cells), asked)] if asked else [])]:
            name = attempt_name(variant, attempt)
            if attempt < len(cells) and (setup.bundles / name).is_dir():
                continue
            cell = make_bundle(setup, variant, attempt, ask, onnxruntime)
            told = cell.get("refused") or f"asked {ask}, planned {cell['planned']['speedup']:.4f}"
            print(f"{name}: {told}", flush=True)


def counts(cell: Cell, cells: list[Cell]) -> bool:
    """Whether a cell is the one that counts of its row, or is not timed yet."""
    return not cell.get("speed") or cell is closest(cells, cell["variant"]["speedup"])


def quality_rows(setup: Setup, variants: list[Variant]) -> None:
    """Quality of the dense bundle and of the bundles that count."""
    for name, cell in [("dense", make_dense(setup)), *named(setup, variants)]:
        if f"test{setup.chunks}" not in cell["quality"]:
            print(f"{name}: {measure_quality(setup, name, cell)['quality']}", flush=True)


def named(setup: Setup, variants: list[Variant]) -> Iterator[tuple[str, Cell]]:
    """Cells that count, or are not timed yet, and whose bundle is there."""
    for variant in variants:
        cells = setup.row(variant)
        for cell in cells:
            name = attempt_name(variant, cell["attempt"])
            if counts(cell, cells) and (setup.bundles / name).is_dir():
                yield name, cell


def speed_rows(setup: Setup, variants: list[Variant]) -> None:
    """Speed of the bundles that have none, one pair after the other."""
    if not setup.elsewhere:
        runtime_of(setup.costs)
    make_dense(setup)
    for name, cell in named(setup, variants):
        if not cell.get("speed"):
            speed = measure_speed(setup, name, cell).get("speed")
            if speed:
                print(f"{name}: {speed['speedup']:.3f}x ({speed['low']:.3f} to {speed['high']:.3f})", flush=True)
