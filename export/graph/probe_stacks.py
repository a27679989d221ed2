"""Stacks of decoder layers to time: the exporter's own graphs at a model's sizes, with weights made up.

An operator that is timed over and over by itself finds its weights in the cache, and in a model it does not. So what
is timed is whole decode steps. The first stack is the model itself; in each of the others every second layer takes one
option instead: an FFN width, a count of heads, or a block less; in the last ones the head has fewer tokens, or all
matrices of one kind of block, or those outside the layers, are of other integers. The difference of two steps is then
what the option saves in its place, between layers that push its weights out of the cache.

Time does not depend on the weights' values. All stacks share one data file: a smaller matrix is the beginning of the
largest one's bytes, and the file is hard-linked into every stack's bundle, or copied where there are no links.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from export.bundle.manifest import DECODE_GRAPH, WEIGHTS, write_manifest
from export.graph.decoder import GraphModel, MicrosoftGraph, check_attention
from export.graph.probe_model import ProbeModel
from export.graph.rotary import all_rotary_tables
from export.graph.targets import CPU
from export.graph.weights import Array, MicrosoftLayout, WeightFile, write_model
from export.source import DeltaRates, Kernel, Precision, StackedLinear, sized_manifest
from saap.base.progress import Progress, advance
from saap.models.modeling_slim import packed_ids
from saap.models.shape import DELTA, KINDS, DeltaHeads, LayerSizes, ModelShape
from saap.models.slim_quant import GROUP_SIZES, MatrixForm
from saap.quantize.groups import QuantMatrix

FAST_ROWS = 64  # widths in multiples of it suit the fast kernels
PARTS = {"attention": ("qkv", "o"), "ffn": ("gate_up", "down"), "outside": ()}
EPSILON = 1e-5


@dataclass(frozen=True)
class Grid:
    """Sizes that are timed; what lies between is interpolated."""

    widths: int = 8  # of FFNs
    rare: int = 4  # sizes of short convolutions, or of delta nets
    heads: int = 3  # counts of KV groups, and of query heads in each
    shares: tuple[float, ...] = (1 / 8, 1 / 2)  # of the vocabulary that a head predicts


FINE, COARSE = Grid(), Grid(3, 2, 2, ())


@dataclass(frozen=True)
class ProbeStack:
    """One stack of layers."""

    layers: Sequence[LayerSizes]
    head_rows: int = 0  # tokens that the head predicts; 0: all
    part: str = ""  # of PARTS, whose matrices have another form: of all layers, or outside them
    form: MatrixForm | None = None  # of those whose columns are whole groups of it


def stacks_of(model: ProbeModel, grid: Grid = FINE) -> list[ProbeStack]:
    """All that is timed of a model, the model itself first."""
    layers, vocab = stack_layers(model, grid), model.shape.vocab
    heads = [ProbeStack(layers[0], max(1, round(share * vocab))) for share in grid.shares]
    return [*map(ProbeStack, layers), *heads, *_of_forms(model, layers[0])]


def _of_forms(model: ProbeModel, layers: Sequence[LayerSizes]) -> list[ProbeStack]:
    """List a stack for each part and each form that some matrix of it can have: larger groups, and of 4 bits also 8."""
    own = model.precision
    forms = [MatrixForm(own.bits, size) for size in GROUP_SIZES if own.group_size and size > own.group_size]
    if own.bits == 4:
        wider = max(own.group_size, GROUP_SIZES[1])
        forms.append(MatrixForm(8, own.group_size if model.shape.hidden % wider else wider))
    return [
        ProbeStack(layers, 0, part, form)
        for form in forms
        for part in PARTS
        if _share(model.shape.with_layers(tuple(layers)), part, form)
    ]


def _share(shape: ModelShape, part: str, form: MatrixForm) -> float:
    """Return the share of a part's weights that can have a form: in matrices whose columns are whole groups."""
    if part == "outside":
        return float(shape.hidden % form.group_size == 0)
    kind, sizes = KINDS[part], shape.layers[0]
    inner, writes = shape.inner_width(kind, sizes), shape.writing_share(kind, sizes)
    return (1 - writes) * (shape.hidden % form.group_size == 0) + writes * (inner % form.group_size == 0)


def stack_layers(model: ProbeModel, grid: Grid = FINE) -> list[tuple[LayerSizes, ...]]:
    """List the layers of every stack: the model itself, then one stack per option, which every second layer takes."""
    full, count = model.shape.layers[0], len(model.shape.layers)
    widths = (0, *_widths(full.ffn, model.precision, grid.widths))
    options = [LayerSizes(full.query_heads, full.kv_heads, width) for width in widths]
    options.append(LayerSizes(0, 0, full.ffn))
    for groups in _spread(full.kv_heads, grid.heads):
        for per_group in _spread(full.heads_per_group, grid.heads):
            columns = groups * per_group * model.shape.head_dim
            if not (model.precision.group_size and columns % model.precision.group_size):
                options.append(LayerSizes(groups * per_group, groups, full.ffn))
    if conv := model.largest.conv:
        options += [LayerSizes(ffn=full.ffn, conv=w) for w in (*_widths(conv, model.precision, grid.rare), conv)]
    if delta := model.largest.delta:
        columns, groups = model.shape.width_of(DELTA.writes, model.largest), model.precision.group_size or 1
        counts = [count for count in range(1, delta + 1) if count == delta or not count * columns % groups]
        few = [counts[n - 1] for n in _spread(len(counts), grid.rare)]
        options += [LayerSizes(ffn=full.ffn, delta=count) for count in few]
    stacks = [tuple(option if i % 2 else full for i in range(count)) for option in options if option != full]
    return [(full,) * count, *stacks]


def _widths(full: int, precision: Precision, count: int) -> list[int]:
    group = precision.group_size or 32
    step = max(group, FAST_ROWS) if full >= 8 * FAST_ROWS else group
    return [step * n for n in _spread(full // step, count) if step * n < full]


def _spread(high: int, count: int) -> list[int]:
    """Up to ``count`` whole numbers from 1 to ``high``, both included."""
    return sorted({round(float(n)) for n in np.linspace(1, high, count)}) if high >= 1 else []


def write_probe_stacks(
    model: ProbeModel, out: Path, stacks: Sequence[ProbeStack] | None = None, progress: Progress | None = None
) -> list[Path]:
    """Write every stack as a bundle below ``out``, an empty directory; the bundles, in the order of the stacks.

    The lineage in the manifest says how many nodes the graph has.

    ``stacks``: their layers are no larger and no more than the model's; None is :func:`stacks_of`.
    """
    rotary = all_rotary_tables(model.config, model.traits)
    check_attention(model.shape, model.traits, {name: 2 * table.shape[1] for name, table in rotary.items()})
    whole = WeightFile(out, model.precision.floats)
    rare = model.largest
    everything = model.shape.with_layers(
        tuple(replace(sizes, conv=rare.conv, delta=rare.delta) for sizes in model.shape.layers)
    )
    stacks, written = stacks_of(model) if stacks is None else stacks, []
    most = {stack.form.bits for stack in stacks if stack.form} | {0}  # bytes for the largest form of each matrix
    largest = replace(
        model.precision, bits=max(most | {model.precision.bits}), head_bits=max(most | {model.precision.head_bits})
    )
    write_model(_MadeUp(model, everything, "cpu", model.shape.vocab), largest, MicrosoftLayout(whole), rotary)
    whole.close()
    for index, stack in enumerate(stacks):
        advance(progress, "writing probe graphs (stacks)", index, len(stacks))
        written.append(_write_stack(model, stack, whole, rotary, out / f"{index:02}"))
    advance(progress, "writing probe graphs (stacks)", len(stacks), len(stacks))
    return written


class _MadeUp:
    """A :class:`export.source.WeightSource` of random weights; on the device ``meta`` only their shapes.

    What comes out of a matrix is about as large as what goes in.
    """

    def __init__(
        self, model: ProbeModel, shape: ModelShape, device: str, head_rows: int, stack: ProbeStack | None = None
    ) -> None:
        self.architecture, self.shape, self._device, self._stack = model.architecture, shape, device, stack
        self.words = torch.arange(head_rows) if head_rows else None
        self._random = torch.Generator().manual_seed(0) if device == "cpu" else None

    def linear(self, layer: int, part: str, precision: Precision) -> StackedLinear:
        shape, sizes, dim = self.shape, self.shape.layers[layer], self.shape.head_dim
        delta = shape.delta or DeltaHeads(0, 0, 0)
        rows, columns, biased = {
            "qkv": (
                (sizes.query_heads + 2 * sizes.kv_heads) * dim + sizes.query_heads * shape.gate_width,
                shape.hidden,
                shape.attention_bias,
            ),
            "o": (shape.hidden, sizes.query_heads * dim, shape.attention_bias and shape.output_bias),
            "conv_in": (3 * sizes.conv, shape.hidden, shape.conv_bias),
            "conv_out": (shape.hidden, sizes.conv, shape.conv_bias),
            "delta_in": (2 * sizes.delta * (delta.key + delta.width), shape.hidden, False),
            "delta_out": (shape.hidden, sizes.delta * delta.width, False),
            "gate_up": (2 * sizes.ffn, shape.hidden, shape.mlp_bias),
            "down": (shape.hidden, sizes.ffn, shape.mlp_bias),
        }[part]
        bias = self._filled(0.01, rows) if biased else None
        form, stack = MatrixForm(precision.bits, precision.group_size), self._stack
        if stack and stack.form and part in PARTS[stack.part] and columns % stack.form.group_size == 0:
            form = stack.form
        return StackedLinear(self._matrix(rows, columns, form), bias)

    def table(self, module: str, precision: Precision) -> torch.Tensor | QuantMatrix:
        form, stack = MatrixForm(precision.head_bits, precision.group_size), self._stack
        if stack and stack.form and stack.part == "outside":
            form = stack.form
        return self._matrix(self.shape.vocab, self.shape.hidden, form)

    def norm(self, field: str, layer: int | None = None) -> torch.Tensor:
        """Return a norm that changes nothing."""
        if layer is None or field not in ("query_norm", "key_norm"):
            return self._filled(1.0, self.shape.hidden)
        *_, query, key = self.shape.attention_norms(self.shape.layers[layer])
        return self._filled(1.0, query if field == "query_norm" else key)

    def kernel(self, layer: int) -> Kernel:
        """Kernels that give the mean of what they see."""
        shape, sizes, heads = self.shape, self.shape.layers[layer], self.shape.delta
        channels = sizes.delta * (2 * heads.key + heads.width) if heads else sizes.conv
        bias = self._filled(0.01, channels) if shape.conv_bias else None
        return Kernel(self._filled(1 / shape.conv_kernel, channels, 1, shape.conv_kernel), bias)

    def matrix(self, module: str, precision: Precision) -> torch.Tensor | QuantMatrix:
        raise NotImplementedError("a probe has no matrices outside its layers")

    def numbers(self, name: str) -> torch.Tensor:
        raise NotImplementedError("a probe has no further tensors")

    def rates(self, layer: int) -> DeltaRates:
        """Rates that write half of each value and keep half of the state."""
        heads = self.shape.delta
        assert heads is not None, "a layer has a delta net"
        count = self.shape.layers[layer].delta * heads.values
        matrix = self._matrix(2 * count, self.shape.hidden, MatrixForm(32, 0))
        assert isinstance(matrix, torch.Tensor), "the rates are floats"
        vectors = self._filled(-1.0, count), self._filled(0.01, count), self._filled(1.0, heads.value)
        return DeltaRates(matrix, *vectors)

    def _matrix(self, rows: int, columns: int, form: MatrixForm) -> torch.Tensor | QuantMatrix:
        bits, group_size = form
        if bits == 32:
            uniform: torch.Tensor = torch.rand(rows, columns, generator=self._random, device=self._device)
            return (uniform - 0.5).mul(math.sqrt(12 / columns))
        groups, spread = columns // group_size, 2**bits / 12**0.5  # standard deviation of codes that are all as likely
        packed = (rows, groups, group_size * bits // 8)
        qweight = torch.randint(256, packed, dtype=torch.uint8, generator=self._random, device=self._device)
        midpoints = torch.full(
            (rows, -(-groups * bits // 8)), 0x88 if bits == 4 else 0x80, dtype=torch.uint8, device=self._device
        )
        scales = self._filled(1 / (spread * columns**0.5), rows, groups)
        return QuantMatrix(qweight, scales, midpoints, bits, group_size)

    def _filled(self, value: float, *shape: int) -> torch.Tensor:
        return torch.full(shape, value, device=self._device)


class _StackFile(WeightFile):
    """The tensors of one stack, as beginnings of those in a file that is finished."""

    def __init__(self, whole: WeightFile, directory: Path) -> None:
        self.directory, self.tensors, self._whole = directory, {}, whole

    def add(self, name: str, values: Array) -> None:
        """Refer to the beginning of the whole file's tensor of this name; the values do not matter."""
        old = self._whole.tensors[name]
        length = prod(values.shape) * old.dtype.numpy().itemsize
        self._refer(name, (old.offset or 0, length), old.dtype, values.shape)


def _write_stack(
    model: ProbeModel, stack: ProbeStack, whole: WeightFile, tables: Mapping[str, Array], directory: Path
) -> Path:
    directory.mkdir()
    file, rows = _StackFile(whole, directory), stack.head_rows
    shape = replace(model.shape, layers=tuple(stack.layers), head_tokens=rows)
    write_model(_MadeUp(model, shape, "meta", rows, stack), model.precision, MicrosoftLayout(file), tables)
    traits = replace(model.traits, vocabulary=packed_ids(range(rows), shape.vocab) if rows else "")
    graph = MicrosoftGraph(
        GraphModel(shape, traits, model.precision, EPSILON, model.architecture.value_norm), file.tensors
    ).build(scoring=False)
    ir.save(graph, directory / DECODE_GRAPH)
    try:
        os.link(whole.directory / WEIGHTS, directory / WEIGHTS)
    except OSError:
        shutil.copyfile(whole.directory / WEIGHTS, directory / WEIGHTS)
    manifest = replace(
        sized_manifest(shape, model.precision, model.config),
        weight_bytes_per_token=file.bytes_per_token("embedding" if shape.tied and not rows else "head"),
        onnxruntime_min=CPU.oldest_runtime(model.shape, model.precision, windows=False),
        lineage={
            "method": "probe",
            "head_bits": model.precision.head_bits,
            "nodes": len(graph.graph),
            "head_rows": rows,
            **(
                {"part": stack.part, "form": list(stack.form), "share": _share(shape, stack.part, stack.form)}
                if stack.form
                else {}
            ),
        },
    )
    write_manifest(directory, manifest)
    return directory
