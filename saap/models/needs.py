"""The memory of a forward pass, from the model's sizes; pruning, tuning and export add theirs."""

from __future__ import annotations

from saap.base.needs import PROCESS, Needs
from saap.models.shape import ATTENTION, CONV, DELTA, FFN, LayerSizes, ModelShape

# Activations that a backward pass through a layer keeps, in float32 numbers per token: of every hidden channel, and of
# every channel of what a kind of block writes with.
PER_HIDDEN = 7
PER_CHANNEL = {ATTENTION.name: 5, CONV.name: 6, DELTA.name: 16, FFN.name: 5}
PER_LOGIT = 3  # logits, their softmax and its gradient
LOGIT_COPIES = 3.3  # logits of both, and their softmax
SQUARES = 6  # copies of X^T X at the peak of a refit: of both parts and their sum, scaled, damped and factored


def eval_needs(shape: ModelShape, tokens: int, *, streamed: bool) -> Needs:
    """Forecast a forward pass in float32 and its probabilities, with the model whole in memory or layer by layer.

    ``tokens``: of one pass.
    """
    layers = [shape.weights_of(s) for s in shape.layers]
    outside = 4 * shape.resident_outside
    weights = (
        {"embedding and head": outside, "a layer": 4 * max(layers)} if streamed else {"weights": 4 * shape.parameters}
    )
    logits = round(LOGIT_COPIES * 4 * tokens * shape.vocab)
    return Needs({"the process": PROCESS, **weights, "logits": logits})


def kept_per_token(shape: ModelShape, sizes: LayerSizes) -> int:
    """Count the numbers that the backward pass of a layer keeps for a token."""
    inner = sum(PER_CHANNEL[kind.name] * shape.inner_width(kind, sizes) for kind in sizes.blocks)
    return PER_HIDDEN * shape.hidden + inner
