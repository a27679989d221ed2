"""Scores and losses kept by the hash of what they depend on, so that another budget scores nothing twice.

Scores are a safetensors file named by sha256 over the weights, the calibration ids and the settings; losses a JSON file
named by the weights and the ids that says what the model's loss is without some structures. Both are written
beside their place and renamed; what cannot be read is made again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch

from devices.common.files import cache_directory, make_room
from saap.prune.plan import LayerPlan
from saap.prune.scores.importance import Scores
from saap.prune.shares import shares
from saap.system.errors import UserError
from saap.system.files import read_object, write_document
from saap.system.sealed_tensors import load_sealed, save_sealed

FORMAT = 2  # counts up when the same settings would give other numbers
KEPT_BYTES = 4 << 30  # of all entries; those unused longest go


def scores_path(weights: str, ids: torch.Tensor, settings: Mapping[str, object]) -> Path:
    """Where the scores by a hash of weights and config, ids [sequences, tokens] and other settings (JSON) are kept."""
    return cache_directory() / "scores" / f"{_key(weights, ids, settings)}.safetensors"


def _key(weights: str, ids: torch.Tensor, settings: Mapping[str, object]) -> str:
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


class KnownLosses:
    """Losses of one model on some ids by what its layers keep, in nats per token; kept in a file of the cache."""

    def __init__(self, weights: str | None, ids: torch.Tensor, settings: Mapping[str, object] | None = None) -> None:
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

    def of(self, plans: Mapping[int, LayerPlan], measure: Callable[[], float], how: str = "") -> float:
        """The loss without what ``plans`` do not keep, measured where it is not known; ``how`` says in which way."""
        said = how + json.dumps({index: asdict(plan) for index, plan in sorted(plans.items())})
        key = hashlib.sha256(said.encode()).hexdigest()
        if key not in self._known:
            self._known[key] = measure()
        return self._known[key]

    def save(self) -> None:
        """Write the file; a cache that cannot be written costs time only."""
        if self._path:
            with suppress(OSError):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                write_document(self._path, self._known)
