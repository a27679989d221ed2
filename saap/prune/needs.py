"""Memory and disk that pruning needs at its peak; the constants were measured (docs/memory.md)."""

from __future__ import annotations

from saap.base.needs import PROCESS, Needs
from saap.models.needs import PER_LOGIT, SQUARES, kept_per_token
from saap.models.shape import ModelShape
from saap.models.weight_files import SHARD_BYTES
from saap.prune.scores.importance import ROWS
from saap.prune.scores.layerwise import rows_at_once
from saap.prune.search.adaptive import PRICING_SHARE
from saap.prune.search.choices import RUNS
from saap.prune.search.library import fitted_on, most_blocks
from saap.prune.search.measured import EVERY, WINDOW, WINDOWS

MAPPED = 150_000_000  # at most, of the pages of a layer's file; the system takes back older ones
KEPT_BACK = 1.3  # what the allocator holds over what a walk through the layers uses
BATCH = 8  # sequences that a refit takes at once
REFITTED = 4  # matrices at the peak of pricing an option: what changes, what was learnt, and both on their way


def prune_needs(
    shape: ModelShape, sequences: int, tokens: int, file_bytes: int, *, streamed: bool, element: str = "none"
) -> Needs:
    """Estimate pruning in float32, whole or layer by layer: the largest of loading, computing and writing."""
    layers = [shape.weights_of(s) for s in shape.layers]
    refit = _refit(shape, sequences, tokens, kept=not streamed)
    pricing = _pricing(shape, sequences, tokens, streamed)
    measuring = 0 if streamed else _measuring(shape, sequences, tokens)
    computing = 4 * max(_scoring(shape, layers, sequences, tokens, streamed, element), pricing, measuring, refit)
    stages: list[dict[str, int]] = [{"a file of the slim model": min(SHARD_BYTES, file_bytes)}]
    if streamed:
        outside = 4 * shape.resident_outside
        stages.append(
            {
                "embedding and head": outside,
                "a layer": 4 * max(layers),
                "activations": round(KEPT_BACK * computing),
                "its file": min(MAPPED, round(file_bytes / shape.parameters * max(layers))),
            }
        )
    else:
        weights = {"weights": 4 * shape.parameters}
        stages += [{**weights, "activations": computing}, {**weights, "the files while they are read": file_bytes}]
    largest: dict[str, int] = max(stages, key=lambda stage: sum(stage.values()))
    return Needs({"the process": PROCESS, **largest})


def _scoring(shape: ModelShape, layers: list[int], sequences: int, tokens: int, streamed: bool, element: str) -> int:
    """Count numbers beside the weights: those that a backward pass keeps, or the states before every layer."""
    kept = [kept_per_token(shape, sizes) for sizes in shape.layers]
    logits = PER_LOGIT * tokens * shape.vocab
    gradients = {"none": 0, "streamed": max(layers), "exact": 2 * sum(layers)}[element]
    if not streamed:
        rows = min(sequences, ROWS if element == "none" else 1)
        return rows * (tokens * sum(kept) + logits) + gradients
    states = min(sequences, rows_at_once(shape, tokens)) * tokens * shape.hidden * (len(layers) + 1)
    return states + max(tokens * max(kept) + gradients, logits)


def _refit(shape: ModelShape, sequences: int, tokens: int, *, kept: bool) -> int:
    """Count numbers of a refit of the widest layer beside the weights: states, one batch, sums, matrices.

    ``kept``: what enters the matrices is there for all batches.
    """
    widest = max(sizes.ffn for sizes in shape.layers)
    heads = max(shape.inner_width(sizes.mixer, sizes) for sizes in shape.layers)
    stream = sequences * tokens * (2 * shape.hidden + kept * (widest + heads))
    batch = max(1, min(BATCH, sequences // 2)) * tokens * (3 * widest + 2 * heads + 4 * shape.hidden)
    few = sequences * tokens < widest
    sums = 2 * sequences * tokens * (widest + shape.hidden) if few else SQUARES * widest**2
    return stream + batch + sums + 3 * shape.hidden * (widest + heads)


def _pricing(shape: ModelShape, sequences: int, tokens: int, streamed: bool) -> int:
    """Count numbers of a library of prices: gradients of all blocks, a walk, and outputs of runs."""
    judged = max(1, sequences // PRICING_SHARE)
    text = tokens * (judged + min(sequences - judged, fitted_on(streamed)))
    runs = text * shape.hidden * ((most_blocks(streamed) + 1) // 2) * (1 if streamed else len(RUNS))
    blocks = sum(len(sizes.blocks) for sizes in shape.layers)
    return judged * tokens * shape.hidden * blocks // 2 + runs + _walk(shape, text, streamed)


def _walk(shape: ModelShape, text: int, streamed: bool) -> int:
    """Count numbers of a window of blocks, on this many tokens, and of a fit in one of them."""
    widths = sorted((shape.inner_width(kind, s) for s in shape.layers for kind in s.blocks), reverse=True)
    blocks = most_blocks(streamed) + 1
    window = text * sum(width + shape.hidden for width in widths[:blocks:2] + widths[-(blocks // 2) :])
    sums = 2 * text * (widths[0] + shape.hidden) if text < widths[0] else SQUARES * widths[0] ** 2
    return window + sums + REFITTED * shape.hidden * widths[0]


def _measuring(shape: ModelShape, sequences: int, tokens: int) -> int:
    """Count numbers of long windows: the states before every layer, some logits, and a walk on the fitted text."""
    text = WINDOWS * max(WINDOW, tokens)
    states = text * shape.hidden * (len(shape.layers) + 2) + 3 * (text // EVERY) * shape.vocab
    return states + _walk(shape, tokens * min(sequences - 1, fitted_on(streamed=False)), streamed=False)


def prune_disk(shape: ModelShape, file_bytes: int, share: float) -> dict[str, int]:
    """Estimate the refitted matrices and the output of a model whose files hold ``file_bytes``."""
    each = file_bytes / shape.parameters
    refitted = sum(shape.hidden * shape.inner_width(kind, s) for s in shape.layers for kind in s.blocks)
    slim = round(each * (shape.parameters - share * shape.layer_weights))
    return {"refitted matrices": round(each * refitted), "the slim model": slim}
