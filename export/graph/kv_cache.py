"""Scales of an int8 KV cache: one per channel, from what the float cache holds on calibration text.

The float graph itself is the probe: the keys and values that it leaves in its cache, keys after the rotary embedding,
are what the int8 cache will have to hold.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from export.bundle.manifest import BundleManifest
from export.engine.session import own_session
from saap.base.errors import UserError

LARGEST = 127
MARGIN = 1.05  # other text reaches a little further


def cache_scales(graph: Path, manifest: BundleManifest, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Scales for every layer with attention.

    Args:
        graph: a scoring graph with a float cache.
        manifest: its sizes.
        ids: calibration ids [rows, tokens].

    Returns ``layers.N.key_scale`` and ``layers.N.value_scale``, each [kv_heads * head_dim] float32.

    Raises UserError: a cache that is not finite.
    """
    session = own_session(graph, os.cpu_count() or 1)
    names = [part.present for part in manifest.cache if part.grows]
    ranges = {name: np.zeros(1, np.float32) for name in names}
    empty = {part.past: np.zeros(part.sized(1, 0), np.float32) for part in manifest.cache}
    for row in np.asarray(ids, np.int64):
        feed = {"input_ids": row[None], "attention_mask": np.ones((1, len(row)), np.int64), **empty}
        for name, cache in zip(names, session.run(names, feed), strict=True):
            ranges[name] = np.maximum(ranges[name], np.abs(cache).max(axis=(0, 2)).flatten())
    if not all(np.isfinite(largest).all() for largest in ranges.values()):
        raise UserError("the KV cache is not finite on the calibration text: export with a float cache")
    attending = [index for index, sizes in enumerate(manifest.layers) if sizes.query_heads and not sizes.reads]
    places = [f"layers.{index}.{part}_scale" for index in attending for part in ("key", "value")]
    scales = (np.maximum(ranges[name] * MARGIN, 1e-6).astype(np.float32) / LARGEST for name in names)
    return dict(zip(places, scales, strict=True))
