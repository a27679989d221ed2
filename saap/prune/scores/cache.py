"""Scores and losses kept by the hash of what they depend on, so that another budget scores nothing twice.

Scores are a safetensors file named by sha256 over the weights, the calibration ids and the settings; losses a JSON file
named by the weights and the ids that says what the model's loss is without some structures. Both are written
beside their place and renamed; what cannot be read is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from devices.common.files import cache_directory
from saap.prune.plan import LayerPlan
from saap.prune.scores.importance import Scores
from saap.prune.shares import shares
from saap.system.errors import UserError
from saap.system.files import read_object, write_document
from saap.system.sealed_tensors import load_sealed, save_sealed

FORMAT = 2  # counts up when the same settings would give other numbers
KEPT_BYTES = 4 << 30  # of all entries; those unused longest go


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
    _make_room(directory, path)
    return scores, False


def _make_room(directory: Path, newest: Path) -> None:
    sizes = {entry: entry.stat() for entry in directory.glob("*") if entry.is_file()}
    total = sum(found.st_size for found in sizes.values())
    for entry in sorted(sizes, key=lambda entry: sizes[entry].st_mtime):
        if total <= KEPT_BYTES or entry == newest:
            return
        entry.unlink(missing_ok=True)
        total -= sizes[entry].st_size


def _key(weights: str, ids: torch.Tensor, settings: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps([FORMAT, weights, list(ids.shape), settings], sort_keys=True).encode())
    digest.update(ids.numpy().tobytes())
    return digest.hexdigest()


def _write(path: Path, scores: Scores) -> None:
    tensors = named(scores)
    partial = path.with_suffix(f".partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_sealed(tensors, partial, {"c": repr(scores.c), "loss": repr(scores.loss)})
        partial.replace(path)
    except OSError:  # a cache that cannot be written costs time only
        partial.unlink(missing_ok=True)


def _read(path: Path) -> Scores | None:
    if not path.is_file():
        return None
    try:
        tensors, about = load_sealed(path.read_bytes())
        return scores_from(tensors, c=float(about["c"]), loss=float(about["loss"]))
    except (OSError, KeyError, ValueError):
        return None


def named(scores: Scores) -> dict[str, torch.Tensor]:
    """The tensors of scores, by names."""
    return {
        f"{part}.{layer}.{role}": tensor
        for part in ("products", "element", "token")
        for (layer, role), tensor in getattr(scores, part).items()
    }


def scores_from(tensors: Mapping[str, torch.Tensor], c: float, loss: float) -> Scores:
    """Scores from what :func:`named` gave.

    Raises:
        KeyError, ValueError: a name of something else.
    """
    parts: dict[str, dict[tuple[int, str], torch.Tensor]] = {"products": {}, "element": {}, "token": {}}
    for name, tensor in tensors.items():
        part, layer, role = name.split(".")
        parts[part][int(layer), role] = tensor
    return Scores(**parts, c=c, loss=loss)


class KnownLosses:
    """Losses of one model on some ids by what its layers keep, in nats per token; kept in a file of the cache."""

    def __init__(self, weights: str | None, ids: torch.Tensor, settings: dict[str, Any] | None = None) -> None:
        """``weights`` None keeps nothing beyond this object; ``settings``: whatever else changes the numbers, JSON."""
        self._path = cache_directory() / "scores" / f"{_key(weights, ids, settings or {})}.json" if weights else None
        self._known: dict[str, float] = {}
        if self._path and self._path.is_file():
            try:
                known = read_object(self._path, "")
                self._known = {str(key): float(value) for key, value in known.items()}
            except (UserError, ValueError, TypeError):
                self._known = {}
        self._known = shares().agreed(self._known)

    def of(self, plans: Mapping[int, LayerPlan], measure: Callable[[], float], way: str = "") -> float:
        """The loss without what ``plans`` do not keep, measured where it is not known; ``way`` tells apart how."""
        said = way + json.dumps({index: asdict(plan) for index, plan in sorted(plans.items())})
        key = hashlib.sha256(said.encode()).hexdigest()
        if key not in self._known:
            self._known[key] = measure()
        return self._known[key]

    def save(self) -> None:
        """Write the file; a cache that cannot be written costs time only."""
        if self._path:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                write_document(self._path, self._known)
            except OSError:
                return
