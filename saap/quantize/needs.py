"""What choosing integers takes at its peak; the constants were measured (docs/method.md)."""

from __future__ import annotations

from saap.models.needs import SQUARES
from saap.models.shape import ModelShape

CHOOSING = 6  # bytes per weight of a matrix whose integers are chosen: a copy, codes, and codes as they are packed


def integer_bytes(shape: ModelShape, bits: int, block: int) -> int:
    """Of a model's integers, scales and zero points."""
    return round(shape.parameters * (bits / 8 + 4 / block))


def choosing_needs(shape: ModelShape, *, streamed: bool) -> dict[str, int]:
    """Bytes by what they are for, beside the process and the integers themselves."""
    layers = [shape.weights_of(s) for s in shape.layers]
    floats = {"embedding and head": 4 * shape.held_outside, "a layer": 4 * max(layers)}
    return {
        **(floats if streamed else {"weights": 4 * shape.parameters}),
        "X X^T": 4 * SQUARES * max(sizes.ffn for sizes in shape.layers) ** 2,
        "choosing the head": CHOOSING * shape.vocab * shape.hidden,
    }
