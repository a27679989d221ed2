"""The portable target: standard operators only, for TensorRT and other runtimes that do not take com.microsoft.

Uniform float32 LLaMA models go through optimum where it is installed; all others (layers of their own sizes, integers,
other families) are written by :mod:`export.portable.decoder`. Both take ``position_ids`` and grow the KV cache by
Concat.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx_ir as ir

from devices.common.progress import Progress
from export.bundle.clients import write_client_files
from export.bundle.manifest import DECODE_GRAPH, SCORING_GRAPH, WEIGHTS, BundleManifest, write_manifest
from export.graph.rotary import all_rotary_tables
from export.graph.weights import WeightFile
from export.portable.decoder import StandardGraph
from export.portable.weights import write_standard_weights
from export.source import ModelSource, Precision
from export.write import make_manifest, transformers_config
from saap.models.architectures import traits_of
from saap.models.resolve import copy_sidecars
from saap.system.files import writing_directory

SMALLEST_EXTERNAL = 1024  # bytes; smaller tensors (shapes, axes) stay in the graph
LEVEL = 4  # ONNX Runtime fuses DequantizeLinear and MatMul to its int8-activation kernel where nothing else is asked
ONNXRUNTIME_MIN = {"optimum": "1.18", "saap": "1.20"}


def export_portable(
    model_dir: str | Path,
    out: str | Path,
    *,
    bits: int | None = None,
    block: int | None = None,
    head_bits: int | None = None,
    writer: str | None = None,
    parity: Callable[[Path], dict[str, Any]] | None = None,
    progress: Progress | None = None,
) -> BundleManifest:
    """Export a dense, slim or tuned directory in standard operators.

    Args:
        bits: 4, 8 or 32 for the linears; None is 32, or what a tuned directory holds.
        block: quantisation group; None is 32, or what a tuned directory holds.
        head_bits: of embedding and head; None is as ``bits``.
        writer: ``optimum`` or ``saap``; None takes optimum where it can: uniform LLaMA, float32, installed.
        parity: is given the finished files before the bundle appears, returns the parity report, raises on failure.

    Raises:
        UserError: unsupported architecture, precision or sizes.
    """
    source = ModelSource(Path(model_dir))
    precision = source.precision(bits if bits or source.quant else 32, block, head_bits)
    precision = replace(precision, accuracy_level=LEVEL if precision.bits != 32 else 0)
    writer = writer or _writer(source, precision)
    with writing_directory(out) as partial:
        if writer == "optimum":
            shape = source.shape
            read = 4 * (shape.parameters - (0 if shape.tied else shape.vocab * shape.hidden))
            _write_by_optimum(source, partial, progress)
        else:
            read = _write_by_ourselves(source, precision, partial, progress)
        copy_sidecars(source.directory, partial)
        config, oldest = transformers_config(source), ONNXRUNTIME_MIN[writer]
        manifest = make_manifest(source, precision, config, read, "portable", oldest)
        lineage = {**manifest.lineage, "graph_writer": writer}
        manifest = replace(manifest, lineage=lineage)
        manifest = write_client_files(partial, source.config, manifest)
        write_manifest(partial, manifest)
        if parity is not None:
            manifest = replace(manifest, parity=parity(partial))
        complete = write_manifest(partial, manifest)
    return complete


def _writer(source: ModelSource, precision: Precision) -> str:
    uniform = source.config["model_type"] == "llama"  # the other families' windows and norms are tried in ours only
    return "optimum" if uniform and precision.bits == 32 and find_spec("optimum") is not None else "saap"


def _write_by_ourselves(source: ModelSource, precision: Precision, out: Path, progress: Progress | None) -> int:
    """Write weights and graphs; the bytes of weights that one token reads."""
    config = transformers_config(source)
    traits = traits_of(config)
    rotary = all_rotary_tables(config, traits)
    file = WeightFile(out)
    write_standard_weights(source, precision, file, progress)
    for name, table in rotary.items():
        file.add(name, table)
    file.close()
    for name, scoring in ((DECODE_GRAPH, False), (SCORING_GRAPH, True)):
        graph = StandardGraph(source.shape, traits, precision, file.tensors, config.rms_norm_eps)
        ir.save(graph.build(scoring), out / name)
    return sum(t.nbytes for name, t in file.tensors.items() if name.startswith(("layers.", "head.", "norm")))


def _write_by_optimum(source: ModelSource, out: Path, progress: Progress | None) -> None:
    if progress:
        progress("optimum", 0, 1)
    _export(source.directory, out)
    _split_graphs(out)
    if progress:
        progress("optimum", 1, 1)


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
