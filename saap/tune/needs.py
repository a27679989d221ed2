"""What tuning takes at its peak; the constants were measured (docs/method.md)."""

from __future__ import annotations

from saap.models.needs import PER_LOGIT, SQUARES, kept_per_token
from saap.models.shape import ModelShape
from saap.system.needs import PROCESS, Needs
from saap.tune.losses import PLACES

TUNING = 70_000_000  # peft and accelerate, beside the process
CHOOSING = 6  # bytes per weight of a matrix whose integers are chosen: a copy, codes, and codes as they are packed
TRAINED = 24  # bytes per trained number: itself, its gradient, two moments, the best state and the start


def tune_needs(shape: ModelShape, bits: int, block: int, tokens: int, *, streamed: bool) -> Needs:
    """Of choosing integers, then training one number per group with rows of ``tokens`` in all at once."""
    layers = [shape.attention_weights(s) + shape.ffn_weights(s) for s in shape.layers]
    widest = max(sizes.ffn for sizes in shape.layers)
    integers = round(shape.parameters * (bits / 8 + 4 / block))
    trained = round(TRAINED * sum(layers) / block)
    kept = tokens * (shape.hidden * len(layers) + kept_per_token(shape, max(shape.layers, key=lambda s: s.ffn)))
    training = {
        "activations": 4 * (kept + PER_LOGIT * min(tokens, PLACES) * shape.vocab + max(layers)),
        "the head's matrix": 4 * shape.vocab * shape.hidden,
        "what is trained": trained,
        "integers, a byte each": sum(layers),
    }
    floats = {"embedding and head": 4 * (shape.parameters - sum(layers)), "a layer": 4 * max(layers)}
    choosing = {
        **(floats if streamed else {"weights": 4 * shape.parameters}),
        "X X^T": 4 * SQUARES * widest**2,
        "choosing the head": CHOOSING * shape.vocab * shape.hidden,
    }
    largest: dict[str, int] = max((choosing, training), key=lambda stage: sum(stage.values()))
    return Needs({"the process": PROCESS + TUNING, "integers": integers, **largest})
