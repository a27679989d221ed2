"""Memory that running a model takes, from its sizes; what pruning, tuning and export take is built on it."""

from __future__ import annotations

from saap.models.shape import LayerSizes, ModelShape
from saap.system.needs import PROCESS, Needs

# Activations that a backward pass through a layer keeps, in float32 numbers per token: of every hidden channel, of
# every attention channel and of every FFN channel.
PER_HIDDEN, PER_ATTENTION, PER_FFN = 7, 5, 5
PER_LOGIT = 3  # logits, their softmax and its gradient
LOGIT_COPIES = 3.3  # logits of both, and their softmax
SQUARES = 6  # copies of X^T X at the peak of a refit: of both parts and their sum, scaled, damped and factored


def eval_needs(shape: ModelShape, tokens: int, *, streamed: bool) -> Needs:
    """Of running a model forward in float32, whole in memory or layer by layer, and reading off its probabilities.

    ``tokens``: that go through the model together.
    """
    layers = [shape.attention_weights(s) + shape.ffn_weights(s) for s in shape.layers]
    outside = 4 * (shape.parameters - sum(layers))
    weights = (
        {"embedding and head": outside, "a layer": 4 * max(layers)} if streamed else {"weights": 4 * shape.parameters}
    )
    logits = round(LOGIT_COPIES * 4 * tokens * shape.vocab)
    return Needs({"the process": PROCESS, **weights, "logits": logits})


def kept_per_token(shape: ModelShape, sizes: LayerSizes) -> int:
    """Numbers that the backward pass of a layer keeps for a token."""
    attention = sizes.query_heads * shape.head_dim
    return PER_HIDDEN * shape.hidden + PER_ATTENTION * attention + PER_FFN * sizes.ffn
