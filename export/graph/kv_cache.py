"""Scales of an int8 KV cache: one per channel, from what the float cache holds on calibration text.

The float graph itself is the probe: the keys and values that it leaves in its cache, keys after the rotary embedding,
are what the int8 cache will have to hold.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from export.bundle.session import open_session
from saap.models.shape import LayerSizes
from saap.system.errors import UserError

LARGEST = 127
MARGIN = 1.05  # other text reaches a little further
PARTS = ("key", "value")


def cache_scales(graph: Path, layers: Sequence[LayerSizes], head_dim: int, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Scales for every layer with attention.

    Args:
        graph: a scoring graph with a float cache.
        ids: calibration ids [rows, tokens].

    Returns ``layers.N.key_scale`` and ``layers.N.value_scale``, each [kv_heads * head_dim] float32.

    Raises UserError: a cache that is not finite.
    """
    session = open_session(graph, os.cpu_count() or 1)
    attending = [(index, sizes) for index, sizes in enumerate(layers) if sizes.query_heads]
    names = [f"{n}.{part}" for n in range(len(attending)) for part in PARTS]
    ranges = {name: np.zeros(1, np.float32) for name in names}
    empty = {
        f"past_key_values.{n}.{part}": np.zeros((1, sizes.kv_heads, 0, head_dim), np.float32)
        for n, (_, sizes) in enumerate(attending)
        for part in PARTS
    }
    for row in np.asarray(ids, np.int64):
        feed = {"input_ids": row[None], "attention_mask": np.ones((1, len(row)), np.int64), **empty}
        for name, cache in zip(names, session.run([f"present.{name}" for name in names], feed), strict=True):
            ranges[name] = np.maximum(ranges[name], np.abs(cache).max(axis=(0, 2)).flatten())
    if not all(np.isfinite(largest).all() for largest in ranges.values()):
        raise UserError("the KV cache is not finite on the calibration text: export with a float cache")
    return {
        f"layers.{index}.{part}_scale": np.maximum(ranges[f"{n}.{part}"] * MARGIN, 1e-6).astype(np.float32) / LARGEST
        for n, (index, _) in enumerate(attending)
        for part in PARTS
    }
