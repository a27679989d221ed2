"""``cost.json``: what the parts of a decode step cost on a device, as ``bench`` writes it and pruning reads it.

docs/formats.md says what the fields mean. Milliseconds may be negative: they are differences of measurements.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated

from msgspec import Meta

from saap.base.documents import Document
from saap.base.errors import UserError

MOST = 1_000_000_000  # milliseconds, heads, channels: a larger number is damage
AGAIN = "measure it again with `saap devices costs`"
DEVICE = ("board", "cpu_model", "fingerprint", "onnxruntime")  # what a plan's record keeps of the device
Milliseconds = Annotated[float, Meta(ge=-MOST, le=MOST)]
Count = Annotated[int, Meta(ge=1, le=MOST)]


class CostError(UserError):
    """A table of costs that cannot be used; the message names the file and what to do."""


@dataclass(frozen=True)
class AttentionCost:
    """An attention block with its norm, at the document's depth of the cache."""

    query_heads: Count
    kv_heads: Count
    ms: Milliseconds


@dataclass(frozen=True)
class FfnCost:
    """A feed-forward block with its norm."""

    width: Count
    ms: Milliseconds


@dataclass(frozen=True)
class ConvCost:
    """A short convolution with its norm."""

    channels: Count
    ms: Milliseconds


@dataclass(frozen=True)
class DeltaCost:
    """A gated delta net with its norm."""

    heads: Count  # key heads
    ms: Milliseconds


@dataclass(frozen=True)
class HeadCost:
    """A step outside its layers, with a head of this many vocabulary rows."""

    rows: Count
    ms: Milliseconds


@dataclass(frozen=True)
class FormCost:
    """The model's own blocks, and a step outside its layers, in other integers than the table's.

    Where only some matrices of a block can have them, a block that had no others; None where none can.
    """

    bits: Count
    group_size: Count
    attention_ms: Milliseconds | None = None
    ffn_ms: Milliseconds | None = None
    outside_ms: Milliseconds | None = None


@dataclass(frozen=True)
class ThreadCosts:
    """The costs at one thread count. ``constant_ms``: embedding, final norm, head and choice of the token."""

    n_threads: Count
    constant_ms: Milliseconds
    attention: Annotated[list[AttentionCost], Meta(min_length=1)]
    ffn: Annotated[list[FfnCost], Meta(min_length=1)]
    conv: list[ConvCost] = field(default_factory=list)  # in families that have such layers
    delta: list[DeltaCost] = field(default_factory=list)  # in families that have such layers
    head: list[HeadCost] = field(default_factory=list)  # smaller vocabularies
    forms: list[FormCost] = field(default_factory=list)  # other integers


@dataclass(frozen=True)
class CostFile:
    """The part of the document that planning reads."""

    kind: str
    device: dict[str, object]
    model: dict[str, object]
    depth: Count
    threads: list[ThreadCosts]
    engine: str = "onnxruntime"
    status: str = "OK"  # or INVALID, for the reasons
    reasons: list[str] = field(default_factory=list)


def _check(file: CostFile) -> None:
    if file.kind != "saap costs":
        raise ValueError(f"{file.kind!r} is no table of costs")
    for name in DEVICE:
        if not isinstance(value := file.device.get(name), str | None):
            raise ValueError(f"device.{name} is {str(value)[:40]}: a text or null is allowed")


COSTS = Document(CostFile, "costs", AGAIN, version="schema", check=_check, error=CostError, mark="threads")


def read_cost_file(path: str | Path) -> CostFile:
    """Read a table; the same content is parsed once. Raises CostError: no such file, damaged, or of another version."""
    return _parsed(COSTS.content(path), str(path))


_parsed = lru_cache(maxsize=1)(COSTS.parse)
