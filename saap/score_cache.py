"""Scores kept by the hash of what they depend on, so that pruning to another budget takes seconds.

An entry is a safetensors file named by sha256 over the weights, the calibration ids and the settings. It is written
beside its place and renamed; one that cannot be read is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from saap.importance import Scores
from saap.model_cache import cache_directory

FORMAT = 2  # counts up when the same settings would give other numbers
KEPT = 24  # entries; the oldest go


def cached_scores(
    weights: str, ids: torch.Tensor, settings: dict[str, Any], compute: Callable[[], Scores]
) -> tuple[Scores, bool]:
    """The scores of these weights, ids and settings, and whether they were at hand.

    Args:
        weights: hash of the model's weights and config.
        ids: calibration ids [sequences, tokens].
        settings: whatever else changes the numbers; JSON.
    """
    directory = cache_directory() / "scores"
    path = directory / f"{_key(weights, ids, settings)}.safetensors"
    if (found := _read(path)) is not None:
        path.touch()
        return found, True
    scores = compute()
    _write(path, scores)
    for old in sorted(directory.glob("*.safetensors"), key=lambda entry: entry.stat().st_mtime)[:-KEPT]:
        old.unlink(missing_ok=True)
    return scores, False


def _key(weights: str, ids: torch.Tensor, settings: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps([FORMAT, weights, list(ids.shape), settings], sort_keys=True).encode())
    digest.update(ids.numpy().tobytes())
    return digest.hexdigest()


def _write(path: Path, scores: Scores) -> None:
    tensors = {
        f"{part}.{layer}.{role}": tensor.contiguous()
        for part in ("products", "element", "token")
        for (layer, role), tensor in getattr(scores, part).items()
    }
    partial = path.with_suffix(f".partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, metadata={"c": repr(scores.c), "loss": repr(scores.loss)})
        partial.replace(path)
    except OSError:  # a cache that cannot be written costs time only
        partial.unlink(missing_ok=True)


def _read(path: Path) -> Scores | None:
    if not path.is_file():
        return None
    parts: dict[str, dict[tuple[int, str], torch.Tensor]] = {"products": {}, "element": {}, "token": {}}
    try:
        with safe_open(path, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118  safe_open is no mapping
                part, layer, role = name.split(".")
                parts[part][int(layer), role] = handle.get_tensor(name)
            about = handle.metadata()
        return Scores(**parts, c=float(about["c"]), loss=float(about["loss"]))
    except (SafetensorError, OSError, KeyError, ValueError):
        return None
