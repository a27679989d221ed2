"""What a long command takes at its peak, in memory and on disk, against what there is; known before anything is read.

Sums of what has to be there at the same time; the constants were measured (docs/method.md says how and how well
they hold). A refusal names the sum, what there is, and the option that would make it fit.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from devices.common.cgroup import memory_left
from saap.models.weight_files import SHARD_BYTES
from saap.system.errors import UserError

if TYPE_CHECKING:
    from saap.models.structures import LayerSizes, ModelShape

PROCESS = 560_000_000  # Python, torch, transformers and scipy, with what the allocators keep
# Activations that a backward pass through a layer keeps, in float32 numbers per token: of every hidden channel, of
# every attention channel and of every FFN channel.
PER_HIDDEN, PER_ATTENTION, PER_FFN = 7, 5, 5
MAPPED = 150_000_000  # at most, of the pages of a layer's file; the system takes back older ones
KEPT_BACK = 1.3  # what the allocator holds over what a walk through the layers uses
PER_LOGIT = 3  # logits, their softmax and its gradient
BATCH = 8  # sequences that a refit takes at once
SQUARES = 6  # copies of X^T X at the peak of a refit: of both parts and their sum, scaled, damped and factored
TUNING = 70_000_000  # peft and accelerate, beside the process
CHOOSING = 6  # bytes per weight of a matrix whose integers are chosen: a copy, codes, and codes as they are packed
TRAINED = 24  # bytes per trained number: itself, its gradient, two moments, the best state and the start
ROUNDING = 13.6  # bytes per weight of the matrix that is rounded to integers
PACKED, LOGIT_COPIES = 1.9, 3.3  # copies of a bundle's weights: file and packed; logits of both, and their softmax
WHOLE_BYTES = 1 << 30  # a larger bundle is compared with its torch model in pieces
PIECE_BYTES = 256 << 20  # of weights; a piece ends with the tensor that reaches it
FREE_SHARE = 0.95  # of the memory that is available; the rest is for what others ask for meanwhile


@dataclass(frozen=True)
class Needs:
    """Bytes at the peak, by what they are for.

    Attributes:
        memory: that must be resident at the same time.
        disk: written beside or into the output before anything is deleted.
    """

    memory: dict[str, int]
    disk: dict[str, int] = field(default_factory=dict)

    @property
    def memory_bytes(self) -> int:
        """Sum of the memory."""
        return sum(self.memory.values())

    @property
    def disk_bytes(self) -> int:
        """Sum of the disk."""
        return sum(self.disk.values())


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that this process may still take: what the system has, or less where a control group limits it.

    Of several processes that were started together on a machine, each may take its part.
    """
    left = memory_left(root)
    free = int(psutil.virtual_memory().available)
    together = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))  # of accelerate launch
    return (free if left is None else min(free, left)) // together


def fits(needs: Needs) -> bool:
    """Whether the memory is there."""
    return needs.memory_bytes <= FREE_SHARE * available_memory()


def check_memory(needs: Needs, what: str, advice: str) -> None:
    """Raise UserError with the sum where memory would run out.

    Args:
        what: the command, as ``pruning``.
        advice: what would make it fit.
    """
    if not fits(needs):
        raise UserError(
            f"{what} needs {gigabytes(needs.memory_bytes)} of memory ({parts(needs.memory)}), and "
            f"{gigabytes(available_memory())} are free: {advice}"
        )


def check_disk(needs: Needs, out: Path, what: str) -> None:
    """Raise UserError with the sum where the file system of ``out`` would run full."""
    place = Path(out).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needs.disk_bytes > free:
        raise UserError(
            f"{what} needs {gigabytes(needs.disk_bytes)} of disk ({parts(needs.disk)}), and {gigabytes(free)} are free "
            f"at {place}: make room, or give -o a folder on another disk"
        )


def prune_needs(
    shape: ModelShape, sequences: int, tokens: int, file_bytes: int, *, streamed: bool, element: str = "none"
) -> Needs:
    """Of pruning in float32, whole in memory or layer by layer: the largest of loading, computing and writing.

    Args:
        sequences, tokens: of the calibration text.
        file_bytes: of the model's weight files.
        element: the form of the element score, which keeps gradients of weights.
    """
    layers = [shape.attention_weights(s) + shape.ffn_weights(s) for s in shape.layers]
    computing = 4 * max(_scoring(shape, layers, sequences, tokens, streamed, element), _refit(shape, sequences, tokens))
    stages: list[dict[str, int]] = [{"a file of the slim model": min(SHARD_BYTES, file_bytes)}]
    if streamed:
        outside = 4 * (shape.parameters - sum(layers))
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
    """Numbers beside the weights: what a backward pass keeps, or the states before every layer."""
    from saap.prune.scores.layerwise import rows_at_once

    kept = [_kept_per_token(shape, sizes) for sizes in shape.layers]
    logits = PER_LOGIT * tokens * shape.vocab
    gradients = {"none": 0, "streamed": max(layers), "exact": 2 * sum(layers)}[element]
    if not streamed:
        return tokens * sum(kept) + logits + gradients
    states = min(sequences, rows_at_once(shape, tokens)) * tokens * shape.hidden * (len(layers) + 1)
    return states + max(tokens * max(kept) + gradients, logits)


def _refit(shape: ModelShape, sequences: int, tokens: int) -> int:
    """Numbers that a refit of the widest layer takes beside the weights: states, one batch, the sums, the matrices."""
    widest = max(sizes.ffn for sizes in shape.layers)
    heads = max(sizes.query_heads for sizes in shape.layers) * shape.head_dim
    stream = 2 * sequences * tokens * shape.hidden
    batch = max(1, min(BATCH, sequences // 2)) * tokens * (3 * widest + 2 * heads + 4 * shape.hidden)
    few = sequences * tokens < widest
    sums = 2 * sequences * tokens * (widest + shape.hidden) if few else SQUARES * widest**2
    return stream + batch + sums + 3 * shape.hidden * (widest + heads)


def _kept_per_token(shape: ModelShape, sizes: LayerSizes) -> int:
    """Numbers that the backward pass of a layer keeps for a token."""
    attention = sizes.query_heads * shape.head_dim
    return PER_HIDDEN * shape.hidden + PER_ATTENTION * attention + PER_FFN * sizes.ffn


def prune_disk(shape: ModelShape, file_bytes: int, share: float, steps: int) -> dict[str, int]:
    """Of pruning in steps: the model of the step before, the refitted matrices, and the output.

    Args:
        file_bytes: of the dense model's weight files.
        share: of the layers that goes.
    """
    each = file_bytes / shape.parameters

    def left(gone: float) -> int:
        return round(each * (shape.parameters - gone * shape.layer_weights))

    refitted = sum(shape.hidden * (s.ffn + s.query_heads * shape.head_dim) for s in shape.layers)
    before = left(share * (steps - 1) / steps) if steps > 1 else 0
    return {"the step before": before, "refitted matrices": round(each * refitted), "the slim model": left(share)}


def tune_needs(shape: ModelShape, bits: int, block: int, tokens: int, *, streamed: bool) -> Needs:
    """Of choosing integers and training one number per group, from floats in memory or layer by layer.

    Args:
        tokens: of the rows that go through the model together.
    """
    from saap.tune.head_loss import PLACES

    layers = [shape.attention_weights(s) + shape.ffn_weights(s) for s in shape.layers]
    widest = max(sizes.ffn for sizes in shape.layers)
    integers = round(shape.parameters * (bits / 8 + 4 / block))
    trained = round(TRAINED * sum(layers) / block)
    kept = tokens * (shape.hidden * len(layers) + _kept_per_token(shape, max(shape.layers, key=lambda s: s.ffn)))
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


def eval_needs(shape: ModelShape, tokens: int, *, streamed: bool) -> Needs:
    """Of running a model forward in float32, whole in memory or layer by layer, and reading off its probabilities.

    Args:
        tokens: that go through the model together.
    """
    layers = [shape.attention_weights(s) + shape.ffn_weights(s) for s in shape.layers]
    outside = 4 * (shape.parameters - sum(layers))
    weights = (
        {"embedding and head": outside, "a layer": 4 * max(layers)} if streamed else {"weights": 4 * shape.parameters}
    )
    logits = round(LOGIT_COPIES * 4 * tokens * shape.vocab)
    return Needs({"the process": PROCESS, **weights, "logits": logits})


def export_needs(shape: ModelShape, bundle_bytes: int, parity_tokens: int) -> Needs:
    """Of writing a bundle tensor by tensor, and of running it, or its pieces, against the torch model layer by layer.

    Args:
        bundle_bytes: of its weights file.
        parity_tokens: that are compared; 0 for none.
    """
    matrix = max(shape.vocab * shape.hidden, shape.hidden * max(sizes.ffn for sizes in shape.layers))
    stages = [{"rounding the largest matrix": round(ROUNDING * matrix)}]
    if parity_tokens:
        logits = round(LOGIT_COPIES * 4 * parity_tokens * shape.vocab)
        whole = bundle_bytes <= WHOLE_BYTES
        held = bundle_bytes if whole else PIECE_BYTES + round(bundle_bytes * matrix / shape.parameters)
        what = "the bundle" if whole else "a piece of the bundle"
        stages.append({f"{what} as ONNX Runtime packs it": round(PACKED * held), "logits": logits})
    largest: dict[str, int] = max(stages, key=lambda stage: sum(stage.values()))
    return Needs({"the process": PROCESS, **largest}, {"the bundle": bundle_bytes})


def gigabytes(count: float) -> str:
    """Bytes as GB with one decimal, or MB below one."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def parts(amounts: dict[str, int]) -> str:
    """The summands, largest first."""
    ordered = sorted(amounts.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {gigabytes(count)}" for name, count in ordered if count)
