"""Tables of the rotary embedding, from the model's own configuration."""

from __future__ import annotations

import copy
import importlib
from typing import Any, Literal

import numpy as np
import torch

from saap.models.architectures import Traits, architecture_of
from saap.system.errors import UserError

STATIC_TYPES = ("default", "linear", "llama3", "yarn")  # the others change with the length of the input
Table = Literal["default", "local"]


def rotary_names(table: Table) -> tuple[str, str]:
    return ("cos", "sin") if table == "default" else (f"{table}.cos", f"{table}.sin")


def all_rotary_tables(config: Any, traits: Traits) -> dict[str, np.ndarray]:
    """Every table that a layer of the model reads, by the name it is written under; see :func:`rotary_tables`."""
    used = sorted({layer.rotary for layer in traits.layers if layer.rotary})
    return {
        name: array
        for table in used
        for name, array in zip(rotary_names(table), rotary_tables(config, table), strict=True)
    }


def rotary_tables(config: Any, table: Table = "default") -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of every position, each [context, rotary_dim / 2] float32 (Su et al., arXiv 2104.09864).

    Args:
        config: a transformers config.
        table: ``local`` is that of sliding layers, in a family where they have their own base.

    Raises:
        UserError: a scaling whose tables depend on the input's length.
    """
    _check_type(config, table)
    embedding = _embedding(config, table)
    kind = "sliding_attention" if table == "local" else "full_attention"
    # transformers 5 keeps the tables of all kinds of layers in one module, under their names.
    prefix = f"{kind}_" if hasattr(embedding, f"{kind}_inv_freq") else ""
    frequencies = getattr(embedding, f"{prefix}inv_freq").float()
    positions = torch.arange(config.max_position_embeddings, dtype=torch.float32)
    angles = torch.outer(positions, frequencies)
    factor = float(getattr(embedding, f"{prefix}attention_scaling"))
    return (angles.cos() * factor).numpy(), (angles.sin() * factor).numpy()


def _embedding(config: Any, table: Table) -> Any:
    family = architecture_of(config).family
    module = importlib.import_module(f"transformers.models.{family.lower()}.modeling_{family.lower()}")
    if table == "local" and hasattr(config, "rope_local_base_freq"):  # transformers 4
        config = copy.deepcopy(config)
        config.rope_theta, config.rope_scaling = config.rope_local_base_freq, {"rope_type": "default"}
    return getattr(module, f"{family}RotaryEmbedding")(config=config)


def _check_type(config: Any, table: Table) -> None:
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if "full_attention" in scaling:
        scaling = scaling["sliding_attention" if table == "local" else "full_attention"]
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in STATIC_TYPES:
        raise UserError(f"rope type {kind!r} is not supported; supported: {', '.join(STATIC_TYPES)}")
