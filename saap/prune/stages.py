"""The stages of a pruning, each scored anew.

Finished stages stay in a hidden folder beside the output until that is there, so that a pruning that was killed goes on
after the last of them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from saap import __version__
from saap.models.integrity import check_directory
from saap.models.record import read_record
from saap.prune.options import PruneOptions
from saap.prune.plan import PrunePlan
from saap.prune.record import plan_of
from saap.prune.search.budget import Budget


@dataclass(frozen=True)
class Stage:
    """One pass of scoring and cutting."""

    budget: Budget  # what the model meets after it
    last: bool = True  # whether no other follows


def stages_of(budget: Budget, options: PruneOptions) -> list[Stage]:
    """The stages on the way to the requirement."""
    count = options.stages if options.method == "saap" else 1
    return [*(Stage(budget.partway(number / count), last=False) for number in range(1, count)), Stage(budget)]


def share_of(budget: Budget) -> float:
    """The share of what the layers cost that has to go."""
    return max(0.0, 1 - budget.limit / (budget.total(budget.dense) - budget.measure.outside(budget.dense)))


class KeptStages:
    """The hidden folder beside the output, which holds the stages, and what a stage puts aside."""

    def __init__(self, folder: Path, key: str) -> None:
        """``key`` names all that the stages depend on."""
        self.folder, self._key = folder, key

    def path(self, name: int | str) -> Path:
        return self.folder / f"{name}-{self._key}"

    def fresh(self, name: str) -> Path:
        shutil.rmtree(self.folder / name, ignore_errors=True)
        (self.folder / name).mkdir()
        return self.folder / name

    def last(self, before: int) -> tuple[int, PrunePlan] | None:
        """The newest stage below ``before`` whose model is whole, and its plan of the base model."""
        for number in range(before - 1, 0, -1):
            try:
                record = read_record(self.path(number))
                if record:
                    check_directory(self.path(number))
                    return number, plan_of(record["plan"])
            except (KeyError, ValueError):
                continue
        return None


@contextmanager
def kept_stages(output: Path, *parts: object) -> Iterator[KeptStages]:
    """The stages of an output for the time of the block; they are removed when it ends, but not when it is killed.

    Args:
        parts: all that the stages depend on, but for the versions of the packages; tensors count by their bytes.
    """
    said = [p if not isinstance(p, torch.Tensor) else hashlib.sha256(p.numpy().tobytes()).hexdigest() for p in parts]
    versions = [__version__, torch.__version__, transformers.__version__]
    key = hashlib.sha256(json.dumps([versions, *said], default=repr, sort_keys=True).encode()).hexdigest()[:16]
    folder = output.parent / f".{output.name}.pruning"
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.iterdir():
        if not left.name.endswith(f"-{key}"):
            shutil.rmtree(left, ignore_errors=True)
    try:
        yield KeptStages(folder, key)
    except Exception:  # an interrupt is none: what was done stays
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
