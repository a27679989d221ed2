"""Memory of tuning at its peak, and where it computes; the constants were measured (docs/memory.md)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from saap.base.needs import PROCESS, Needs, check_memory, fits
from saap.models.needs import PER_LOGIT, kept_per_token
from saap.models.shape import ModelShape
from saap.quantize.integers import choosing_needs, integer_bytes
from saap.system.gpu import CPU, check_device, fits_device
from saap.system.processes import shares_parameters, training_device
from saap.tune.losses import PLACES
from saap.tune.options import TuneOptions

TUNING = 70_000_000  # accelerate, beside the process
MASTERS = 16  # bytes of a float weight, its gradient and its two moments
TRAINED = 24  # bytes per trained number: itself, its gradient, two moments, the best state and the start


def tune_needs(
    shape: ModelShape, bits: int, block: int, tokens: int, *, streamed: bool, recomputed: bool = True
) -> Needs:
    """Sum up choosing integers, then training one number per group with rows of ``tokens`` in all at once.

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


def weights_needs(shape: ModelShape, tokens: int, *, tables: bool, recomputed: bool = True) -> Needs:
    """Sum up training float weights, with rows of ``tokens`` in all at once.

    ``tables``: embedding and head are trained too.
    """
    layers = [shape.weights_of(s) for s in shape.layers]
    of_layers = [kept_per_token(shape, sizes) for sizes in shape.layers]
    kept = tokens * (shape.hidden * len(layers) + max(of_layers) if recomputed else sum(of_layers))
    table = shape.vocab * shape.hidden
    trained = shape.parameters if tables else sum(layers)
    return Needs({
        "the process": PROCESS + TUNING,
        "weights, gradients and two moments": MASTERS * trained,
        "embedding and head": 4 * (table if tables else shape.parameters - trained),
        "activations": 4 * (kept + PER_LOGIT * min(tokens, PLACES) * shape.vocab),
    })  # fmt: skip


@dataclass(frozen=True)
class Placement:
    """The device that tuning computes on and what it keeps, by the memory there is."""

    device: torch.device  # where the integers are chosen
    streamed: bool  # the floats are read layer by layer
    recomputed: bool  # layers keep neither activations nor dequantised matrices from one pass to the next


def placement_of(shape: ModelShape, length: int, options: TuneOptions) -> Placement:
    """Choose the fastest that fits with rows of ``length`` tokens. Raises UserError: memory is too small."""
    device = CPU if shares_parameters() else training_device()
    training = options.training
    tokens = length * (training.micro_rows or training.rows_per_step)
    weights = options.train != "scales"

    def needs(*, streamed: bool, recomputed: bool = True) -> Needs:
        if weights:
            return weights_needs(shape, tokens, tables=options.train == "all", recomputed=recomputed)
        return tune_needs(shape, options.bits, options.group, tokens, streamed=streamed, recomputed=recomputed)

    def fit(needs: Needs) -> bool:
        return fits(needs) and fits_device(needs, device)

    streamed = not weights and not fit(needs(streamed=False))
    if weights:
        advice = "give a smaller --micro-batch or --length, or train the scales"
        check_memory(needs(streamed=False), "training the weights", advice)
        check_device(needs(streamed=False), device, "training the weights", f"{advice}, or give --device cpu")
    if streamed:
        if options.max_bytes is not None:
            check_memory(needs(streamed=False), "tuning", "--max-bytes needs all floats at once: leave it out")
            check_device(needs(streamed=False), device, "tuning", "--max-bytes needs all floats there: leave it out")
        check_memory(needs(streamed=True), "tuning", "give a smaller --length")
        check_device(needs(streamed=True), device, "tuning", "give a smaller --length, or --device cpu")
    recomputed = training.checkpointing
    if recomputed is None:
        recomputed = shares_parameters() or not fit(needs(streamed=streamed, recomputed=False))
    return Placement(device, streamed, recomputed)
