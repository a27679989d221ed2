"""Tables of the rotary embedding, from the model's own configuration."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from saap.errors import SaapError

STATIC_TYPES = ("default", "linear", "llama3", "yarn")  # the others change with the length of the input


def rotary_tables(config: Any) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of every position, each [context, head_dim / 2] float32 (Su et al., arXiv 2104.09864).

    Args:
        config: a transformers LlamaConfig.

    Raises:
        SaapError: a scaling whose tables depend on the input's length.
    """
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in STATIC_TYPES:
        raise SaapError(f"rope type {kind!r} is not supported; supported: {', '.join(STATIC_TYPES)}")
    embedding = LlamaRotaryEmbedding(config=config)
    positions = torch.arange(config.max_position_embeddings, dtype=torch.float32)
    angles = torch.outer(positions, embedding.inv_freq.float())
    factor = float(embedding.attention_scaling)
    return (angles.cos() * factor).numpy(), (angles.sin() * factor).numpy()
