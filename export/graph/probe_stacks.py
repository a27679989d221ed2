"""Stacks of decoder layers to time: the exporter's own graphs at a model's sizes, with weights made up.

An operator that is timed over and over by itself finds its weights in the cache, and in a model it does not. So what
is timed is whole decode steps. The first stack is the model itself; in each of the others every second layer takes one
option instead: an FFN width, a count of heads, or a block less. The difference of two steps is then what the option
saves in its place, between layers that push its weights out of the cache.

Time does not depend on the weights' values. All stacks share one data file: a smaller matrix is the beginning of the
largest one's bytes, and the file is hard-linked into every stack's bundle, or copied where there are no links.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import onnx_ir as ir

from devices.common.progress import Progress
from export.bundle.manifest import DECODE_GRAPH, WEIGHTS, BundleManifest, write_manifest
from export.bundle.manifest import LayerSizes as BundleSizes
from export.graph.decoder import DecoderGraph, check_attention
from export.graph.probe_model import ProbeModel
from export.graph.rotary import all_rotary_tables
from export.graph.targets import CPU
from export.graph.weights import ATTENTION_NORMS, FFN_NORMS, WeightFile
from export.source import Precision
from saap.models.architectures import Architecture
from saap.models.shape import LayerSizes, ModelShape

FFN_WIDTHS = 8
HEAD_COUNTS = 3  # of KV groups, and of query heads in each
FAST_ROWS = 64  # widths in multiples of it suit the fast kernels
EPSILON = 1e-5


def stack_layers(model: ProbeModel) -> list[tuple[LayerSizes, ...]]:
    """The layers of every stack: the model itself, then one stack per option, which every second layer takes."""
    full, count = model.shape.layers[0], len(model.shape.layers)
    options = [LayerSizes(full.query_heads, full.kv_heads, width) for width in (0, *_widths(full.ffn, model.precision))]
    options.append(LayerSizes(0, 0, full.ffn))
    for groups in _spread(full.kv_heads, HEAD_COUNTS):
        for per_group in _spread(full.heads_per_group, HEAD_COUNTS):
            columns = groups * per_group * model.shape.head_dim
            if not (model.precision.block and columns % model.precision.block):
                options.append(LayerSizes(groups * per_group, groups, full.ffn))
    stacks = [tuple(option if i % 2 else full for i in range(count)) for option in options if option != full]
    return [(full,) * count, *stacks]


def _widths(full: int, precision: Precision) -> list[int]:
    block = precision.block or 32
    step = max(block, FAST_ROWS) if full >= 8 * FAST_ROWS else block
    return [step * n for n in _spread(full // step, FFN_WIDTHS) if step * n < full]


def _spread(high: int, count: int) -> list[int]:
    """Up to ``count`` whole numbers from 1 to ``high``, both included."""
    return sorted({round(float(n)) for n in np.linspace(1, high, count)}) if high >= 1 else []


def write_probe_stacks(
    model: ProbeModel,
    out: Path,
    stacks: Sequence[Sequence[LayerSizes]] | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Write every stack as a bundle below ``out``, an empty directory; the bundles, in the order of the stacks.

    The lineage in the manifest says how many nodes the graph has.

    Args:
        stacks: layers of each, no larger and no more than the model's; None is :func:`stack_layers`.

    Raises:
        UserError: sizes that ONNX Runtime's attention refuses.
    """
    rotary = all_rotary_tables(model.config, model.traits)
    check_attention(model.shape, model.traits, {name: 2 * table.shape[1] for name, table in rotary.items()})
    whole = _write_weights(model, rotary, out)
    wanted, written = stack_layers(model) if stacks is None else stacks, []
    for index, layers in enumerate(wanted):
        if progress:
            progress("writing probe graphs", index, len(wanted))
        shape = model.shape.with_layers(tuple(layers))
        written.append(_write_stack(model, shape, whole, list(rotary), out / f"{index:02}"))
    if progress:
        progress("writing probe graphs", len(wanted), len(wanted))
    return written


class _StackFile(WeightFile):
    """The tensors of one stack, as beginnings of those in a file that is finished."""

    def __init__(self, whole: WeightFile, directory: Path) -> None:
        self.directory, self.floats, self._whole = directory, whole.floats, whole
        self.tensors: dict[str, ir.ExternalTensor] = {}

    def take(self, name: str, tensor: _Tensor | None = None) -> None:
        """Refer to a tensor of the whole file, or to as much of it as ``tensor`` is large."""
        old = self._whole.tensors[name]
        dtype = old.dtype.numpy()
        shape = old.shape.numpy() if tensor is None else tensor.shape
        self.tensors[name] = self._reference(name, old.offset or 0, prod(shape) * dtype.itemsize, dtype, shape)


@dataclass(frozen=True)
class _Tensor:
    """A tensor to make up; ``scale`` keeps what comes out of a matrix about as large as what goes in."""

    dtype: str  # uint8 | float32
    shape: tuple[int, ...]
    scale: float = 1.0
    of: str | None = None  # the tensor whose second name this is

    def made(self, random: np.random.Generator) -> np.ndarray:
        if self.dtype == "uint8":
            return np.frombuffer(random.bytes(prod(self.shape)), np.uint8).reshape(self.shape)
        if len(self.shape) == 1:
            return np.full(self.shape, self.scale, np.float32)
        return (random.random(self.shape, np.float32) - 0.5) * np.float32(self.scale * 12**0.5)


def _write_weights(model: ProbeModel, rotary: dict[str, np.ndarray], out: Path) -> WeightFile:
    whole, random = WeightFile(out, model.precision.floats), np.random.default_rng(0)
    for name, tensor in _tensors(model, model.shape):
        if tensor.of:
            whole.alias(name, tensor.of, tensor.shape)
        else:
            whole.add(name, tensor.made(random))
    for name, table in rotary.items():
        whole.add(name, table)
    whole.close()
    return whole


def _write_stack(model: ProbeModel, shape: ModelShape, whole: WeightFile, tables: list[str], directory: Path) -> Path:
    directory.mkdir()
    file = _StackFile(whole, directory)
    for name, tensor in _tensors(model, shape):
        file.take(name, tensor)
    for name in tables:
        file.take(name)
    graph = DecoderGraph(shape, model.traits, model.precision, file, EPSILON).build(scoring=False)
    ir.save(graph, directory / DECODE_GRAPH)
    try:
        os.link(whole.directory / WEIGHTS, directory / WEIGHTS)
    except OSError:
        shutil.copyfile(whole.directory / WEIGHTS, directory / WEIGHTS)
    write_manifest(directory, _manifest(model, shape, file, len(graph.graph)))
    return directory


def _manifest(model: ProbeModel, shape: ModelShape, file: WeightFile, nodes: int) -> BundleManifest:
    kv_bytes = np.dtype(model.precision.kv).itemsize
    return BundleManifest(
        target="cpu",
        model_type=model.config.model_type,
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        head_dim=shape.head_dim,
        context_length=model.config.max_position_embeddings,
        layers=[BundleSizes(s.query_heads, s.kv_heads, s.ffn) for s in shape.layers],
        bits=model.precision.bits,
        block=model.precision.block,
        accuracy_level=model.precision.accuracy_level,
        parameters=shape.parameters,
        weight_bytes_per_token=file.bytes_per_token(shape.tied),
        kv_bytes_per_token=2 * kv_bytes * shape.head_dim * sum(s.kv_heads for s in shape.layers),
        kv_dtype=model.precision.kv,
        bos_token_id=None,
        eos_token_ids=[],
        onnxruntime_min=CPU.oldest_runtime(model.precision, windows=False),
        lineage={"method": "probe", "head_bits": model.precision.head_bits, "nodes": nodes},
    )


# The tensors that export.graph.weights writes for a model, by name and shape


def _tensors(model: ProbeModel, shape: ModelShape) -> Iterator[tuple[str, _Tensor]]:
    arch, precision, hidden, dim = model.architecture, model.precision, shape.hidden, shape.head_dim
    for index, sizes in enumerate(shape.layers):
        name = f"layers.{index}"
        if sizes.query_heads:
            rows, biased = (sizes.query_heads + 2 * sizes.kv_heads) * dim, shape.attention_bias
            yield from _linear(f"{name}.qkv", hidden, rows, precision, biased)
            yield from _linear(f"{name}.o", sizes.query_heads * dim, hidden, precision, biased and shape.output_bias)
            yield from _norms(arch, name, ATTENTION_NORMS, hidden, dim)
        if sizes.ffn:
            yield from _linear(f"{name}.gate_up", hidden, 2 * sizes.ffn, precision, shape.mlp_bias)
            yield from _linear(f"{name}.down", sizes.ffn, hidden, precision, shape.mlp_bias)
            yield from _norms(arch, name, FFN_NORMS, hidden, dim)
    yield "norm", _Tensor("float32", (hidden,))
    for name in ("embedding",) if shape.tied else ("embedding", "head"):
        yield from _table(name, hidden, shape.vocab, precision)


def _linear(name: str, k: int, n: int, precision: Precision, bias: bool) -> Iterator[tuple[str, _Tensor]]:
    if precision.bits == 32:
        yield f"{name}.weight", _Tensor("float32", (k, n), k**-0.5)
    else:
        yield from _integers(name, k, n, precision.bits, precision.block)
    if bias:
        yield f"{name}.bias", _Tensor("float32", (n,), 0.01)


def _table(name: str, hidden: int, vocab: int, precision: Precision) -> Iterator[tuple[str, _Tensor]]:
    if precision.head_bits == 32:
        yield f"{name}.weight", _Tensor("float32", (vocab, hidden), hidden**-0.5)
        return
    yield from _integers(name, hidden, vocab, precision.head_bits, precision.block)
    groups = hidden // precision.block
    yield f"{name}.scales3", _Tensor("float32", (vocab, groups, 1), of=f"{name}.scales")


def _integers(name: str, k: int, n: int, bits: int, block: int) -> Iterator[tuple[str, _Tensor]]:
    yield f"{name}.qweight", _Tensor("uint8", (n, k // block, block * bits // 8))
    spread = 2**bits / 12**0.5  # standard deviation of codes of which none is more likely
    yield f"{name}.scales", _Tensor("float32", (n * k // block,), 1 / (spread * k**0.5))


def _norms(
    arch: Architecture, name: str, norms: tuple[str, ...], hidden: int, dim: int
) -> Iterator[tuple[str, _Tensor]]:
    for norm in norms:
        if getattr(arch, norm):
            width = dim if norm in ("query_norm", "key_norm") else hidden
            yield f"{name}.{norm}", _Tensor("float32", (width,))
