"""Memory and disk that writing a bundle takes at its peak; the constants were measured (docs/memory.md)."""

from __future__ import annotations

from saap.base.needs import PROCESS, Needs
from saap.models.needs import LOGIT_COPIES
from saap.models.shape import ModelShape

ROUNDING = 13.6  # bytes per weight of the matrix that is rounded to integers
PACKED = 1.9  # copies of a bundle's weights: the file, and packed
WHOLE_BYTES = 1 << 30  # a larger bundle is compared with its torch model in pieces
PIECE_BYTES = 256 << 20  # of weights; a piece ends with the tensor that reaches it


def export_needs(shape: ModelShape, bundle_bytes: int, parity_tokens: int) -> Needs:
    """Estimate what it takes to write a bundle tensor by tensor, and to compare it, or pieces, with the torch model.

    Args:
        bundle_bytes: of its weights file.
        parity_tokens: that are compared; 0 for none.
    """
    matrix = max(shape.vocab * shape.hidden, shape.hidden * max(sizes.ffn for sizes in shape.layers))
    stages = [{"rounding the largest matrix": round(ROUNDING * matrix)}]
    if parity_tokens:
        logits = round(LOGIT_COPIES * 4 * parity_tokens * shape.vocab)
        whole = bundle_bytes <= WHOLE_BYTES
        packed = bundle_bytes if whole else PIECE_BYTES + round(bundle_bytes * matrix / shape.parameters)
        what = "the bundle" if whole else "a piece of the bundle"
        stages.append({f"{what} as ONNX Runtime packs it": round(PACKED * packed), "logits": logits})
    largest: dict[str, int] = max(stages, key=lambda stage: sum(stage.values()))
    return Needs({"the process": PROCESS, **largest}, {"the bundle": bundle_bytes})
