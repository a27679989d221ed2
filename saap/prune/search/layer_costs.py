"""Milliseconds of a decoder layer of some sizes, read from a table that was measured on the device.

A decode step is taken as a sum: a constant (embedding, final norm, and the head), and for each layer an
attention block that depends on its heads, a short convolution on its channels or a delta net on its heads, and a
feed-forward block on its width. What lies between those that were measured is interpolated. ``saap devices costs``
measures a table; one table is of one model's hidden size, head size and vocabulary, one precision, one thread count and
one depth of the cache.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from saap.base.costs import AGAIN, CostError, CostFile, FormCost, read_cost_file
from saap.models.shape import ATTENTION, CONV, DELTA, FFN, BlockKind, LayerSizes, ModelShape
from saap.models.slim_quant import MatrixForm


@dataclass(frozen=True)
class CostTable:
    """Milliseconds at one thread count and one depth of the cache."""

    threads: int  # of ONNX Runtime
    depth: int  # tokens in the cache
    constant_ms: float  # of a step without any layer
    attention: dict[tuple[int, int], float]  # (query heads, KV heads) -> ms of the attention block with its norm
    ffn: dict[int, float]  # width -> ms of the feed-forward block with its norm
    conv: dict[int, float] = field(default_factory=dict)  # channels -> ms of the short convolution with its norm
    delta: dict[int, float] = field(default_factory=dict)  # key heads -> ms of the delta net with its norm
    head: dict[int, float] = field(default_factory=dict)  # words of the head -> ms of a step without any layer
    forms: tuple[FormCost, ...] = ()  # what other integers than the table's change

    def share_of(self, part: str, form: MatrixForm) -> float:
        """Milliseconds of attention, FFN or what is outside the layers in other integers, as a share of the table's.

        KeyError: it was not measured.
        """
        form_cost = {MatrixForm(cost.bits, cost.group_size): cost for cost in self.forms}[form]
        ms: float | None = getattr(form_cost, f"{part}_ms", None)
        if ms is None:
            raise KeyError(part)
        whole = {"attention": self.attention[max(self.attention)], "ffn": self.ffn[max(self.ffn)]}
        return ms / whole.get(part, self.constant_ms)

    def forms_of(self, part: str) -> list[MatrixForm]:
        """Other integers than the table's that attention, FFN or what is outside the layers was timed in."""
        timed = [cost for cost in self.forms if getattr(cost, f"{part}_ms", None) is not None]
        return [MatrixForm(cost.bits, cost.group_size) for cost in timed]

    def outside_ms(self, rows: int | None = None) -> float:
        """Milliseconds of a step without any layer; ``None`` is a head of all tokens.

        Raises CostError: the table has no smaller heads.
        """
        if rows is None or rows == max(self.head, default=rows):
            return self.constant_ms
        if len(self.head) < 2:
            raise CostError(f"the cost table has no smaller vocabularies: {AGAIN}, or leave --vocabulary out")
        counts = sorted(self.head)
        return float(np.interp(rows, counts, [self.head[count] for count in counts]))

    def attention_ms(self, query_heads: int, kv_heads: int) -> float:
        """Milliseconds of an attention block, interpolated over the query heads per group, then over the groups.

        Fewer heads than were measured cost what the fewest cost, none cost nothing.

        Raises:
            CostError: more heads than were measured, or heads that the groups do not divide.
        """
        if not query_heads:
            return 0.0
        if not kv_heads or query_heads % kv_heads:
            raise CostError(
                f"{query_heads} query heads on {kv_heads} KV heads have no cost: give a multiple of the KV heads"
            )
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

    def block_ms(self, kind: BlockKind, sizes: LayerSizes) -> float:
        """Milliseconds of one block of a layer, 0 where it has none; CostError where it is larger than measured."""
        if kind is ATTENTION:
            return self.attention_ms(sizes.query_heads, sizes.kv_heads)
        costs = {FFN: (self.ffn, "an FFN width of"), CONV: (self.conv, "short convolutions of"),
                 DELTA: (self.delta, "delta nets of")}  # fmt: skip
        (size,) = kind.sizes
        return _interpolated(*costs[kind], getattr(sizes, size))

    def layer_ms(self, sizes: LayerSizes) -> float:
        return sum(self.block_ms(kind, sizes) for kind in sizes.blocks)

    def total_ms(self, layers: Iterable[LayerSizes], rows: int | None = None) -> float:
        """Milliseconds of a decode step; CostError for a layer larger than what was measured."""
        return self.outside_ms(rows) + sum(map(self.layer_ms, layers))


def _interpolated(measured: dict[int, float], what: str, width: int) -> float:
    if not width:
        return 0.0
    widths = sorted(measured)
    if width > max(widths, default=0):
        raise CostError(
            f"costs were measured up to {what} {max(widths, default=0)}, not for {width}: {AGAIN} on the model "
            "that is pruned"
        )
    return float(np.interp(width, widths, [measured[w] for w in widths]))


def read_costs(
    path: str | Path,
    shape: ModelShape,
    *,
    bits: int,
    group_size: int,
    threads: int | None = None,
    onnxruntime: str | None = None,
) -> CostTable:
    """Read the table for a model and the bundle that will be made of it, whose group size means nothing at 32 bit.

    It is of ``group_size``, or holds what groups of this size change.

    Without ``threads`` the file's only thread count is taken, without ``onnxruntime`` any version.

    Raises:
        CostError: no such file, damaged, of another version, model or precision, or without that thread count.
    """
    path = Path(path)
    if not path.is_file():
        what = f"{path} is a directory" if path.is_dir() else f"there is no {path}"
        raise CostError(f"{what}: give a file of `saap devices costs MODEL -o FILE`")
    file = read_cost_file(path)
    required: dict[str, object] = {
        "hidden": shape.hidden,
        "head_dim": shape.head_dim,
        "vocab": shape.vocab,
        "bits": bits,
    }
    timed = {(cost.bits, cost.group_size) for table in file.threads for cost in table.forms}
    if bits != 32 and (bits, group_size) not in timed:
        required["block"] = group_size
    if other := [name for name in required if file.model.get(name) != required[name]]:
        there, here = (", ".join(f"{name} {of.get(name)}" for name in other) for of in (file.model, required))
        raise CostError(f"{path} was measured for a model with {there}, not {here}: {AGAIN} there")
    version = file.device.get("onnxruntime")
    if onnxruntime not in (None, version):
        raise CostError(f"{path} was measured for ONNX Runtime {version}, not {onnxruntime}: {AGAIN} there")
    return _table(path, file, threads, shape.vocab)


def check_valid(path: Path) -> None:
    """Refuse a table whose times are other programs' as much as the model's."""
    file = read_cost_file(path)
    if file.status == "INVALID":
        raise CostError(
            f"{path} is INVALID ({'; '.join(file.reasons)}): {AGAIN} on a quiet machine, or take it as it is with "
            "--set accept_invalid=true"
        )


def _table(path: Path, file: CostFile, threads: int | None, vocab: int) -> CostTable:
    tables = {table.n_threads: table for table in file.threads}
    if threads is None and len(tables) == 1:
        (threads,) = tables
    if threads is None or threads not in tables:
        known = ", ".join(map(str, sorted(tables)))
        asked = "say for how many threads" if threads is None else f"it has none for {threads}"
        raise CostError(f"{path} holds costs for {known} thread{'s' * (known != '1')}, {asked}: choose one, or {AGAIN}")
    table = tables[threads]
    attention = {(cost.query_heads, cost.kv_heads): cost.ms for cost in table.attention}
    ffn = {cost.width: cost.ms for cost in table.ffn}
    conv = {cost.channels: cost.ms for cost in table.conv}
    delta = {cost.heads: cost.ms for cost in table.delta}
    head = {cost.rows: cost.ms for cost in table.head} | {vocab: table.constant_ms}
    return CostTable(threads, file.depth, table.constant_ms, attention, ffn, conv, delta, head, tuple(table.forms))
