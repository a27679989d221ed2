"""A dense, slim or tuned directory as the exporter reads it: one matrix at a time, floats or integers.

What is one matrix in a graph (queries, keys and values; gate and up) comes stacked, with its bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from export.bundle.manifest import BundleManifest
from saap.base.errors import UserError
from saap.models.architectures import (
    Architecture,
    ModelConfig,
    Traits,
    architecture_of,
    positions_of,
    shape_of,
    traits_of,
)
from saap.models.checkpoint import Model, transformers_config
from saap.models.modeling_slim import unpack_zero_points, unpacked_ids
from saap.models.shape import ModelShape
from saap.models.slim_quant import MatrixForm, module_form, quant_of, stacked_form
from saap.quantize.groups import QuantMatrix, check_groups, quantize


@dataclass(frozen=True)
class Precision:
    """The types that the graph computes in and that its weights are stored in."""

    bits: int = 4  # of the linears: 4, 8, or 32 for floats (of type ``floats``)
    group_size: int = 32  # weights per scale; 0 at 32 bit
    head_bits: int = 4
    accuracy_level: int = 4
    floats: str = "float32"  # type of activations, scales, norms and float weights: float32 or float16
    kv: str = "float32"  # type of the KV cache: ``floats``, or int8
    matrices: Mapping[str, int] = field(default_factory=dict)  # a tuned directory's other bits, by module name
    blocks: Mapping[str, int] = field(default_factory=dict)  # its other group sizes

    @property
    def all_bits(self) -> tuple[int, ...]:
        """Every number of bits that some matrix has, fewest first."""
        return tuple(sorted({self.bits, self.head_bits, *self.matrices.values()}))


@dataclass(frozen=True)
class StackedLinear:
    """One or several linears over the same input as one: rows of N are independent, so they are stacked."""

    matrix: torch.Tensor | QuantMatrix  # [N, K], floats or integers
    bias: torch.Tensor | None  # [N] or None


@dataclass(frozen=True)
class Kernel:
    """The kernels of a convolution, one for each channel."""

    weight: torch.Tensor  # [channels, 1, tokens] float32
    bias: torch.Tensor | None  # [channels] or None


@dataclass(frozen=True)
class DeltaRates:
    """The weights of a gated delta net's rates and norm, all float32.

    A value head writes the share sigmoid(b) of a value, and keeps exp(scale * softplus(a + bias)) of its state.
    """

    matrix: torch.Tensor  # of b and a, stacked, [2 * value heads, hidden]
    scale: torch.Tensor  # -exp(A_log), [value heads]
    bias: torch.Tensor  # [value heads]
    norm: torch.Tensor  # of each value head, [elements of a value]


class WeightSource(Protocol):
    """A source of a bundle's weights: a model directory, or random numbers at a model's sizes."""

    @property
    def architecture(self) -> Architecture:
        """Names of the modules."""

    @property
    def shape(self) -> ModelShape:
        """Sizes of all layers."""

    def linear(self, layer: int, part: str, precision: Precision) -> StackedLinear:
        """Read one matrix of a layer, by its name in ``Architecture.matrices``."""

    def table(self, module: str, precision: Precision) -> torch.Tensor | QuantMatrix:
        """Read the embedding or the head, [vocab, hidden]; integers have no zero points but the midpoint."""

    @property
    def words(self) -> torch.Tensor | None:
        """The tokens that the head predicts, ascending int64; None: all."""

    def norm(self, field: str, layer: int | None = None) -> torch.Tensor:
        """Read the factors of a norm, [width] float32, by its field of :class:`Architecture`."""

    def kernel(self, layer: int) -> Kernel:
        """Read the kernels of a layer's convolution."""

    def rates(self, layer: int) -> DeltaRates:
        """Read the rates of a layer's gated delta net."""

    def matrix(self, module: str, precision: Precision) -> torch.Tensor | QuantMatrix:
        """Read a matrix [N, K] by its name in the model."""

    def numbers(self, name: str) -> torch.Tensor:
        """Read a tensor that is no matrix, float32, by its name in the model."""


class ModelSource:
    """A dense, slim or tuned directory, as a :class:`WeightSource`."""

    def __init__(self, directory: Path) -> None:
        model = Model.open(directory, verify=False)  # its tensors are checked below
        self.directory, self.config, self.record = directory, model.config, model.record
        self.architecture: Architecture = architecture_of(self.config)
        self.shape: ModelShape = shape_of(self.config)
        self.names, self.read = model.tensors()
        self.quant = quant_of(self.config)

    @cached_property
    def transformers_config(self) -> ModelConfig:
        return transformers_config(self.directory)

    @cached_property
    def traits(self) -> Traits:
        return traits_of(self.transformers_config)

    @property
    def words(self) -> torch.Tensor | None:
        """The tokens that the head predicts, ascending; None: all."""
        packed = self.traits.vocabulary
        return unpacked_ids(packed, self.shape.vocab) if packed else None

    def precision(self, bits: int | None, group_size: int | None, head_bits: int | None) -> Precision:
        """Choose the precision; a tuned directory has its own integers and refuses others."""
        if self.quant:
            own = Precision(
                self.quant["bits"], self.quant["block"], self.quant["embedding_bits"],
                matrices=self.quant.get("matrices", {}), blocks=self.quant.get("blocks", {}),
            )  # fmt: skip
            for flag, value, has in (
                ("--bits", bits, own.bits), ("--group-size", group_size, own.group_size),
                ("--head-bits", head_bits, own.head_bits),
            ):  # fmt: skip
                if value is not None and value != has:
                    again = f", or tune again with {flag} {value}" if flag == "--group-size" or value in (4, 8) else ""
                    raise UserError(
                        f"{self.directory} holds tuned integers, of {flag} {has} and not {value}: leave {flag} out"
                        f"{again}"
                    )
            return own
        bits = 4 if bits is None else bits
        if bits not in (4, 8, 32):
            raise UserError(f"{bits} bits are not supported; allowed: 4, 8, 32")
        if bits == 32:
            return Precision(bits, 0, 32)
        planned = self.record.get("plan", {}).get("bundle", {})
        if group_size is not None or head_bits is not None or bits != planned.get("bits"):
            return Precision(bits, group_size or 32, head_bits or bits)
        return Precision(
            bits, planned["block"], planned.get("embedding_bits", bits), matrices=planned.get("matrices", {}),
            blocks=planned.get("blocks", {}),
        )  # fmt: skip

    def own_forms(self, precision: Precision) -> dict[str, MatrixForm]:
        """Return the forms of matrices that differ from the rest, by module name."""
        return {name: self._form(name, precision) for name in {*precision.matrices, *precision.blocks}}

    def _form(self, module: str, precision: Precision) -> MatrixForm:
        in_vocabulary = module in self.architecture.tables
        bits = precision.head_bits if in_vocabulary else precision.matrices.get(module, precision.bits)
        return MatrixForm(bits, precision.blocks.get(module, precision.group_size))

    def matrix(self, module: str, precision: Precision) -> torch.Tensor | QuantMatrix:
        """One linear, the embedding or the head: float [N, K] at 32 bit, integers otherwise.

        Raises UserError: widths that are not whole groups, or tuned integers that are not what the config says.
        """
        if self.quant:
            qweight, scales, zero_points = (self.read(f"{module}.{part}") for part in QuantMatrix.PARTS)
            form = module_form(self.quant, self.architecture, module)
            if qweight.shape[2] * 8 != form.group_size * form.bits:
                raise UserError(
                    f"{self.directory}: {module} holds other integers than the {form} that config.json says: make the "
                    "directory again"
                )
            return check_symmetric(module, QuantMatrix(qweight, scales, zero_points, *form))
        form, weight = self._form(module, precision), self.read(f"{module}.weight").float()
        if form.bits == 32:
            return weight
        check_groups(weight.shape[1], form.group_size, module)
        return quantize(weight, *form)

    def norm(self, field: str, layer: int | None = None) -> torch.Tensor:
        """Read the factors of a norm, [width] float32, by its field of :class:`Architecture`; no layer: the last."""
        module = getattr(self.architecture, field)
        name = module if layer is None else f"{self.architecture.layers}.{layer}.{module}"
        return self.read(f"{name}.weight").float() + float(self.architecture.offset_norms)

    def kernel(self, layer: int) -> Kernel:
        """Read the kernels of a layer's convolution, too small for integers."""
        arch = self.architecture
        module = f"{arch.layers}.{layer}.{arch.delta.kernel if arch.delta else arch.conv_kernel}"
        return Kernel(self.read(f"{module}.weight").float(), self.bias(module))

    def rates(self, layer: int) -> DeltaRates:
        """Read the rates of a layer's gated delta net."""
        names = self.architecture.delta
        assert names is not None, "the family has delta nets"

        def read(name: str) -> torch.Tensor:
            return self.read(f"{self.architecture.layers}.{layer}.{name}").float()

        matrix = torch.cat([read(f"{module}.weight") for module in (names.beta, names.decay)])
        return DeltaRates(matrix, -read(names.log_decay).exp(), read(names.decay_bias), read(f"{names.norm}.weight"))

    def numbers(self, name: str) -> torch.Tensor:
        """Read a tensor that is no matrix, float32, by its name in the model."""
        return self.read(name).float()

    def bias(self, module: str) -> torch.Tensor | None:
        name = f"{module}.bias"
        return self.read(name).float() if name in self.names else None

    def table(self, module: str, precision: Precision) -> torch.Tensor | QuantMatrix:
        """Read the embedding or the head, [vocab, hidden]."""
        table = self.matrix(module, precision)
        rows = len(table.scales if isinstance(table, QuantMatrix) else table)
        if rows != self.shape.vocab:
            raise UserError(
                f"{self.directory} has {rows} rows in {module}, but its config.json names a vocabulary of "
                f"{self.shape.vocab}: get it again"
            )
        return table

    def linear(self, layer: int, part: str, precision: Precision) -> StackedLinear:
        """Read one matrix of a layer, by its name in ``Architecture.matrices``.

        Raises UserError: its linears hold different integers.
        """
        arch = self.architecture
        if self.quant:
            stacked_form(self.quant, arch, layer, part)
        names = arch.matrices[part][: 1 if part == "qkv" and self.shape.layers[layer].reads else None]
        modules = [f"{arch.layers}.{layer}.{module}" for module in names]
        parts = [self.matrix(module, precision) for module in modules]
        packed = [p for p in parts if isinstance(p, QuantMatrix)]
        rows = [p.qweight.shape[0] if isinstance(p, QuantMatrix) else p.shape[0] for p in parts]
        matrix: torch.Tensor | QuantMatrix
        if packed:
            matrix = QuantMatrix.stacked(packed)
            matrix = replace(matrix, scales=matrix.scales.float())
        else:
            matrix = torch.cat([p for p in parts if isinstance(p, torch.Tensor)])
        biases, bias = [self.bias(module) for module in modules], None
        if any(b is not None for b in biases):
            bias = torch.cat([b if b is not None else torch.zeros(n) for b, n in zip(biases, rows, strict=True)])
        if part == "qkv" and arch.gated_queries:
            order = self._gates_last(layer)
            return StackedLinear(matrix[order], None if bias is None else bias[order])
        return StackedLinear(matrix, bias)

    def _gates_last(self, layer: int) -> torch.Tensor:
        """Rows of ``qkv`` with the gates, which stand behind each head's query, behind all of it."""
        heads, dim = self.shape.layers[layer].query_heads, self.shape.head_dim
        mixed = torch.arange(heads * 2 * dim).view(heads, 2, dim)
        rest = torch.arange(2 * self.shape.layers[layer].kv_heads * dim) + mixed.numel()
        return torch.cat([mixed[:, 0].flatten(), rest, mixed[:, 1].flatten()])


def check_symmetric(module: str, matrix: QuantMatrix) -> QuantMatrix:
    """Return the matrix. Raises UserError: it has other zero points than 2^(bits-1), which kernels need not read."""
    zero_points = unpack_zero_points(matrix.zero_points, matrix.bits, matrix.scales.shape[1])
    if not bool((zero_points == 2 ** (matrix.bits - 1)).all()):
        raise UserError(
            f"{module} has zero points of its own, as saap 0.1 could choose them: tune the slim directory again"
        )
    return matrix


def sized_manifest(shape: ModelShape, precision: Precision, config: ModelConfig) -> BundleManifest:
    """Build the manifest of a bundle as far as sizes and precision tell it."""
    kept = sum(sizes.kv_heads * shape.head_of(sizes) for sizes in shape.layers if not sizes.reads)
    return BundleManifest(
        target="cpu",
        model_type=config.model_type,
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        head_dim=shape.head_dim,
        context_length=positions_of(config),
        layers=list(shape.layers),
        bits=16 if precision.floats == "float16" and precision.bits == 32 else precision.bits,
        block=precision.group_size,
        accuracy_level=precision.accuracy_level,
        parameters=shape.parameters,
        weight_bytes_per_token=0,
        kv_bytes_per_token=2 * np.dtype(precision.kv).itemsize * kept,
        kv_dtype=precision.kv,
        bos_token_id=None,
        eos_token_ids=[],
        onnxruntime_min="",
        conv_kernel=shape.conv_kernel,
        delta=shape.delta,
    )
