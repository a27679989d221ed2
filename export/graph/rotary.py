"""Tables of the rotary embedding, from the model's own configuration."""

from __future__ import annotations

import copy
import importlib
from typing import Literal

import numpy as np
import torch
import transformers
from torch import nn

from saap.base.errors import UserError
from saap.models.architectures import ModelConfig, Traits, architecture_of, field_of, positions_of, rope_of

STATIC_TYPES = ("default", "linear", "llama3", "yarn", "proportional")  # the others change with the length of the input
Table = Literal["default", "local"]


def rotary_names(table: Table) -> tuple[str, str]:
    return ("cos", "sin") if table == "default" else (f"{table}.cos", f"{table}.sin")


def all_rotary_tables(config: ModelConfig, traits: Traits) -> dict[str, np.ndarray]:
    """Every table that a layer of the model reads, by the name it is written under; see :func:`rotary_tables`."""
    used = sorted({layer.rotary for layer in traits.layers if layer.rotary})
    return {
        name: array
        for table in used
        for name, array in zip(rotary_names(table), rotary_tables(config, table), strict=True)
    }


def rotary_tables(config: ModelConfig, table: Table = "default") -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of every position, each [context, rotary_dim / 2] float32 (Su et al., arXiv 2104.09864).

    ``table``: ``local`` is that of sliding layers, in a family where they have their own base.

    Raises UserError: a scaling whose tables depend on the input's length.
    """
    _check_type(config, table)
    embedding = _embedding(config, table)
    kind = "sliding_attention" if table == "local" else "full_attention"
    # transformers 5 keeps the tables of all kinds of layers in one module, under their names.
    prefix = f"{kind}_" if hasattr(embedding, f"{kind}_inv_freq") else ""
    frequencies = getattr(embedding, f"{prefix}inv_freq").float()
    positions = torch.arange(positions_of(config), dtype=torch.float32)
    angles = torch.outer(positions, frequencies)
    factor = float(getattr(embedding, f"{prefix}attention_scaling"))
    return (angles.cos() * factor).numpy(), (angles.sin() * factor).numpy()


def _embedding(config: ModelConfig, table: Table) -> nn.Module:
    family = architecture_of(config).family
    module = importlib.import_module(getattr(transformers, f"{family}ForCausalLM").__module__)
    base = field_of(config, "rope_local_base_freq")
    if table == "local" and base is not None:  # transformers 4
        config = copy.deepcopy(config)
        config.update({"rope_theta": base, "rope_scaling": {"rope_type": "default"}})
    name = f"{family}RotaryEmbedding"
    kind = getattr(module, name, None) or getattr(module, f"{family}TextRotaryEmbedding")  # beside one for pictures
    embedding: nn.Module = kind(config=config)
    return embedding


def _check_type(config: ModelConfig, table: Table) -> None:
    scaling = rope_of(config)
    own = scaling.get("sliding_attention" if table == "local" else "full_attention", scaling)
    kind = field_of(own, "rope_type", field_of(own, "type", "default"))
    if kind not in STATIC_TYPES:
        raise UserError(f"rope type {kind!r} is not supported; supported: {', '.join(STATIC_TYPES)}")
