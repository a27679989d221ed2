"""A model directory as the layers and tensors of a GGUF file.

Where all layers are alike the file is of llama.cpp's architecture ``llama``, else of ``deci``, whose head counts and
FFN widths are arrays with one entry per layer. ``deci`` runs a layer without attention as 0 heads, but not as layer 0,
and drops the attention of a layer whose FFN width is 0. So layer 0 without attention becomes its "linear attention"
(one head, no KV heads) with a zero matrix, and a missing FFN becomes a zero one of width 32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from export.gguf.rotary import RotaryFields
from export.gguf.tensors import BLOCK
from export.source import ModelSource, check_symmetric
from saap.base.errors import UserError
from saap.models.architectures import FAMILIES, SLIM
from saap.models.checkpoint import read_config
from saap.models.shape import ATTENTION, FFN, LayerSizes
from saap.models.slim_quant import module_form
from saap.quantize.groups import QuantMatrix


@dataclass(frozen=True)
class Tensor:
    """A tensor of the file: its sizes and type are known at once, its numbers are read when they are written.

    ``measured``: a matrix of the model, whose error is reported; not so norms, biases and what fills a gap.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    load: Callable[[], QuantMatrix | torch.Tensor]
    measured: bool = False

    def check(self, values: QuantMatrix | torch.Tensor) -> None:
        """Raise UserError if the values have other sizes than config.json says."""
        if isinstance(values, QuantMatrix):
            rows, groups, _ = values.qweight.shape
            shape: tuple[int, ...] = (rows, groups * values.group_size)
        else:
            shape = tuple(values.shape)
        if shape != self.shape:
            raise UserError(f"{self.name} is {shape} in the weights and {self.shape} by config.json: make them again")


@dataclass(frozen=True)
class Family:
    """One architecture of llama.cpp: its name, what may differ by layer, and the names of norms."""

    name: str
    output_norm: str = "output_norm"
    ffn_norm: str = "ffn_norm"
    attention_post_norm: str = ""
    ffn_post_norm: str = ""
    pairs: bool = False  # its rotary turns neighbours, as that of ``llama`` and ``deci``, not the two halves of a head
    biases: bool = False


LLAMA = Family("deci", pairs=True, biases=True)  # or ``llama``, where all layers are alike


class GGUFSource(ModelSource):
    """A model directory as the layers and tensors of a GGUF file.

    Attributes:
        layers: (index in the directory, sizes there) of the layers that are written.
        notes: what differs from what was asked.
    """

    def __init__(self, directory: Path, kind: str | None, head_kind: str | None) -> None:
        model_type = model_type_of(directory)
        *others, last = (name for name, row in FAMILIES.items() if row.gguf != "no")
        if not self.holds(model_type):
            raise UserError(
                f"{directory} is of type {model_type!r}: GGUF files are written of {', '.join(others)} and {last} "
                "models; export it for the cpu target"
            )
        super().__init__(directory)
        if self.words is not None:
            raise UserError(
                f"llama.cpp has one vocabulary for input and output, and the head of {directory} predicts "
                f"{len(self.words)} of {self.shape.vocab} tokens: prune it with --vocabulary-input, or export it "
                "for the cpu target"
            )
        self.kind = kind or (None if self.quant else "Q4_1")
        self.head_kind = head_kind or self.kind
        self.layers = [(i, s) for i, s in enumerate(self.shape.layers) if s.query_heads or s.ffn]
        self.notes: list[str] = []
        self._written: set[str] = set()
        self._family = LLAMA
        quantised = any(k not in ("F32", "F16") for k in (self.kind, self.head_kind))
        if quantised and self.shape.hidden % BLOCK:
            raise UserError(
                f"{directory} has a hidden size of {self.shape.hidden}, not a multiple of the {BLOCK} columns of a "
                "quantised GGUF block: choose F16 or F32"
            )

    @classmethod
    def holds(cls, model_type: str) -> bool:
        """Whether a family, without the mark of slim models, is written so."""
        return model_type in FAMILIES and FAMILIES[model_type].gguf != "no"

    def fields(self, rotary: RotaryFields) -> Mapping[str, int | float | bool | list[int] | list[bool]]:
        """Fields of this architecture alone, below its name; they win over those of all."""
        return {}

    @property
    def uniform(self) -> bool:
        """Whether llama.cpp's plain ``llama`` architecture holds the model."""
        first = self.layers[0][1]
        return len({sizes for _, sizes in self.layers}) == 1 and bool(first.query_heads and first.ffn)

    @property
    def name(self) -> str:
        return "llama" if self.uniform else self._family.name

    def counts(self) -> dict[str, list[int]]:
        """Head counts and FFN widths as the file states them, one per layer."""
        layers = [sizes for _, sizes in self.layers]
        if not layers[0].query_heads:  # its "linear attention"
            layers[0] = replace(layers[0], query_heads=1)
        return {
            "attention.head_count": [sizes.query_heads for sizes in layers],
            "attention.head_count_kv": [sizes.kv_heads for sizes in layers],
            "feed_forward_length": [sizes.ffn or BLOCK for sizes in layers],
        }

    def tensors(self, rope_factors: torch.Tensor | None) -> Iterator[Tensor]:
        """Every tensor of the file, in its order; ``rope_factors`` [head_dim / 2] float32."""
        arch, hidden, vocab = self.architecture, self.shape.hidden, self.shape.vocab
        yield self._matrix("token_embd", arch.embedding, vocab, hidden, self.head_kind)
        yield from self._tables(rope_factors)
        for index, (old, sizes) in enumerate(self.layers):
            yield from self._layer(f"{arch.layers}.{old}.", f"blk.{index}.", sizes, index)
        yield self._norm(self._family.output_norm, arch.final_norm)
        if not self.shape.tied:
            yield self._matrix("output", arch.head, vocab, hidden, self.head_kind)

    def _tables(self, rope_factors: torch.Tensor | None) -> Iterator[Tensor]:
        """Yield what all layers read."""
        if rope_factors is not None:
            yield vector("rope_freqs.weight", rope_factors)

    def check_all_written(self) -> None:
        """Refuse a directory with tensors that llama.cpp's architecture does not have."""
        harmless = {f"{self.architecture.head}.weight"} if self.shape.tied else set()
        left = [n for n in self.names if n not in self._written | harmless and not n.endswith("rotary_emb.inv_freq")]
        if left:
            raise UserError(
                f"{self.directory} has {left[0]}, for which llama.cpp's {self.name!r} architecture has no place: "
                "export it for the cpu target"
            )

    def _layer(self, prefix: str, block: str, sizes: LayerSizes, index: int) -> Iterator[Tensor]:
        arch, family = self.architecture, self._family
        if sizes.has(ATTENTION) or sizes.mixer is not ATTENTION:
            yield self._norm(block + "attn_norm", prefix + arch.attention_norm)
            yield from self._mix(prefix, block, sizes)
            if family.attention_post_norm:
                yield self._norm(block + family.attention_post_norm, prefix + arch.attention_post_norm)
        else:
            yield from self._no_attention(block, index)
        if sizes.has(FFN):
            yield self._norm(block + family.ffn_norm, prefix + arch.ffn_norm)
            if arch.packed_gate_up:
                yield from self._halves(block, prefix + arch.packed_gate_up, sizes.ffn)
            else:
                yield from self._linear(block + "ffn_gate", prefix + arch.gate, sizes.ffn, self.shape.hidden)
                yield from self._linear(block + "ffn_up", prefix + arch.up, sizes.ffn, self.shape.hidden)
            yield from self._linear(block + "ffn_down", prefix + arch.down, self.shape.hidden, sizes.ffn)
            if family.ffn_post_norm:
                yield self._norm(block + family.ffn_post_norm, prefix + arch.ffn_post_norm)
        else:
            ones = [family.ffn_norm, *([family.ffn_post_norm] if family.ffn_post_norm else [])]
            yield from (vector(f"{block}{name}.weight", torch.ones(self.shape.hidden)) for name in ones)
            yield from self._no_feed_forward(block)

    def _mix(self, prefix: str, block: str, sizes: LayerSizes) -> Iterator[Tensor]:
        """Yield what mixes the tokens of a layer."""
        return self._heads(prefix, block, sizes)

    def _no_attention(self, block: str, index: int) -> Iterator[Tensor]:
        """Yield what stands in the place of an attention that went; ``deci`` runs all layers but the first without."""
        if index == 0:
            yield vector(block + "attn_norm.weight", torch.ones(self.shape.hidden))
            yield self._zeros(block + "attn_output", self.shape.hidden, self.shape.hidden)

    def _heads(self, prefix: str, block: str, sizes: LayerSizes) -> Iterator[Tensor]:
        arch, hidden, dim = self.architecture, self.shape.hidden, self.shape.head_of(sizes)
        queries, keys = sizes.query_heads * dim, sizes.kv_heads * dim
        rows = sizes.query_heads * self.shape.width_of("query", sizes)
        turned, turned_keys = (
            (rotary_order(queries, sizes.query_heads), rotary_order(keys, sizes.kv_heads))
            if self._family.pairs
            else (None, None)
        )
        yield from self._linear(block + "attn_q", prefix + arch.query, rows, hidden, turned)
        if not sizes.reads:
            yield from self._linear(block + "attn_k", prefix + arch.key, keys, hidden, turned_keys)
            yield from self._linear(block + "attn_v", prefix + arch.value, keys, hidden)
        if arch.query_norm:
            yield self._norm(block + "attn_q_norm", prefix + arch.query_norm)
        if arch.key_norm and not sizes.reads:
            yield self._norm(block + "attn_k_norm", prefix + arch.key_norm)
        yield from self._linear(block + "attn_output", prefix + arch.output, hidden, queries)

    def _halves(self, block: str, module: str, width: int) -> Iterator[Tensor]:
        """Split one module into the gate and the up matrix."""
        (whole,) = self._linear(block + "ffn_gate", module, 2 * width, self.shape.hidden)

        def half(rows: slice) -> QuantMatrix | torch.Tensor:
            values = whole.load()
            whole.check(values)
            return values[rows]

        for name, start in (("ffn_gate", 0), ("ffn_up", width)):
            rows = slice(start, start + width)
            yield replace(
                whole, name=f"{block}{name}.weight", shape=(width, self.shape.hidden), load=partial(half, rows)
            )

    def _no_feed_forward(self, block: str) -> Iterator[Tensor]:
        """Zeros in the place of an FFN that went."""
        yield self._zeros(block + "ffn_gate", BLOCK, self.shape.hidden)
        yield self._zeros(block + "ffn_up", BLOCK, self.shape.hidden)
        yield self._zeros(block + "ffn_down", self.shape.hidden, BLOCK)

    def _linear(
        self, name: str, module: str, rows: int, columns: int, order: torch.Tensor | None = None
    ) -> Iterator[Tensor]:
        """Yield a matrix and its bias; ``order``: the old row of every new one."""
        yield self._matrix(name, module, rows, columns, self.kind, order)
        bias = f"{module}.bias"
        if bias in self.names:
            self._written.add(bias)
            yield vector(f"{name}.bias", self._reordered(bias, order).float())

    def _reordered(self, name: str, order: torch.Tensor | None) -> torch.Tensor:
        tensor = self.read(name)
        if order is None:
            return tensor
        if len(order) != (len(tensor) if tensor.dim() else 0):
            raise UserError(
                f"{name} is {tuple(tensor.shape)} in the weights and has {len(order)} rows by config.json: "
                "make them again"
            )
        return tensor[order]

    def _matrix(
        self, name: str, module: str, rows: int, columns: int, kind: str | None, order: torch.Tensor | None = None
    ) -> Tensor:
        def read(part: str) -> torch.Tensor:
            return self._reordered(f"{module}.{part}", order)

        load: Callable[[], QuantMatrix | torch.Tensor] = partial(read, "weight")
        if self.quant:
            form = module_form(self.quant, self.architecture, module)
            kind = kind or ("Q8_0" if form.bits == 8 else "Q4_0")

            def integers() -> QuantMatrix:
                matrix = QuantMatrix(read("qweight"), read("scales"), read("zero_points"), *form)
                return check_symmetric(module, matrix)

            load = integers

        self._written.update(f"{module}.{part}" for part in (QuantMatrix.PARTS if self.quant else ("weight",)))
        return Tensor(
            f"{name}.weight", (rows, columns), self._fitting(name, columns, kind or "Q4_1"), load, measured=True
        )

    def _fitting(self, name: str, columns: int, kind: str) -> str:
        if kind in ("F32", "F16") or columns % BLOCK == 0:
            return kind
        self.notes.append(f"{name} has {columns} input columns, not a multiple of {BLOCK}: written as F16, not {kind}")
        return "F16"

    def _norm(self, name: str, module: str) -> Tensor:
        self._written.add(f"{module}.weight")
        return vector(f"{name}.weight", self.numbers(f"{module}.weight") + float(self.architecture.offset_norms))

    def _zeros(self, name: str, rows: int, columns: int) -> Tensor:
        return Tensor(f"{name}.weight", (rows, columns), self.kind or "Q8_0", lambda: torch.zeros(rows, columns))


def model_type_of(directory: Path) -> str:
    """Read the family of a directory from its config."""
    return str(read_config(directory).get("model_type")).removeprefix(SLIM)


def rotary_order(rows: int, heads: int) -> torch.Tensor:
    """Old row of every new one, for llama.cpp's rotary, which turns neighbouring pairs instead of halves: [rows]."""
    return torch.arange(rows).view(heads, 2, rows // heads // 2).transpose(1, 2).flatten()


def vector(name: str, values: torch.Tensor) -> Tensor:
    """Build a tensor that is written as float32, of any number of axes."""
    return Tensor(name, tuple(values.shape), "F32", lambda: values)
