"""The portable target: standard operators only, for TensorRT and other runtimes that do not take com.microsoft.

The graphs take ``position_ids`` and grow the KV cache by Concat (:mod:`export.portable.decoder`).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

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
from saap.models.architectures import epsilon_of, traits_of

LEVEL = 4  # ONNX Runtime fuses DequantizeLinear and MatMul to its int8-activation kernel where nothing else is asked
ONNXRUNTIME_MIN = "1.20"


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
        self._source, self.onnxruntime_min = source, ONNXRUNTIME_MIN
        check_runtime(options.onnxruntime, self.onnxruntime_min)
        self.lineage = {"graph_writer": "saap"}  # earlier versions let optimum write some graphs

    def write(self, out: Path, progress: Progress | None = None) -> int:
        source, config = self._source, self._source.transformers_config
        traits, file = traits_of(config), WeightFile(out)
        tables = all_rotary_tables(config, traits)
        write_model(source, self.precision, StandardLayout(file), tables, progress)
        file.close()
        model = GraphModel(source.shape, traits, self.precision, epsilon_of(config), source.architecture.value_norm)
        save_graphs(StandardGraph, model, file.tensors, out)
        return file.bytes_per_token("head")
