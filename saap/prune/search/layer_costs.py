"""What a decoder layer of some sizes costs on a device: milliseconds, read from the table that was measured there.

A decode step is taken as a sum: a constant (embedding, final norm, head), and for each layer an attention block that
depends on its heads and a feed-forward block that depends on its width. Widths and heads between those that were
measured are interpolated. ``saap devices costs`` measures a table; one table is of one model's hidden size,
head size and vocabulary, one precision, one thread count and one depth of the cache.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from saap.models.shape import LayerSizes, ModelShape
from saap.system.errors import UserError
from saap.system.files import read_object

SCHEMA = 1
KIND = "saap costs"
MOST = 1e9  # milliseconds, heads, channels: what is above is damage
AGAIN = "measure it again with `saap devices costs`"


class CostError(UserError):
    """A table of costs that cannot be used; the message names the file and what to do."""


@dataclass(frozen=True)
class CostTable:
    """Milliseconds at one thread count and one depth of the cache.

    Attributes:
        threads: of ONNX Runtime.
        depth: tokens in the cache.
        constant_ms: of a step without any layer.
        node_ms: of a node of the graph apart from its arithmetic; None where it could not be told.
        attention: (query heads, KV heads) -> ms of the attention block with its norm.
        ffn: width -> ms of the feed-forward block with its norm.
    """

    threads: int
    depth: int
    constant_ms: float
    node_ms: float | None
    attention: dict[tuple[int, int], float]
    ffn: dict[int, float]

    def attention_ms(self, query_heads: int, kv_heads: int) -> float:
        """Milliseconds of an attention block; 0 heads cost nothing.

        Interpolated over the query heads per group, then over the groups. Fewer heads than were measured cost what the
        fewest cost.

        Raises:
            CostError: more heads than were measured, or heads that the groups do not divide.
        """
        if not query_heads:
            return 0.0
        if not kv_heads or query_heads % kv_heads:
            raise CostError(f"{query_heads} query heads on {kv_heads} KV heads have no cost: must be a multiple")
        per_group = query_heads // kv_heads
        groups = sorted({kv for _, kv in self.attention})
        most = max(query // kv for query, kv in self.attention)
        if kv_heads > groups[-1] or per_group > most:
            raise CostError(
                f"costs were measured up to {groups[-1]} KV heads of {most} query heads each, not for "
                f"{kv_heads} of {per_group}: {AGAIN} on the model that is pruned"
            )
        return float(np.interp(kv_heads, groups, [self._row_ms(kv, per_group) for kv in groups]))

    def _row_ms(self, kv_heads: int, per_group: int) -> float:
        row = {query // kv: ms for (query, kv), ms in self.attention.items() if kv == kv_heads}
        counts = sorted(row)
        return float(np.interp(per_group, counts, [row[count] for count in counts]))

    def ffn_ms(self, width: int) -> float:
        """Milliseconds of a feed-forward block; width 0 costs nothing, one below the narrowest what that costs.

        Raises:
            CostError: wider than was measured.
        """
        if not width:
            return 0.0
        widths = sorted(self.ffn)
        if width > widths[-1]:
            raise CostError(
                f"costs were measured up to an FFN width of {widths[-1]}, not for {width}: {AGAIN} on the model "
                "that is pruned"
            )
        return float(np.interp(width, widths, [self.ffn[w] for w in widths]))

    def layer_ms(self, query_heads: int, kv_heads: int, ffn: int) -> float:
        """Milliseconds of a layer: its attention and its feed-forward block.

        Raises:
            CostError: larger than what was measured.
        """
        return self.attention_ms(query_heads, kv_heads) + self.ffn_ms(ffn)

    def total_ms(self, layers: Iterable[LayerSizes]) -> float:
        """Milliseconds of a decode step of a model with these layers.

        Raises:
            CostError: a layer larger than what was measured.
        """
        return self.constant_ms + sum(self.layer_ms(s.query_heads, s.kv_heads, s.ffn) for s in layers)


def read_costs(
    path: str | Path,
    shape: ModelShape,
    *,
    bits: int,
    group_size: int,
    threads: int | None = None,
    onnxruntime: str | None = None,
) -> CostTable:
    """Read the table for a model.

    Args:
        shape: of the model that is pruned: hidden size, head size and vocabulary must be the table's.
        bits: of the bundle that will be made.
        group_size: its weights per scale; means nothing at 32 bit.
        threads: which of the file's thread counts; None takes the only one.
        onnxruntime: version that will run it; None accepts any.

    Raises:
        CostError: no such file, truncated, not a table of costs, of another version, model or precision, or without
            that thread count.
    """
    path = Path(path)
    if not path.is_file():
        raise CostError(f"{path} is not a file: make one with `saap devices costs MODEL -o {path.name}`")
    try:
        raw = read_object(path, AGAIN)
    except UserError as error:
        raise CostError(str(error)) from None
    if raw.get("kind") != KIND:
        raise CostError(f"{path} is not a table of costs: make one with `saap devices costs`")
    if raw.get("schema") != SCHEMA:
        raise CostError(f"{path} has schema {raw.get('schema')!r} of costs, this saap reads {SCHEMA}: {AGAIN}")
    try:
        wanted = {"hidden": shape.hidden, "head_dim": shape.head_dim, "vocab": shape.vocab, "bits": bits}
        if bits != 32:
            wanted["block"] = group_size
        _same(path, "a model", {name: raw["model"][name] for name in wanted}, wanted)
        _same(path, "ONNX Runtime", raw["device"]["onnxruntime"], onnxruntime)
        return _table(path, raw, threads)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise CostError(f"{path} is damaged ({type(error).__name__} {error}): {AGAIN}") from None


def _same(path: Path, what: str, found: Any, wanted: Any) -> None:
    if wanted is None or found == wanted:
        return
    if isinstance(wanted, dict):
        names = [name for name in wanted if found[name] != wanted[name]]
        found, wanted = (", ".join(f"{name} {of[name]}" for name in names) for of in (found, wanted))
        what = f"{what} with"
    raise CostError(f"{path} was measured for {what} {found}, not {wanted}: {AGAIN} there")


def _table(path: Path, raw: dict[str, Any], threads: int | None) -> CostTable:
    tables = {table["n_threads"]: table for table in raw["threads"]}
    if threads is None and len(tables) == 1:
        (threads,) = tables
    if threads is None or threads not in tables:
        known = ", ".join(map(str, sorted(tables)))
        asked = "say for how many threads" if threads is None else f"it has none for {threads}"
        raise CostError(f"{path} holds costs for {known} threads, {asked}: choose one, or {AGAIN}")
    table = tables[threads]
    found = CostTable(
        threads=threads,
        depth=raw["depth"],
        constant_ms=table["constant_ms"],
        node_ms=table["node_ms"],
        attention={(cost["query_heads"], cost["kv_heads"]): cost["ms"] for cost in table["attention"]},
        ffn={cost["width"]: cost["ms"] for cost in table["ffn"]},
    )
    for ms in (found.constant_ms, *found.attention.values(), *found.ffn.values()):
        if type(ms) not in (int, float) or not -MOST <= ms <= MOST:
            raise TypeError(f"{str(ms)[:20]} ms")
    for count in (found.depth, *(heads for pair in found.attention for heads in pair), *found.ffn):
        if type(count) is not int or not 0 < count <= MOST:
            raise TypeError(f"size {str(count)[:20]}")
    if not found.attention or not found.ffn:
        raise KeyError("attention or ffn")
    return found
