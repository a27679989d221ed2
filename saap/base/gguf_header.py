"""Sizes of a GGUF file from its header, without llama.cpp or the gguf package.

The layout is that of the GGUF specification (ggml, ``docs/gguf.md``), versions 2 and 3, little endian: magic, version,
counts, key-value pairs, tensor descriptions, padding, data. Only descriptions are read, never the weights.
It stands in the lowest layer because the bench counts with it, and the core checks a file with it before a library
believes that file.
"""

from __future__ import annotations

import mmap
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import cast

from saap.base.errors import UserError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
Value = bool | int | float | str | tuple["Value", ...]
_MOST_DIMENSIONS = 4  # of ggml
_MOST = 1 << 31  # a count above this is damage, not a model

# ggml type: name, bits per weight in name only, weights per block, bytes per block (ggml-common.h).
_TYPES = {
    0: ("F32", 32, 1, 4), 1: ("F16", 16, 1, 2), 30: ("BF16", 16, 1, 2),
    2: ("Q4_0", 4, 32, 18), 3: ("Q4_1", 4, 32, 20), 6: ("Q5_0", 5, 32, 22), 7: ("Q5_1", 5, 32, 24),
    8: ("Q8_0", 8, 32, 34), 10: ("Q2_K", 2, 256, 84), 11: ("Q3_K", 3, 256, 110), 12: ("Q4_K", 4, 256, 144),
    13: ("Q5_K", 5, 256, 176), 14: ("Q6_K", 6, 256, 210), 20: ("IQ4_NL", 4, 32, 18), 23: ("IQ4_XS", 4, 256, 136),
}  # fmt: skip


class GgufHeaderError(UserError):
    """A file that is no GGUF, or is damaged; one line that names it."""


@dataclass(frozen=True)
class Tensor:
    """A tensor of the file: its shape, fastest dimension first, ggml's type id and where its data starts."""

    shape: tuple[int, ...]
    type_id: int
    offset: int  # from the start of the data

    @property
    def type_name(self) -> str:
        """Such as Q4_0; a type that is not known here by its number."""
        return _TYPES[self.type_id][0] if self.type_id in _TYPES else f"type {self.type_id}"

    @property
    def bits(self) -> int | None:
        """Bits of a weight, scales apart; None for a type that is not known here."""
        return _TYPES[self.type_id][1] if self.type_id in _TYPES else None

    @property
    def bytes(self) -> int | None:
        """Bytes of its data; None for a type that is not known here."""
        if self.type_id not in _TYPES:
            return None
        _, _, block, size = _TYPES[self.type_id]
        return prod(self.shape) // block * size


@dataclass(frozen=True)
class GgufHeader:
    """Metadata (an array of strings is kept as its length) and tensors by name."""

    metadata: Mapping[str, Value]
    tensors: Mapping[str, Tensor]

    def counts(self, key: str) -> tuple[int, ...]:
        """Return the values of ``<architecture>.key``: one for all layers or one for each; empty if not there."""
        value = self.metadata.get(f"{self.metadata.get('general.architecture')}.{key}")
        return tuple(each for each in (value if isinstance(value, tuple) else (value,)) if isinstance(each, int))

    def _count(self, key: str) -> int | None:
        return next(iter(self.counts(key)), None) or None

    @property
    def vocab_size(self) -> int | None:
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        return tokens if tokens and isinstance(tokens, int) else self._count("vocab_size")

    @property
    def context_length(self) -> int | None:
        return self._count("context_length")

    @property
    def bits(self) -> int | None:
        """Bits of most of the layers' weight bytes."""
        sizes: Counter[int] = Counter()
        for name, tensor in self.tensors.items():
            if name.startswith("blk.") and tensor.bits and tensor.bytes:
                sizes[tensor.bits] += tensor.bytes
        return sizes.most_common(1)[0][0] if sizes else None

    @property
    def weight_bytes_per_token(self) -> int | None:
        """Bytes of all tensors; a table that is only looked up in (there is an ``output.weight``) is left out."""
        looked_up = {"token_embd.weight"} if "output.weight" in self.tensors else set()
        sizes = [tensor.bytes for name, tensor in self.tensors.items() if name not in looked_up]
        return None if None in sizes else sum(size or 0 for size in sizes)

    def kv_bytes_per_token(self, bytes_per_value: int) -> int | None:
        """Bytes that one token adds to the cache, with values of so many bytes; None where sizes are not given."""
        layers, width = self._count("block_count"), self._count("embedding_length")
        heads = self.counts("attention.head_count")
        if not layers or not width or not any(heads):
            return None
        key = self._count("attention.key_length") or width // max(heads)
        value = self._count("attention.value_length") or width // max(heads)
        kv_heads = self.counts("attention.head_count_kv") or heads
        count = sum(kv_heads) if len(kv_heads) > 1 else layers * kv_heads[0]
        return count * (key + value) * bytes_per_value


def read_header(path: str | Path) -> GgufHeader:
    """Read the header of ``path``.

    Raises GgufHeaderError: no such file, no GGUF, big endian or version 1, or cut off.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise GgufHeaderError(f"{path} is no GGUF file: give one that llama.cpp reads")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(_Cursor(data, 4), path)
    except OSError as error:
        raise GgufHeaderError(f"{path} cannot be read ({error.strerror}): give a GGUF file") from None
    except GgufHeaderError:
        raise
    except (struct.error, LookupError, ValueError, TypeError, OverflowError, RecursionError):
        raise GgufHeaderError(f"{path} is damaged or cut off: get the GGUF file again") from None


class _Cursor:
    """Reads little-endian values one after the other."""

    def __init__(self, data: mmap.mmap, position: int) -> None:
        self.data, self.position = data, position

    def scalar(self, code: str) -> Value:
        values: tuple[Value] = struct.unpack_from("<" + code, self.data, self.position)
        self.position += struct.calcsize("<" + code)
        return values[0]

    def read(self, code: str) -> int:
        return cast("int", self.scalar(code))

    def count(self) -> int:
        number = self.read("Q")
        if number > _MOST:
            raise OverflowError(number)
        return number

    def string(self) -> str:
        return self.skip_string().decode("utf-8")

    def skip_string(self) -> bytes:
        size = self.count()
        start, self.position = self.position, self.position + size
        return self.data[start : self.position]

    def value(self, kind: int) -> Value:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalar(_SCALARS[kind])
        inner, size = self.read("I"), self.count()
        if inner == _STRING:
            for _ in range(size):
                self.skip_string()
            return size
        return tuple(self.value(inner) for _ in range(size))


def _parse(cursor: _Cursor, path: Path) -> GgufHeader:
    version = cursor.read("I")
    if version not in (2, 3):
        raise GgufHeaderError(f"{path} has GGUF version {version}, 2 and 3 are read: convert it again")
    tensor_count, pair_count = cursor.count(), cursor.count()
    metadata = {}
    for _ in range(pair_count):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.read("I"))
    tensors = {}
    for _ in range(tensor_count):
        name = cursor.string()
        if (dimensions := cursor.read("I")) > _MOST_DIMENSIONS:
            raise GgufHeaderError(f"{path} is damaged (a tensor of {dimensions} dimensions): get the GGUF file again")
        shape = tuple(cursor.count() for _ in range(dimensions))
        tensors[name] = Tensor(shape, cursor.read("I"), cursor.read("Q"))  # checked against the length below
    alignment = cast("int", metadata.get("general.alignment") or 32)
    start = -(-cursor.position // alignment) * alignment
    if any(start + tensor.offset + (tensor.bytes or 0) > len(cursor.data) for tensor in tensors.values()):
        raise GgufHeaderError(f"{path} is damaged or cut off: get the GGUF file again")
    return GgufHeader(metadata, tensors)
