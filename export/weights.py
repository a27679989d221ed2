"""Weights of a model directory, tensor by tensor, into the bundle's external data file.

Every tensor is written once, aligned for memory-mapping; what comes back are references (offset, length, shape) that
several graphs, and several shapes of one tensor, can share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from export.bundle import WEIGHTS
from saap.architectures import Architecture, architecture_of, shape_of
from saap.checkpoint import read_config, tensor_reader
from saap.errors import SaapError
from saap.group_quant import QuantMatrix, check_blocks, quantize
from saap.structures import ModelShape

# Fields of Architecture, and the names of their tensors; a family has some of them.
ATTENTION_NORMS = ("attention_norm", "query_norm", "key_norm", "attention_post_norm")
FFN_NORMS = ("ffn_norm", "ffn_post_norm")
ALIGNMENT = 4096  # ONNX Runtime maps external data in pages
Progress = Callable[[str, float, float], None]


class WeightFile:
    """Appends arrays to the external data file and remembers where each went; floats are stored as ``floats``."""

    def __init__(self, directory: Path, floats: str = "float32") -> None:
        self.directory, self.floats = directory, np.dtype(floats)
        self.tensors: dict[str, ir.ExternalTensor] = {}
        self._file = (directory / WEIGHTS).open("wb")

    def add(self, name: str, array: np.ndarray) -> None:
        """Write an array under a name."""
        self._file.seek(-(-self._file.tell() // ALIGNMENT) * ALIGNMENT)
        offset = self._file.tell()
        array = np.ascontiguousarray(array, dtype=self.floats if array.dtype.kind == "f" else None)
        self._file.write(array.data if array.ndim else array.tobytes())
        self.tensors[name] = self._reference(name, offset, array.nbytes, array.dtype, array.shape)

    def alias(self, name: str, of: str, shape: tuple[int, ...]) -> None:
        """Give the bytes of a tensor a second name and shape."""
        old = self.tensors[of]
        self.tensors[name] = self._reference(name, old.offset or 0, old.nbytes, old.dtype.numpy(), shape)

    def _reference(self, name: str, offset: int, length: int, dtype: Any, shape: tuple[int, ...]) -> ir.ExternalTensor:
        return ir.ExternalTensor(
            WEIGHTS,
            offset,
            length,
            ir.DataType.from_numpy(np.dtype(dtype)),
            shape=ir.Shape(shape),
            name=name,
            base_dir=str(self.directory),
        )

    def bytes_per_token(self, tied: bool) -> int:
        """Bytes of layers, norms and head, which every token reads; an embedding of its own is only looked up."""
        head = "embedding." if tied else "head."
        read = [t for name, t in self.tensors.items() if name.startswith(("layers.", head)) or name == "norm"]
        return sum({tensor.offset: tensor.nbytes for tensor in read}.values())  # two names of one tensor count once

    def flush(self) -> None:
        """Let others read what was written so far."""
        self._file.flush()

    def close(self) -> None:
        """Finish the file."""
        self._file.close()


@dataclass(frozen=True)
class Precision:
    """What the graph computes in and how its weights are stored.

    Attributes:
        bits: of the linears: 4, 8, or 32 for floats (of type ``floats``).
        block: quantisation group; 0 at 32 bit.
        head_bits: of embedding and head.
        accuracy_level: of MatMulNBits.
        floats: type of activations, scales, norms and float weights: float32 or float16.
        kv: type of the KV cache: ``floats``, or int8.
    """

    bits: int = 4
    block: int = 32
    head_bits: int = 4
    accuracy_level: int = 4
    floats: str = "float32"
    kv: str = "float32"


class ModelSource:
    """A dense, slim or tuned directory as the exporter sees it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = read_config(directory)
        self.architecture: Architecture = architecture_of(self.config)
        self.shape: ModelShape = shape_of(self.config)
        self.names, self.read = tensor_reader(directory)
        self.quant: dict[str, Any] | None = self.config.get("slim_quant")

    def precision(self, bits: int | None, block: int | None, head_bits: int | None) -> Precision:
        """What to export at; a tuned directory has its own integers and refuses others."""
        if self.quant:
            own = Precision(self.quant["bits"], self.quant["block"], self.quant["embedding_bits"])
            for asked, has, what in ((bits, own.bits, "bits"), (block, own.block, "group size")):
                if asked is not None and asked != has:
                    raise SaapError(
                        f"{self.directory} holds tuned integers of {has} {what}, not {asked}: leave the option out"
                    )
            return own
        bits = 4 if bits is None else bits
        if bits not in (4, 8, 32):
            raise SaapError(f"{bits} bits are not supported; allowed: 4, 8, 32")
        return Precision(bits, 0 if bits == 32 else block or 32, 32 if bits == 32 else head_bits or bits)

    def matrix(self, module: str, bits: int, block: int) -> torch.Tensor | QuantMatrix:
        """One linear (or the embedding): float [N, K] at 32 bit, integers otherwise."""
        if self.quant:
            qweight, scales, zero_points = (self.read(f"{module}.{part}") for part in QuantMatrix.PARTS)
            return QuantMatrix(qweight, scales, zero_points, bits, block)
        weight = self.tensor(f"{module}.weight").float()
        if bits == 32:
            return weight
        check_blocks(weight.shape[1], block, module)
        return quantize(weight, bits, block)

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor of the checkpoint.

        Raises:
            SaapError: the checkpoint does not hold what the config promises.
        """
        if name not in self.names:
            raise SaapError(
                f"{self.directory} has no tensor {name}, which its config.json asks for: get the model again"
            )
        return self.read(name)

    def norm(self, module: str) -> np.ndarray:
        """The factors of a norm, [width] float32."""
        return (self.tensor(f"{module}.weight").float() + float(self.architecture.offset_norms)).numpy()

    def bias(self, module: str) -> torch.Tensor | None:
        """The bias of a linear, or None."""
        name = f"{module}.bias"
        return self.read(name).float() if name in self.names else None


def write_weights(
    source: ModelSource, precision: Precision, file: WeightFile, progress: Progress | None = None
) -> None:
    """Write all tensors of the decoder graph, one layer at a time."""
    arch, count = source.architecture, len(source.shape.layers)
    for index, sizes in enumerate(source.shape.layers):
        if progress:
            progress("writing weights", index, count)
        name, prefix = f"layers.{index}", f"{arch.layers}.{index}."
        if sizes.query_heads:
            _write_linear(source, precision, file, f"{name}.qkv", [prefix + module for module in arch.qkv])
            _write_linear(source, precision, file, f"{name}.o", [prefix + arch.output])
            _write_norms(source, file, name, prefix, ATTENTION_NORMS)
        if sizes.ffn:
            _write_linear(source, precision, file, f"{name}.gate_up", [prefix + module for module in arch.gate_up])
            _write_linear(source, precision, file, f"{name}.down", [prefix + arch.down])
            _write_norms(source, file, name, prefix, FFN_NORMS)
    file.add("norm", source.norm(arch.final_norm))
    _write_vocabulary(source, precision, file)
    if progress:
        progress("writing weights", count, count)


def _write_norms(source: ModelSource, file: WeightFile, name: str, prefix: str, norms: tuple[str, ...]) -> None:
    for norm in norms:
        if module := getattr(source.architecture, norm):
            file.add(f"{name}.{norm}", source.norm(prefix + module))


def _write_linear(source: ModelSource, precision: Precision, file: WeightFile, name: str, modules: list[str]) -> None:
    """One or several linears over the same input as one matrix: rows of N are independent, so they are stacked."""
    parts = [source.matrix(m, precision.bits, precision.block) for m in modules]
    packed = [p for p in parts if isinstance(p, QuantMatrix)]
    if packed:
        file.add(f"{name}.qweight", torch.cat([p.qweight for p in packed]).numpy())
        file.add(f"{name}.scales", torch.cat([p.scales.float() for p in packed]).flatten().numpy())
        if not all(symmetric(p) for p in packed):  # without zero points the kernel takes the midpoint and is faster
            file.add(f"{name}.zero_points", torch.cat([p.zero_points for p in packed]).flatten().numpy())
    else:
        stacked = torch.cat([p for p in parts if isinstance(p, torch.Tensor)])
        file.add(f"{name}.weight", stacked.t().contiguous().numpy())
    biases = [source.bias(m) for m in modules]
    if any(b is not None for b in biases):
        rows = [p.qweight.shape[0] if isinstance(p, QuantMatrix) else p.shape[0] for p in parts]
        filled = [b if b is not None else torch.zeros(n) for b, n in zip(biases, rows, strict=True)]
        file.add(f"{name}.bias", torch.cat(filled).numpy())


def _write_vocabulary(source: ModelSource, precision: Precision, file: WeightFile) -> None:
    arch = source.architecture
    for name, module in (("embedding", arch.embedding), ("head", arch.head)):
        if name == "head" and source.shape.tied:
            continue
        table = source.matrix(module, precision.head_bits, precision.block)
        if isinstance(table, QuantMatrix):
            _require_midpoint(table, module)
            file.add(f"{name}.qweight", table.qweight.numpy())
            file.add(f"{name}.scales", table.scales.float().flatten().numpy())
            # The gather wants one more axis on the same numbers.
            file.alias(f"{name}.scales3", f"{name}.scales", (*table.scales.shape, 1))
        else:
            file.add(f"{name}.weight", table.numpy())


def _require_midpoint(table: QuantMatrix, module: str) -> None:
    """The graph leaves the zero points of the vocabulary out, which means 2^(bits-1)."""
    if not symmetric(table):
        raise SaapError(f"{module} has zero points other than {2 ** (table.bits - 1)}: quantise it symmetrically")


def symmetric(matrix: QuantMatrix) -> bool:
    """Is every zero point 2^(bits-1)?"""
    expected = 0x88 if matrix.bits == 4 else 0x80
    padded = matrix.bits == 4 and matrix.scales.shape[1] % 2
    whole = matrix.zero_points[:, :-1] if padded else matrix.zero_points
    last = matrix.zero_points[:, -1] & 15 if padded else torch.tensor(8)
    return bool((whole == expected).all() and (last == 8).all())
