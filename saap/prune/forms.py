"""The integers of each matrix of a plan: those that a block can have, and those that were chosen.

A block reads the residual stream by one matrix of the graph (queries, keys and values are one, and so are gate and up)
and writes by another. On a device each form takes its own time: larger groups are read faster where a kernel keeps
floats of every group, and 8 bit in large groups takes less than twice the time of 4 bit (studies/search).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from saap.base.wording import counted
from saap.models.architectures import Architecture
from saap.models.record import PlannedBundle
from saap.models.shape import ATTENTION, CONV, DELTA, FFN, LayerSizes
from saap.models.slim_quant import MatrixForm

READS = {ATTENTION.name: "qkv", CONV.name: "conv_in", DELTA.name: "delta_in", FFN.name: "gate_up"}  # parts of a graph
WRITES = {ATTENTION.name: "o", CONV.name: "conv_out", DELTA.name: "delta_out", FFN.name: "down"}
Place = tuple[int, str]  # a layer, and the name of a kind of block


class BlockForms(NamedTuple):
    """Integers of the matrix that reads the residual stream, and of the one that writes to it."""

    reads: MatrixForm
    writes: MatrixForm


@dataclass(frozen=True)
class PlanForms:
    """The integers that a search chose.

    Attributes:
        base: where nothing else is said.
        blocks: of the blocks that stay, by their layers in the model that was pruned.
        vocabulary: of embedding and head.
    """

    base: MatrixForm
    blocks: Mapping[Place, BlockForms]
    vocabulary: MatrixForm

    def of_layers(self, layers: Sequence[int]) -> PlanForms:
        """Renumber the layers."""
        return replace(self, blocks={(layers[layer], kind): forms for (layer, kind), forms in self.blocks.items()})

    def bundle(self, architecture: Architecture, layers: Mapping[int, LayerSizes]) -> PlannedBundle:
        """Describe them for a record, by the names of the slim model's modules.

        ``layers``: what is kept of the layers that are, by their numbers in the model that was pruned.
        """
        groups = Counter(form.group_size for forms in self.blocks.values() for form in forms)
        ((block, _),) = groups.most_common(1) or [(self.base.group_size, 0)]
        matrices: dict[str, int] = {}
        blocks: dict[str, int] = {}
        places = {layer: f"{architecture.layers}.{place}" for place, layer in enumerate(layers)}
        named = {
            f"{places[layer]}.{module}": form
            for (layer, kind), forms in self.blocks.items()
            for part, form in zip((READS[kind], WRITES[kind]), forms, strict=True)
            for module in architecture.matrices[part][: 1 if part == "qkv" and layers[layer].reads else None]
        }
        for name, form in named.items():
            if form.bits != self.base.bits:
                matrices[name] = form.bits
        vocabulary = dict.fromkeys((architecture.embedding, architecture.head), self.vocabulary)
        for name, form in (named | vocabulary).items():
            if form.group_size != block:
                blocks[name] = form.group_size
        bundle = PlannedBundle(bits=self.base.bits, block=block)
        if self.vocabulary.bits != self.base.bits:
            bundle["embedding_bits"] = self.vocabulary.bits
        if matrices:
            bundle["matrices"] = matrices
        if blocks:
            bundle["blocks"] = blocks
        return bundle


def in_words(bundle: PlannedBundle, tables: Sequence[str]) -> str:
    """Describe the integers of a planned bundle: those of most matrices, and how many linears have others."""
    base = MatrixForm(bundle["bits"], bundle["block"])
    bits, blocks = bundle.get("matrices", {}), bundle.get("blocks", {})
    own = Counter(
        MatrixForm(bits.get(name, base.bits), blocks.get(name, base.group_size))
        for name in {*bits, *blocks}
        if name not in tables
    )
    words = MatrixForm(bundle.get("embedding_bits", base.bits), blocks.get(tables[0], base.group_size))
    others = [f"{counted(count, 'linear')} at {form}" for form, count in sorted(own.items())]
    others += [f"embedding and head at {words}"] if words != base else []
    return f"{base}{'; ' + ', '.join(others) if others else ''}"
