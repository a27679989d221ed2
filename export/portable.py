"""The portable target: standard operators only, by optimum, for runtimes that do not take com.microsoft.

fp32, and uniform models only: optimum reads one KV shape for all layers from the config.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from export.bundle import DECODE_GRAPH, SCORING_GRAPH, WEIGHTS, BundleManifest, write_manifest
from export.clients import write_genai_config
from export.export import make_manifest, transformers_config
from export.weights import ModelSource, Precision, Progress
from saap.checkpoint import writing_directory
from saap.errors import SaapError
from saap.models import copy_sidecars

SMALLEST_EXTERNAL = 1024  # bytes; smaller tensors (shapes, axes) stay in the graph


def export_portable(
    model_dir: str | Path,
    out: str | Path,
    *,
    parity: Callable[[Path], dict[str, Any]] | None = None,
    progress: Progress | None = None,
) -> BundleManifest:
    """Export a uniform model with optimum.

    Raises:
        SaapError: layers that differ from one another, or integer weights.
    """
    source = ModelSource(Path(model_dir))
    if source.config["model_type"].startswith("saap_"):
        raise SaapError(
            f"{model_dir} has layers of different sizes or integer weights, which the portable target cannot "
            "hold: use --target cpu"
        )
    config = transformers_config(source)
    if progress:
        progress("optimum", 0, 1)
    with writing_directory(out) as partial:
        _export(source.directory, partial)
        _split_graphs(partial)
        copy_sidecars(source.directory, partial)
        manifest = make_manifest(source, Precision(32, 0, 32, 0), config)
        manifest = replace(manifest, target="portable", onnxruntime_min="1.18")
        write_genai_config(partial, manifest)
        write_manifest(partial, manifest)
        if parity is not None:
            manifest = replace(manifest, parity=parity(partial))
        complete = write_manifest(partial, manifest)
    if progress:
        progress("optimum", 1, 1)
    return complete


def _export(model_dir: Path, out: Path) -> None:
    import contextlib
    import io
    import tempfile

    from optimum.exporters.onnx import main_export

    with tempfile.TemporaryDirectory(dir=out.parent) as work, contextlib.redirect_stdout(io.StringIO()):
        main_export(
            str(model_dir), work, task="text-generation-with-past", dtype="fp32", do_validation=False,
            local_files_only=True, no_post_process=False,
        )  # fmt: skip
        model = ir.load(Path(work) / "model.onnx")
        ir.external_data.load_to_model(model)
    ir.save(model, out / SCORING_GRAPH, external_data=WEIGHTS, size_threshold_bytes=SMALLEST_EXTERNAL)


def _split_graphs(directory: Path) -> None:
    """Beside the scoring graph put the decode graph: the same weights, the last position's logits only."""
    model = ir.load(directory / SCORING_GRAPH)
    graph = model.graph
    logits = next(value for value in graph.outputs if value.name == "logits")
    position = graph.outputs.index(logits)
    logits.name = "all_logits"
    last = ir.Value(
        name="constant.last", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT64),
        const_value=ir.tensor([-1], dtype=ir.DataType.INT64, name="constant.last"),
    )  # fmt: skip
    graph.initializers["constant.last"] = last
    gather = ir.node("Gather", [logits, last], {"axis": 1})
    graph.append(gather)
    only = gather.outputs[0]
    batch = logits.shape[0] if logits.shape is not None else "batch"
    vocabulary = logits.shape[2] if logits.shape is not None else "vocab"
    only.name, only.type = "logits", ir.TensorType(ir.DataType.FLOAT)
    only.shape = ir.Shape([batch, 1, vocabulary])
    graph.outputs[position] = only
    ir.save(model, directory / DECODE_GRAPH)
