"""Scores kept by the hash of what they depend on, so that another budget scores nothing twice.

They are a safetensors file named by sha256 over the weights, the calibration ids and the settings, written beside its
place and renamed; what cannot be read is made again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch

from saap.base.files import cache_directory, make_room
from saap.prune.scores.importance import Scores
from saap.system.sealed_tensors import load_sealed, save_sealed

FORMAT = 2  # counts up when the same settings would give other numbers
KEPT_BYTES = 4 << 30  # of all entries; those unused longest go


def scores_path(weights: str, ids: torch.Tensor, settings: Mapping[str, object]) -> Path:
    """Where the scores by a hash of weights and config, ids [sequences, tokens] and other settings (JSON) are kept."""
    return cache_directory() / "scores" / f"{key_of(weights, ids, settings)}.safetensors"


def key_of(weights: str, ids: torch.Tensor, settings: Mapping[str, object]) -> str:
    """sha256 over a hash of weights and config, ids [sequences, tokens] and other settings (JSON)."""
    digest = hashlib.sha256(json.dumps([FORMAT, weights, list(ids.shape), settings], sort_keys=True).encode())
    digest.update(ids.numpy().tobytes())
    return digest.hexdigest()


def read_scores(path: Path) -> Scores | None:
    """The scores kept there, which count as used now; None where there are none that can be read."""
    if not path.is_file():
        return None
    try:
        tensors, about = load_sealed(path.read_bytes())
        found = Scores.named(tensors, c=float(about["c"]), loss=float(about["loss"]))
    except (OSError, KeyError, ValueError):
        return None
    path.touch()
    return found


def keep_scores(path: Path, scores: Scores) -> None:
    """Write them; others that were unused longest make room. A cache that cannot be written costs time only."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_sealed(scores.tensors(), path, {"c": repr(scores.c), "loss": repr(scores.loss)})
        make_room(path.parent, KEPT_BYTES - path.stat().st_size, path)
