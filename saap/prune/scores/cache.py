"""Scores kept by the hash of what they depend on, so that another budget scores nothing twice.

They are a safetensors file named by sha256 over the weights, the calibration ids and the settings, written beside its
place and renamed; what cannot be read is made again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch

from saap.base.store import Store
from saap.prune.scores.importance import Scores
from saap.system.sealed_tensors import load_sealed, save_sealed

FORMAT = 2  # counts up when the same settings would give other numbers
STORE = Store("scores", 4 << 30)


def scores_path(weights: str, ids: torch.Tensor, settings: Mapping[str, object]) -> Path:
    """Return the entry for scores by a hash of weights and config, ids [sequences, tokens] and settings (JSON)."""
    return STORE.folder / f"{key_of(weights, ids, settings)}.safetensors"


def key_of(weights: str, ids: torch.Tensor, settings: Mapping[str, object]) -> str:
    """sha256 over a hash of weights and config, ids [sequences, tokens] and other settings (JSON)."""
    digest = hashlib.sha256(json.dumps([FORMAT, weights, list(ids.shape), settings], sort_keys=True).encode())
    digest.update(ids.numpy().tobytes())
    return digest.hexdigest()


def read_scores(path: Path) -> Scores | None:
    """Read the scores of an entry; None if there are none."""

    def parsed(content: bytes) -> Scores:
        tensors, about = load_sealed(content)
        return Scores.named(tensors, c=float(about["c"]), loss=float(about["loss"]))

    return STORE.read(path, parsed)


def keep_scores(path: Path, scores: Scores) -> None:
    about = {"c": repr(scores.c), "loss": repr(scores.loss)}
    STORE.write(path, lambda entry: save_sealed(scores.tensors(), entry, about))
