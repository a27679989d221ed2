"""The rotary embedding as a GGUF file states it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from saap.system.errors import UserError

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
    """Base, scaling and context length of a model directory.

    ``linear`` is a scaling that llama.cpp has itself; ``llama3`` and ``yarn`` are written as one divisor per frequency,
    so that llama.cpp turns by the angles of transformers and not by its own version of the formula.

    Raises:
        UserError: a scaling that depends on the length of the input.
    """
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    import saap.models.checkpoint  # noqa: F401  registers our model type

    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in TYPES:
        raise UserError(f"rope type {kind!r} cannot be written as GGUF; allowed: {', '.join(TYPES)}")
    base = float(getattr(config, "rope_theta", None) or scaling["rope_theta"])
    floats, strings, factors = {"rope.freq_base": base}, {"rope.scaling.type": "none"}, None
    if kind == "linear":
        strings["rope.scaling.type"] = "linear"
        floats["rope.scaling.factor"] = float(scaling["factor"])
    elif kind != "default":
        rotary: Any = LlamaRotaryEmbedding(config=config)
        found = rotary.inv_freq.double()
        plain = base ** -(torch.arange(len(found), dtype=torch.float64) / len(found))
        factors = (plain / found).float()
        if rotary.attention_scaling != 1:
            floats["rope.scaling.attn_factor"] = float(rotary.attention_scaling)
    context, notes = _context(config)
    return RotaryFields(floats, strings, factors, context, notes)


def _context(config: Any) -> tuple[int, list[str]]:
    context, window = int(config.max_position_embeddings), getattr(config, "sliding_window", None)
    if not window or window >= context:
        return context, []
    note = f"the model attends to the last {window} tokens, which llama.cpp does not limit: context length {window}"
    return int(window), [note]
