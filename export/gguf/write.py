"""Write a LLaMA-, Mistral- or Qwen2-type directory, dense, slim or tuned, as one GGUF file that llama.cpp runs."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from export.gguf.families import open_source
from export.gguf.layout import GGUFSource, Tensor
from export.gguf.rotary import RotaryFields, rotary_fields
from export.gguf.tensors import KINDS, encode
from export.gguf.tokenizer import TokenizerFields, tokenizer_fields
from saap.base.errors import UserError
from saap.base.progress import Progress, advance
from saap.base.writing import writing_file
from saap.models.record import read_record
from saap.models.weight_files import weights_hash

if TYPE_CHECKING:
    from gguf import GGUFWriter

BITS = {32: "F32", 16: "F16", 8: "Q8_0", 4: "Q4_1"}


@dataclass(frozen=True)
class WrittenMatrix:
    """A matrix of the model in the file."""

    type: str
    relative_error: float  # as in :class:`export.gguf.tensors.Encoded`
    carried: float  # share of its groups taken over as integers


@dataclass(frozen=True)
class GGUFReport:
    """Contents of a GGUF file."""

    file: Path
    bytes: int
    architecture: str  # llama.cpp's name
    kind: str | None  # GGUF type of the linears; None where each tuned matrix has its own
    layers: int
    tensors: dict[str, WrittenMatrix]
    worst_error_carried: float | None  # over the matrices whose groups all were carried over; None without any
    worst_error_rounded: float | None  # over the others
    notes: list[str]  # what differs from what was asked, for a person


def export_gguf(
    model_dir: str | Path,
    out: str | Path,
    *,
    kind: str | None = None,
    head_kind: str | None = None,
    progress: Progress | None = None,
) -> GGUFReport:
    """Write one .gguf file, which appears when it is complete; what is there is written over.

    Args:
        kind: of the linears: F32, F16, Q8_0, Q4_0 or Q4_1; None is Q4_1 for floats and, for tuned integers, the type
            that holds them.
        head_kind: of embedding and head; None is as ``kind``.

    Raises UserError: another architecture, sizes or a tokenizer that a GGUF file cannot hold.
    """
    for each in (kind, head_kind):
        if each is not None and each not in KINDS:
            raise UserError(f"GGUF type {each!r} is not written; allowed: {', '.join(KINDS)}")
    source = open_source(Path(model_dir), kind, head_kind)
    rotary = rotary_fields(source.directory)
    tensors = list(source.tensors(rotary.factors))
    source.check_all_written()
    tokenizer = tokenizer_fields(source.directory, source.shape.vocab)
    with writing_file(Path(out)) as partial:
        writer = _writer(partial, source, rotary, tokenizer)
        written = _write_tensors(writer, tensors, progress)
    return _report(Path(out), source, written, [*source.notes, *rotary.notes, *tokenizer.notes])


def _writer(path: Path, source: GGUFSource, rotary: RotaryFields, tokenizer: TokenizerFields) -> GGUFWriter:
    from gguf import GGUFWriter

    writer, name = GGUFWriter(path, source.name), source.name
    shape, epsilon = source.shape, source.config.get(source.architecture.epsilon, 1e-6)
    for key, values in source.counts().items():
        if source.uniform:
            writer.add_uint32(f"{name}.{key}", values[0])
        else:
            writer.add_array(f"{name}.{key}", values)
    sizes = {
        "block_count": len(source.layers),
        "context_length": rotary.context,
        "embedding_length": shape.hidden,
        "vocab_size": shape.vocab,
        # llama.cpp would derive these from hidden / heads of the first layer.
        "attention.key_length": shape.head_dim,
        "attention.value_length": shape.head_dim,
        "rope.dimension_count": shape.head_dim,
    }
    own = source.fields(rotary)
    for key, value in sizes.items():
        if key not in own:
            writer.add_uint32(f"{name}.{key}", value)
    for key, number in {"attention.layer_norm_rms_epsilon": float(epsilon), **rotary.floats}.items():
        if key not in own:
            writer.add_float32(f"{name}.{key}", number)
    for key, entry in own.items():
        if isinstance(entry, list):
            writer.add_array(f"{name}.{key}", entry)
        elif isinstance(entry, bool):
            writer.add_bool(f"{name}.{key}", entry)
        elif isinstance(entry, float):
            writer.add_float32(f"{name}.{key}", entry)
        else:
            writer.add_uint32(f"{name}.{key}", entry)
    for key, text in rotary.strings.items():
        writer.add_string(f"{name}.{key}", text)
    tokenizer.write(writer)
    _add_provenance(writer, source)
    return writer


def _add_provenance(writer: GGUFWriter, source: GGUFSource) -> None:
    from gguf import LlamaFileType

    record = read_record(source.directory)
    writer.add_string("general.name", source.directory.resolve().name)
    if licence := _licence(source.directory):
        writer.add_string("general.license", licence)
    writer.add_uint32("general.quantization_version", 2)
    if source.kind:
        writer.add_file_type(LlamaFileType["ALL_F32" if source.kind == "F32" else f"MOSTLY_{source.kind}"])
    writer.add_string("saap.model_sha256", weights_hash(source.directory))
    writer.add_string("saap.lineage", json.dumps({"method": record.get("method"), **record.get("lineage", {})}))


def _licence(directory: Path) -> str | None:
    """Read the licence that the model card names; a GGUF file has no room for its text."""
    card = directory / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    licence = re.search(r"^license: *(\S+) *$", text.split("\n---", 1)[0], re.MULTILINE)
    return licence.group(1) if licence else None


def _write_tensors(writer: GGUFWriter, tensors: list[Tensor], progress: Progress | None) -> dict[str, WrittenMatrix]:
    """Write the header, then tensor by tensor; returns what became of each matrix."""
    try:
        write_header(writer, [(tensor.name, tensor.shape, tensor.kind) for tensor in tensors])
    except (struct.error, OverflowError) as error:
        raise UserError(f"a GGUF file cannot hold a number of the model ({error}): mend its config.json") from None
    written: dict[str, WrittenMatrix] = {}
    for index, tensor in enumerate(tensors):
        advance(progress, "writing GGUF (tensors)", index, len(tensors))
        values = tensor.load()
        tensor.check(values)
        if isinstance(values, torch.Tensor) and (values.dim() == 1 or (not tensor.measured and tensor.kind == "F32")):
            writer.write_tensor_data(values.float().numpy())
            continue
        matrix = encode(values, tensor.kind)
        writer.write_tensor_data(matrix.data)
        if tensor.measured:
            written[tensor.name] = WrittenMatrix(tensor.kind, matrix.error, matrix.carried)
    writer.close()
    advance(progress, "writing GGUF (tensors)", len(tensors), len(tensors))
    return written


def write_header(writer: GGUFWriter, tensors: Iterable[tuple[str, tuple[int, ...], str]]) -> None:
    """Write the fields, and the name, shape and GGUF type of each tensor."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quant_shape_to_byte_shape

    for name, shape, kind in tensors:
        floats, raw = {"F16": np.float16, "F32": np.float32}.get(kind), GGMLQuantizationType[kind]
        stored, dtype = shape if floats else quant_shape_to_byte_shape(shape, raw), np.dtype(floats or np.uint8)
        writer.add_tensor_info(name, stored, dtype, int(np.prod(stored)) * dtype.itemsize, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def _report(out: Path, source: GGUFSource, written: dict[str, WrittenMatrix], notes: list[str]) -> GGUFReport:
    whole = [m.relative_error for m in written.values() if m.carried == 1]
    rounded = [m.relative_error for m in written.values() if m.carried < 1 and m.type != "F32"]
    if source.quant and rounded:
        notes.append(
            f"{len(rounded)} tuned matrices have groups that their GGUF type cannot hold as they are: rounded again, "
            f"worst error {max(rounded):.2%} of a group's largest weight"
        )
    return GGUFReport(
        file=out,
        bytes=out.stat().st_size,
        architecture=source.name,
        kind=source.kind,
        layers=len(source.layers),
        tensors=written,
        worst_error_carried=max(whole, default=None),
        worst_error_rounded=max(rounded, default=None),
        notes=notes,
    )
