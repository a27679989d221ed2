"""The portable target: standard operators only, for TensorRT and other runtimes that do not take com.microsoft.

Uniform float32 LLaMA models go through optimum where it is installed; all others (layers of their own sizes, integers,
other families) are written by :mod:`export.portable.decoder`. Both take ``position_ids`` and grow the KV cache by
Concat.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import onnx_ir as ir

from export.bundle.manifest import DECODE_GRAPH, SCORING_GRAPH, WEIGHTS
from export.graph.decoder import GraphModel, save_graphs
from export.graph.rotary import all_rotary_tables
from export.graph.targets import check_runtime
from export.graph.weights import WeightFile, write_model
from export.options import ExportOptions
from export.portable.decoder import StandardGraph
from export.portable.weights import StandardLayout
from export.source import ModelSource
from saap.base.errors import UserError
from saap.base.progress import Progress
from saap.models.architectures import SLIM, epsilon_of, traits_of

SMALLEST_EXTERNAL = 1024  # bytes; smaller tensors (shapes, axes) stay in the graph
LEVEL = 4  # ONNX Runtime fuses DequantizeLinear and MatMul to its int8-activation kernel where nothing else is asked
ONNXRUNTIME_MIN = {"optimum": "1.18", "saap": "1.20"}


class PortableWriter:
    """Writes graphs of standard operators; floats where no bits are asked for."""

    def __init__(self, source: ModelSource, options: ExportOptions) -> None:
        if source.words is not None:
            raise UserError(
                f"the head of {source.directory} says some words only, which is not written in standard operators: "
                "give --target cpu, or prune it with --vocabulary-input"
            )
        bits = options.bits if options.bits or source.quant else 32
        precision = source.precision(bits, options.group_size, options.head_bits)
        self.precision = replace(precision, accuracy_level=LEVEL if precision.bits != 32 else 0)
        if self.precision.bits == 32:
            options.check_floats()
        known = source.architecture.optimum and not str(source.config["model_type"]).startswith(SLIM)
        plain = known and self.precision.bits == 32
        if options.graph_writer == "optimum" and not plain:
            raise UserError("optimum writes uniform float32 LLaMA models only: leave graph_writer out")
        by_optimum = plain and find_spec("optimum") is not None
        self._source, self._writer = source, options.graph_writer or ("optimum" if by_optimum else "saap")
        self.onnxruntime_min = ONNXRUNTIME_MIN[self._writer]
        check_runtime(options.onnxruntime, self.onnxruntime_min)
        self.lineage: dict[str, str] = {"graph_writer": self._writer}

    def write(self, out: Path, progress: Progress | None = None) -> int:
        if self._writer == "saap":
            return self._write_by_saap(out, progress)
        if progress:
            progress("exporting with optimum", 0, 0)
        _export_by_optimum(self._source.directory, out)
        _split_graphs(out)
        shape = self._source.shape
        return 4 * (shape.parameters - (0 if shape.tied else shape.vocab * shape.hidden))

    def _write_by_saap(self, out: Path, progress: Progress | None) -> int:
        source, config = self._source, self._source.transformers_config
        traits, file = traits_of(config), WeightFile(out)
        tables = all_rotary_tables(config, traits)
        write_model(source, self.precision, StandardLayout(file), tables, progress)
        file.close()
        model = GraphModel(source.shape, traits, self.precision, epsilon_of(config), source.architecture.value_norm)
        save_graphs(StandardGraph, model, file.tensors, out)
        return file.bytes_per_token("head")


def _export_by_optimum(model_dir: Path, out: Path) -> None:
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
    """Put the decode graph beside the scoring graph: the same weights, the last position's logits only."""
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
