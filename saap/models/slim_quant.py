"""The ``slim_quant`` entry of a config: the form of the integers that each matrix holds.

    {"bits": 4, "block": 32, "embedding_bits": 8, "tied": true}       in every such directory
    "matrices": {"model.layers.3.mlp.down_proj": 8}                   linears that hold other than ``bits``
    "blocks": {"model.layers.3.mlp.down_proj": 128}                   matrices in groups of other than ``block``

Queries, keys and values of a layer are one matrix in every graph, and so are gate and up: their forms agree.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, NamedTuple, TypedDict

import msgspec
from msgspec import Meta

from saap.base.errors import UserError
from saap.models.architectures import Architecture
from saap.models.record import Record

BITS = (4, 8)
GROUP_SIZES = (32, 64, 128)
Bits = Annotated[int, Meta(ge=4, le=8, multiple_of=4)]
Block = Annotated[int, Meta(ge=8, le=4096)]


class MatrixForm(NamedTuple):
    """The integers of a matrix: their bits, and the number of them per scale."""

    bits: int
    group_size: int

    def __str__(self) -> str:
        return f"{self.bits} bit in groups of {self.group_size}"


class _Always(TypedDict):
    bits: Bits
    block: Block
    embedding_bits: Bits
    tied: bool


class SlimQuant(_Always, total=False):
    """The entry; ``block`` is the group size."""

    matrices: dict[str, Bits]
    blocks: dict[str, Block]


def quant_of(config: Mapping[str, object]) -> SlimQuant | None:
    """Read the entry of a ``config.json``; None for a model of floats."""
    entry = config.get("slim_quant")
    try:
        return msgspec.convert(entry, SlimQuant) if entry else None
    except ValueError as error:
        raise UserError(f"config.json has a damaged slim_quant ({error}): make the directory again") from None


def planned_forms(record: Record, architecture: Architecture) -> dict[str, MatrixForm]:
    """Return the forms that pruning planned for matrices that differ from the rest, by module name."""
    bundle = record.get("plan", {}).get("bundle", {})
    bits, blocks = bundle.get("matrices", {}), bundle.get("blocks", {})
    base = MatrixForm(bundle.get("bits", 4), bundle.get("block", 32))
    forms = {
        name: MatrixForm(bits.get(name, base.bits), blocks.get(name, base.group_size)) for name in {*bits, *blocks}
    }
    for name in (architecture.embedding, architecture.head):
        forms[name] = MatrixForm(bundle.get("embedding_bits", base.bits), blocks.get(name, base.group_size))
    return forms


def module_form(quant: SlimQuant, architecture: Architecture, module: str) -> MatrixForm:
    """Return the form of a linear, the embedding or the head, by its name in the model."""
    if module in architecture.tables:
        bits = quant["embedding_bits"]
    else:
        bits = quant.get("matrices", {}).get(module, quant["bits"])
    return MatrixForm(bits, quant.get("blocks", {}).get(module, quant["block"]))


def stacked_form(quant: SlimQuant, architecture: Architecture, layer: int, part: str) -> MatrixForm:
    """Return the form of one matrix of a graph: ``qkv``, ``o``, ``gate_up`` or ``down`` of a layer.

    Raises UserError: its modules hold different ones.
    """
    modules = architecture.matrices[part]
    forms = [module_form(quant, architecture, f"{architecture.layers}.{layer}.{module}") for module in modules]
    if len(set(forms)) > 1:
        differing = ", ".join(f"{module} {form}" for module, form in zip(modules, forms, strict=True))
        raise UserError(
            f"layer {layer} has linears that are one matrix in the graph, of different integers ({differing}): "
            "give them the same"
        )
    return forms[0]


def check_matrices(quant: SlimQuant, architecture: Architecture, linears: Iterable[str]) -> None:
    """Refuse forms of matrices that no graph can hold.

    ``linears``: names of the decoder layers' linears.

    Raises UserError: a name that is no matrix, bits other than 4 or 8, linears of one matrix that do not agree, or a
    tied table in groups of two sizes.
    """
    known, vocabulary = set(linears), (architecture.embedding, architecture.head)
    bits_of, blocks = quant.get("matrices", {}), quant.get("blocks", {})
    for name in (*bits_of, *blocks):
        if name in vocabulary and name not in bits_of:
            continue
        if name not in known:
            raise UserError(
                f"integers are described for {name}, which is no linear of the decoder layers: mend the name"
            )
        if (bits := bits_of.get(name, quant["bits"])) not in BITS:
            raise UserError(f"{name} is given {bits} bits; allowed: 4, 8")
        layer, _, module = name.removeprefix(f"{architecture.layers}.").partition(".")
        for part, modules in architecture.matrices.items():
            if module in modules:
                stacked_form(quant, architecture, int(layer), part)
    table, head = (module_form(quant, architecture, name) for name in vocabulary)
    if quant["tied"] and table != head:
        raise UserError(f"the tied table is {table} as the embedding and {head} as the head: give one group size")
