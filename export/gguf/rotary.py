"""The rotary embedding as a GGUF file states it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from saap.base.errors import UserError
from saap.models.architectures import ModelConfig, field_of, number_of, positions_of, rope_of
from saap.models.checkpoint import transformers_config
from saap.models.shape import ModelShape

STILL = 1e30  # a divisor of a frequency, by which it is 0
TYPES = ("default", "linear", "llama3", "yarn")  # the others change with the length of the input


@dataclass(frozen=True)
class RotaryFields:
    """Metadata below the architecture's name, and what llama.cpp divides its frequencies by, [head_dim / 2] float32."""

    floats: dict[str, float]
    strings: dict[str, str]
    factors: torch.Tensor | None
    context: int
    notes: list[str]


def rotary_fields(directory: Path) -> RotaryFields:
    """Read base, scaling and context length of a model directory.

    ``linear`` is a scaling that llama.cpp has itself; ``llama3`` and ``yarn`` are written as one divisor per frequency,
    so that llama.cpp turns by the angles of transformers and not by its own version of the formula.

    Raises UserError: a scaling that depends on the length of the input.
    """
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = transformers_config(directory)
    scaling = rope_of(config)
    if "full_attention" in scaling:  # of several kinds of layers, whose fields the family writes itself
        return RotaryFields({}, {"rope.scaling.type": "none"}, None, positions_of(config), [])
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in TYPES:
        raise UserError(f"rope type {kind!r} cannot be written as GGUF; allowed: {', '.join(TYPES)}")
    base = number_of(config if field_of(config, "rope_theta") else scaling, "rope_theta")
    floats, strings, factors = {"rope.freq_base": base}, {"rope.scaling.type": "none"}, None
    if kind == "linear":
        strings["rope.scaling.type"] = "linear"
        floats["rope.scaling.factor"] = number_of(scaling, "factor")
    elif kind != "default":
        rotary = LlamaRotaryEmbedding(config=config)  # type: ignore[arg-type]  # one of the families like LLaMA
        frequencies = rotary.get_buffer("inv_freq").double()
        plain = base ** -(torch.arange(len(frequencies), dtype=torch.float64) / len(frequencies))
        factors = (plain / frequencies).float()
        if rotary.attention_scaling != 1:
            floats["rope.scaling.attn_factor"] = float(rotary.attention_scaling)
    context, notes = _context(config)
    return RotaryFields(floats, strings, factors, context, notes)


def partial_factors(config: ModelConfig, shape: ModelShape) -> torch.Tensor:
    """Compute the divisors of the frequencies of layers with full attention, [head size / 2] float32.

    Elements that are not rotated get so large a divisor that they stand still.
    """
    own = rope_of(config)["full_attention"]
    half = max(map(shape.head_of, shape.layers)) // 2
    turned = round(half * number_of(own, "partial_rotary_factor")) if field_of(own, "partial_rotary_factor") else half
    return torch.tensor([1.0] * turned + [STILL] * (half - turned))


def _context(config: ModelConfig) -> tuple[int, list[str]]:
    context, window = positions_of(config), field_of(config, "sliding_window")
    if not isinstance(window, int) or not 0 < window < context:
        return context, []
    note = f"the model attends to the last {window} tokens, which llama.cpp does not limit: context length {window}"
    return window, [note]
