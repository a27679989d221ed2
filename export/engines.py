"""Other engines of a bundle: the same integers in a file beside the graph or in the graph itself, held against it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch
from torch.nn import functional as F

from export.bundle.manifest import Parity
from export.engine.opening import logits_in_process
from export.engine.table import ONNXRUNTIME, Row, bundle_engines, demands_of, row_of
from export.gguf.families import open_source
from export.gguf.write import BITS as GGUF_TYPES
from export.gguf.write import export_gguf
from export.options import ExportOptions
from export.source import ModelSource
from saap.base.errors import UserError
from saap.base.progress import Progress, advance
from saap.models.architectures import shape_of
from saap.models.checkpoint import read_config
from saap.system.device_names import AUTO

FARTHEST = 0.02  # of the graph's perplexity: each engine rounds activations its own way


def engines_of(directory: Path, options: ExportOptions) -> list[Row]:
    """List the engines beside ONNX Runtime to export for; with ``auto`` those that are installed and hold the model."""
    others = [row_of(name) for name in bundle_engines() if name != ONNXRUNTIME]
    if options.engines != (AUTO,):
        return [row for row in others if row.name in options.engines]
    if options.target != "cpu":
        return []
    fitting = []
    for row in others:
        with suppress(UserError):
            check_engine(row, directory, options)
            row.python(row.name)
            fitting.append(row)
    return fitting


def check_engines(directory: Path, options: ExportOptions) -> None:
    """Raise UserError for an engine that cannot hold the model or is not here, before its integers are chosen.

    An engine with a file of its own need not be here, for the file is written without it.
    """
    for row in engines_of(directory, options) if options.engines != (AUTO,) else ():
        check_engine(row, directory, options)
        if row.file is None:
            row.python(row.name)


def check_engine(row: Row, directory: Path, options: ExportOptions) -> None:
    """Raise UserError for an engine that cannot hold the model."""
    shape = shape_of(read_config(directory))
    try:
        row.check_demands(demands_of(shape.delta, shape.layers, options.kv_bits == 8), str(directory))
        if row.file is not None:
            if options.integers == "nearest":
                raise UserError("its file holds other integers: leave --integers nearest out")
            open_source(directory, None, None)
    except UserError as error:
        raise UserError(f"--engines {row.name}: {error}") from None


def write_engine(
    row: Row, source: ModelSource, out: Path, options: ExportOptions, progress: Progress | None
) -> dict[str, object]:
    """Write the file of another engine beside the graph, if it needs one; what the manifest says of it.

    Raises UserError: the engine cannot hold the model.
    """
    if row.file is None:
        return {"exact": True}  # it reads the graph
    kind = None if source.quant else GGUF_TYPES[options.bits or 4]
    try:
        report = export_gguf(source.directory, out / row.file, kind=kind, progress=progress)
    except UserError as error:
        raise UserError(f"--engines {row.name}: {error}") from None
    return {"exact": report.worst_error_rounded in (None, 0.0), "type": report.kind, "notes": report.notes}


def engine_nll(
    row: Row, bundle: Path, ids: torch.Tensor | None, parity: Parity | None, progress: Progress | None
) -> float | None:
    """Compute an engine's loss on the rows of the parity check, nats per token; None where either is not there.

    Raises UserError: it computes something else than the graph.
    """
    if ids is None or parity is None:
        return None
    source = bundle / row.file if row.file else bundle
    try:
        compute = logits_in_process(row, source, torch.get_num_threads())
    except UserError:
        return None
    advance(progress, f"checking what {row.name} computes (rows)", 0, len(ids))
    logits = torch.from_numpy(compute(ids.numpy()))
    nll = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    advance(progress, f"checking what {row.name} computes (rows)", len(ids), len(ids))
    if abs(nll - parity.nll_graph) > FARTHEST:
        raise UserError(
            f"{row.name} computes something else than the graph (NLL {nll:.4f} instead of {parity.nll_graph:.4f}): "
            f"nothing was exported; leave {row.name} out of --engines"
        )
    return nll
