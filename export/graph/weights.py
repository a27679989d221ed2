"""Weights of a model directory, tensor by tensor, into the bundle's external data file.

Every tensor is written once, aligned for memory-mapping; what comes back are references (offset, length, shape) that
several graphs, and several shapes of one tensor, can share.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from devices.common.progress import Progress
from export.bundle.manifest import WEIGHTS
from export.source import ModelSource, Precision, StackedLinear, stack_linears
from saap.quantize.groups import QuantMatrix
from saap.system.errors import UserError

# Fields of Architecture, and the names of their tensors; a family has some of them.
ATTENTION_NORMS = ("attention_norm", "query_norm", "key_norm", "attention_post_norm")
FFN_NORMS = ("ffn_norm", "ffn_post_norm")
ALIGNMENT = 4096  # ONNX Runtime maps external data in pages


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
            _write_linear(source, precision, file, index, "qkv")
            _write_linear(source, precision, file, index, "o")
            _write_norms(source, file, name, prefix, ATTENTION_NORMS)
        if sizes.ffn:
            _write_linear(source, precision, file, index, "gate_up")
            _write_linear(source, precision, file, index, "down")
            _write_norms(source, file, name, prefix, FFN_NORMS)
    file.add("norm", source.norm(arch.final_norm))
    _write_vocabulary(source, precision, file)
    if progress:
        progress("writing weights", count, count)


def _write_norms(source: ModelSource, file: WeightFile, name: str, prefix: str, norms: tuple[str, ...]) -> None:
    for norm in norms:
        if module := getattr(source.architecture, norm):
            file.add(f"{name}.{norm}", source.norm(prefix + module))


def _write_linear(source: ModelSource, precision: Precision, file: WeightFile, layer: int, part: str) -> None:
    name, linear = f"layers.{layer}.{part}", stack_linears(source, precision, layer, part)
    if isinstance(linear.matrix, QuantMatrix):
        file.add(f"{name}.qweight", linear.matrix.qweight.numpy())
        file.add(f"{name}.scales", linear.matrix.scales.flatten().numpy())
        if not symmetric(linear.matrix):  # without zero points the kernel takes the midpoint and is faster
            file.add(f"{name}.zero_points", linear.matrix.zero_points.flatten().numpy())
    else:
        file.add(f"{name}.weight", linear.matrix.t().contiguous().numpy())
    write_bias(file, name, linear)


def write_bias(file: WeightFile, name: str, linear: StackedLinear) -> None:
    """Write it where there is one."""
    if linear.bias is not None:
        file.add(f"{name}.bias", linear.bias.numpy())


def _write_vocabulary(source: ModelSource, precision: Precision, file: WeightFile) -> None:
    arch = source.architecture
    for name, module in (("embedding", arch.embedding), ("head", arch.head)):
        if name == "head" and source.shape.tied:
            continue
        table = source.matrix(module, precision)
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
        raise UserError(f"{module} has zero points other than {2 ** (table.bits - 1)}: quantise it symmetrically")


def symmetric(matrix: QuantMatrix) -> bool:
    """Is every zero point 2^(bits-1)?"""
    expected = 0x88 if matrix.bits == 4 else 0x80
    padded = matrix.bits == 4 and matrix.scales.shape[1] % 2
    whole = matrix.zero_points[:, :-1] if padded else matrix.zero_points
    last = matrix.zero_points[:, -1] & 15 if padded else torch.tensor(8)
    return bool((whole == expected).all() and (last == 8).all())
