"""Finished steps of a pruning stay beside its output until that is there: what was killed goes on after the last."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from saap import __version__
from saap.models.checkpoint import read_record
from saap.models.integrity import check_directory
from saap.models.shape import LayerSizes
from saap.prune.plan import LayerPlan, Move, PrunePlan, Reason, Reasons, Weighed
from saap.prune.shares import shares
from saap.system.errors import UserError


class KeptSteps:
    """The hidden folder beside the output.

    Attributes:
        folder: holds the steps, and what a step puts aside.
    """

    def __init__(self, folder: Path, key: str) -> None:
        """``key`` names all that the steps depend on."""
        self.folder, self._key = folder, key

    def path(self, step: int) -> Path:
        """Where a step's model is written."""
        return self.folder / f"{step}-{self._key}"

    def last(self, before: int) -> tuple[int, PrunePlan] | None:
        """The newest step below ``before`` whose model is whole, and its plan of the base model."""
        for step in range(before - 1, 0, -1):
            try:
                record = read_record(self.path(step))
                if record:
                    check_directory(self.path(step))
                    return step, plan_of(record["plan"])
            except (UserError, KeyError, TypeError):
                continue
        return None


@contextmanager
def kept_steps(out: str | Path, *parts: Any, owner: bool = True) -> Iterator[KeptSteps]:
    """The steps of an output for the time of the block; they are removed when it ends, but not when it is killed.

    Args:
        owner: this process writes and removes them; others read them.
        parts: all that the steps depend on, but for the versions of the packages; tensors count by their bytes.
    """
    out = Path(out)
    said = [p if not isinstance(p, torch.Tensor) else hashlib.sha256(p.numpy().tobytes()).hexdigest() for p in parts]
    versions = [__version__, torch.__version__, transformers.__version__]
    key = hashlib.sha256(json.dumps([versions, *said], default=repr, sort_keys=True).encode()).hexdigest()[:16]
    folder = out.parent / f".{out.name}.pruning"
    if not owner:
        yield KeptSteps(folder, key)
        return
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.iterdir():
        if not left.name.endswith(f"-{key}"):
            shutil.rmtree(left, ignore_errors=True)
    try:
        yield KeptSteps(folder, key)
    except Exception:  # an interrupt is none: what was done stays
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def agreed(plan: PrunePlan) -> PrunePlan:
    """A plan with what the main process's keeps, in all processes."""
    return replace(plan, layers=_layers(shares().agreed([asdict(layer) for layer in plan.layers])))


def _layers(recorded: list[dict[str, Any]]) -> tuple[LayerPlan, ...]:
    return tuple(
        LayerPlan(tuple(kept["query_heads"]), tuple(kept["kv_heads"]), tuple(kept["ffn"])) for kept in recorded
    )


def plan_of(recorded: dict[str, Any]) -> PrunePlan:
    """The plan that a slim directory's record holds (:func:`saap.prune.record.record_of`).

    Raises:
        KeyError, TypeError: it holds none.
    """
    layers = _layers(recorded["layers"])
    known = recorded["reasons"]
    weighed = tuple(Weighed(**each) for each in known.get("weighed", ())) if known else ()
    reasons = Reasons(known["unit"], tuple(map(_reason, known["blocks"])), weighed) if known else None
    beside = ("achieved", "price_nats", "reasons", "dense_layers", "layers")
    requirement = {name: value for name, value in recorded.items() if name not in beside}
    return PrunePlan(layers, requirement, recorded["price_nats"], reasons)


def _reason(block: dict[str, Any]) -> Reason:
    sizes = {name: LayerSizes(**block[name]) for name in ("had", "keeps")}
    moves = {
        name: Move(**{**move, "to": LayerSizes(**move["to"])}) if (move := block[name]) else None
        for name in ("last", "next", "quarter")
    }
    return Reason(**{**block, **sizes, **moves})
