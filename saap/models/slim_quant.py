"""The ``slim_quant`` entry of a config: how many bits each matrix holds.

    {"bits": 4, "block": 32, "embedding_bits": 8, "tied": true}       what every such directory says
    "matrices": {"model.layers.3.mlp.down_proj": 8}                   linears that hold other than ``bits``

Queries, keys and values of a layer are one matrix in every graph, and so are gate and up: their bits agree.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, TypedDict

import msgspec
from msgspec import Meta

from saap.models.architectures import Architecture
from saap.system.errors import UserError

BITS = (4, 8)
Bits = Annotated[int, Meta(ge=4, le=8, multiple_of=4)]


class _Always(TypedDict):
    bits: Bits
    block: Annotated[int, Meta(ge=8, le=4096)]
    embedding_bits: Bits
    tied: bool


class SlimQuant(_Always, total=False):
    """The entry; ``block`` is the group size."""

    matrices: dict[str, Bits]


def quant_of(config: Mapping[str, object]) -> SlimQuant | None:
    """The entry of a ``config.json``; None for a model of floats."""
    found = config.get("slim_quant")
    try:
        return msgspec.convert(found, SlimQuant) if found else None
    except ValueError as error:
        raise UserError(f"config.json has a damaged slim_quant ({error}): make the directory again") from None


def module_bits(quant: SlimQuant, architecture: Architecture, module: str) -> int:
    """Bits of a linear, the embedding or the head, by its name in the model."""
    if module in (architecture.embedding, architecture.head):
        return quant["embedding_bits"]
    return quant.get("matrices", {}).get(module, quant["bits"])


def stacked_bits(quant: SlimQuant, architecture: Architecture, layer: int, part: str) -> int:
    """Bits of one matrix of a graph: ``qkv``, ``o``, ``gate_up`` or ``down`` of a layer.

    Raises UserError: its modules hold different bits.
    """
    modules = architecture.matrices[part]
    bits = [module_bits(quant, architecture, f"{architecture.layers}.{layer}.{module}") for module in modules]
    if len(set(bits)) > 1:
        found = ", ".join(f"{module} {n}" for module, n in zip(modules, bits, strict=True))
        raise UserError(
            f"layer {layer} has linears that are one matrix in the graph, of different bits ({found}): "
            "give them the same bits"
        )
    return bits[0]


def check_matrices(quant: SlimQuant, architecture: Architecture, linears: Iterable[str]) -> None:
    """Refuse bits per matrix that no graph can hold.

    ``linears``: names of the decoder layers' linears.

    Raises UserError: a name that is no linear, bits other than 4 or 8, or linears of one matrix that do not agree.
    """
    known = set(linears)
    for name, bits in quant.get("matrices", {}).items():
        if name not in known:
            raise UserError(f"bits are given for {name}, which is no linear of the decoder layers: mend the name")
        if bits not in BITS:
            raise UserError(f"{name} is given {bits} bits; allowed: 4, 8")
        layer, _, module = name.removeprefix(f"{architecture.layers}.").partition(".")
        for part, modules in architecture.matrices.items():
            if module in modules:
                stacked_bits(quant, architecture, int(layer), part)
