"""What tuning takes at its peak; the constants were measured (docs/method.md)."""

from __future__ import annotations

from saap.base.needs import PROCESS, Needs
from saap.models.needs import PER_LOGIT, kept_per_token
from saap.models.shape import ModelShape
from saap.quantize.needs import choosing_needs, integer_bytes
from saap.tune.losses import PLACES

TUNING = 70_000_000  # peft and accelerate, beside the process
TRAINED = 24  # bytes per trained number: itself, its gradient, two moments, the best state and the start


def tune_needs(
    shape: ModelShape, bits: int, block: int, tokens: int, *, streamed: bool, recomputed: bool = True
) -> Needs:
    """Of choosing integers, then training one number per group with rows of ``tokens`` in all at once.

    ``recomputed``: layers keep neither activations nor dequantised matrices from one pass to the next.
    """
    layers = [shape.weights_of(s) for s in shape.layers]
    trained = round(TRAINED * sum(layers) / block)
    of_layers = [kept_per_token(shape, sizes) for sizes in shape.layers]
    kept = tokens * (shape.hidden * len(layers) + max(of_layers) if recomputed else sum(of_layers))
    training = {
        "activations": 4 * (kept + PER_LOGIT * min(tokens, PLACES) * shape.vocab),
        "dequantised matrices": 4 * (max(layers) if recomputed else sum(layers)),
        "the head's matrix": 4 * shape.vocab * shape.hidden,
        "what is trained": trained,
        "integers, a byte each": sum(layers),
    }
    choosing = choosing_needs(shape, streamed=streamed)
    largest: dict[str, int] = max((choosing, training), key=lambda stage: sum(stage.values()))
    return Needs({"the process": PROCESS + TUNING, "integers": integer_bytes(shape, bits, block), **largest})
