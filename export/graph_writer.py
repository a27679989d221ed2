"""Both graphs of a bundle, and their weights, in operators of ONNX Runtime or in standard ones."""

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
from export.portable.decoder import StandardGraph
from export.portable.weights import StandardLayout
from export.source import ModelSource, sized_manifest
from saap.base.errors import UserError
from saap.base.progress import Progress
from saap.models.architectures import epsilon_of, traits_of


class GraphWriter:
    """Writes the graphs of a bundle for one target; its constructor refuses what cannot be written.

    ``calibration``: ids [rows, tokens] to find the scales of an int8 cache on.
    """

    def __init__(self, source: ModelSource, options: ExportOptions, calibration: torch.Tensor | None = None) -> None:
        target, bits = Target(options.target, options.dotprod, options.onnxruntime), options.bits
        portable = target.name == "portable"
        if portable and source.words is not None:
            raise UserError(
                f"the head of {source.directory} predicts some tokens only, which no graph of standard operators does: "
                "give --target cpu, or prune it with --vocabulary-input"
            )
        if (bits == 16 and target.name == "cuda") or (portable and bits is None and not source.quant):
            bits = 32  # floats, of the target's type
        precision = source.precision(bits, options.group_size, options.head_bits)
        if precision.bits == 32:
            options.check_floats()
        self.precision = target.precision(precision, options.kv_bits)
        config = source.transformers_config
        traits = traits_of(config)
        windows = any(layer.window for layer in traits.layers)
        target.check(source.shape, self.precision, windows)
        self.onnxruntime_min = target.oldest_runtime(source.shape, self.precision, windows)
        self._tables = all_rotary_tables(config, traits)
        if not portable:
            check_attention(source.shape, traits, {name: 2 * table.shape[1] for name, table in self._tables.items()})
        if self.precision.kv == "int8" and calibration is None:
            raise UserError("an int8 cache needs text to find its scales: give --text FILE")
        self._source, self._calibration, self._portable = source, calibration, portable
        self._model = GraphModel(
            source.shape, traits, self.precision, epsilon_of(config), source.architecture.value_norm
        )

    def write(self, out: Path, progress: Progress | None = None) -> int:
        """Write weights and graphs; the bytes of weights that one token reads."""
        file = WeightFile(out, self.precision.floats)
        layout = StandardLayout(file) if self._portable else MicrosoftLayout(file)
        write_model(self._source, self.precision, layout, self._tables, progress)
        if self.precision.kv == "int8" and self._calibration is not None:
            self._add_cache_scales(file, self._calibration)
        file.close()
        save_graphs(StandardGraph if self._portable else MicrosoftGraph, self._model, file.tensors, out)
        tied = self._source.shape.tied and self._source.words is None and not self._portable
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
