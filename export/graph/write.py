"""Both graphs of a bundle, and their weights, for ONNX Runtime on a CPU or on CUDA."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import torch

from export.graph.decoder import GraphModel, MicrosoftGraph, check_attention, save_graphs
from export.graph.kv_cache import cache_scales
from export.graph.rotary import all_rotary_tables
from export.graph.targets import Target
from export.graph.weights import MicrosoftLayout, WeightFile, write_model
from export.options import ExportOptions
from export.source import ModelSource, sized_manifest
from saap.base.errors import UserError
from saap.base.progress import Progress
from saap.models.architectures import epsilon_of, traits_of


class MicrosoftWriter:
    """Writes graphs of ONNX Runtime's own operators.

    ``calibration``: ids [rows, tokens] to find the scales of an int8 cache on.
    """

    def __init__(self, source: ModelSource, options: ExportOptions, calibration: torch.Tensor | None) -> None:
        target = Target(options.target, options.dotprod, options.onnxruntime)
        bits = 32 if options.bits == 16 and target.name == "cuda" else options.bits  # floats, of the target's type
        precision = source.precision(bits, options.group_size, options.head_bits)
        self.precision = target.precision(precision, options.kv_bits)
        self.lineage: dict[str, str] = {}
        config = source.transformers_config
        traits = traits_of(config)
        windows = any(layer.window for layer in traits.layers)
        target.check(source.shape, self.precision, windows)
        self.onnxruntime_min = target.oldest_runtime(source.shape, self.precision, windows)
        self._tables = all_rotary_tables(config, traits)
        check_attention(source.shape, traits, {name: 2 * table.shape[1] for name, table in self._tables.items()})
        if self.precision.kv == "int8" and calibration is None:
            raise UserError("an int8 cache needs text to find its scales: give --text FILE")
        self._source, self._calibration = source, calibration
        self._model = GraphModel(
            source.shape, traits, self.precision, epsilon_of(config), source.architecture.value_norm
        )

    def write(self, out: Path, progress: Progress | None = None) -> int:
        file = WeightFile(out, self.precision.floats)
        write_model(self._source, self.precision, MicrosoftLayout(file), self._tables, progress)
        if self.precision.kv == "int8" and self._calibration is not None:
            self._add_cache_scales(file, self._calibration)
        file.close()
        save_graphs(MicrosoftGraph, self._model, file.tensors, out)
        tied = self._source.shape.tied and self._source.words is None
        return file.bytes_per_token("embedding" if tied else "head")

    def _add_cache_scales(self, file: WeightFile, ids: torch.Tensor) -> None:
        """Probe the graph with a float cache, then add the scales of the integer one to the data file."""
        file.flush()
        probe, shape = file.directory / "probe.onnx", self._source.shape
        floats = replace(self._model, precision=replace(self.precision, kv="float32"))
        ir.save(MicrosoftGraph(floats, file.tensors).build(True), probe)
        for name, scales in cache_scales(
            probe, sized_manifest(shape, floats.precision, self._source.transformers_config), ids.numpy()
        ).items():
            file.add(name, scales)
        probe.unlink()
