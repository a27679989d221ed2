"""The stages of a pruning: whole layers first where that is asked, then structures, scored anew in each.

Layers are chosen by block influence, ShortGPT's criterion (arXiv 2403.03853), not by the loss without them: that is the
loss of a model that was not tuned, and tuning recovers more of a layer than of as many weights of channels.

Finished stages stay in a hidden folder beside the output until that is there, so that a pruning that was killed goes on
after the last of them.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

from devices.common.progress import Progress
from devices.common.wording import counted
from saap import __version__
from saap.models.integrity import check_directory
from saap.models.record import read_record
from saap.prune.baselines.methods import rank
from saap.prune.options import PruneOptions
from saap.prune.plan import PrunePlan
from saap.prune.record import plan_of
from saap.prune.search.budget import Budget
from saap.prune.search.explain import sizes_lost
from saap.prune.search.milp import check_floor
from saap.system.errors import UserError

SHARE_PER_STAGE = 0.15  # of what the layers cost; more at a time and scores say little about what goes together


@dataclass(frozen=True)
class Stage:
    """One pass of scoring and cutting."""

    budget: Budget  # what the model meets after it
    layers: int = 0  # how many go whole; 0 where structures go
    last: bool = True  # whether no other follows


def stages_of(budget: Budget, options: PruneOptions) -> list[Stage]:
    """The stages on the way to the requirement; UserError where more layers go whole than have to."""
    if options.method != "saap":
        return [Stage(budget)]
    share, way, first = share_of(budget), 0.0, []
    if options.drop_layers:
        whole = budget.total(budget.dense) - budget.measure.outside(budget.dense)
        dropped = whole * options.drop_layers / len(budget.dense.layers)
        way = dropped / (whole - budget.limit)
        if way >= 1:
            most = math.ceil((whole - budget.limit) / whole * len(budget.dense.layers)) - 1
            advice = f"give at most {most}" if most else "leave it out"
            raise UserError(f"--drop-layers {options.drop_layers} is more than has to go: {advice}, or ask for more")
        share = 1 - budget.limit / (whole - dropped)
        first = [Stage(budget.partway(way), options.drop_layers, last=False)]
    count = options.stages or max(1, math.ceil(share / SHARE_PER_STAGE - 1e-9))
    parts = [budget.partway(way + (1 - way) * number / count) for number in range(1, count)]
    return [*first, *(Stage(part, last=False) for part in parts), Stage(budget)]


def share_of(budget: Budget) -> float:
    """The share of what the layers cost that has to go."""
    return 1 - budget.limit / (budget.total(budget.dense) - budget.measure.outside(budget.dense))


def check_reachable(budget: Budget, options: PruneOptions) -> None:
    """Refuse, before scoring, what no choice of SAAP's options can meet; the UserError names what can be met."""
    shape, kept = budget.dense, options.kept_layers
    if options.drop_layers:
        free = [i for i in range(len(shape.layers)) if i not in kept]
        if options.drop_layers >= len(free) + bool(kept):
            raise UserError(
                f"--drop-layers {options.drop_layers} leaves no layer: {len(free)} of {len(shape.layers)} may go"
            )
        # Which ones go is not known yet; those that cost most leave the least.
        cost = [budget.layer_cost(sizes) for sizes in shape.layers]
        gone = sorted(free, key=cost.__getitem__)[-options.drop_layers :]
        left = [i for i in range(len(shape.layers)) if i not in gone]
        kept = frozenset(place for place, index in enumerate(left) if index in kept)
        shape = shape.with_layers(tuple(shape.layers[i] for i in left))
    check_floor(shape, budget, replace(options, keep_layers=kept))


def layers_plan(
    model: PreTrainedModel, ids: torch.Tensor, stage: Stage, options: PruneOptions, progress: Progress | None = None
) -> PrunePlan:
    """The plan without as many layers as the stage says, those that change least what passes through them.

    Its reasons have no price for what went whole, and its own price is 0.

    Raises:
        UserError: no layer with attention would be left, or the model is not finite on the text.
    """
    shape = stage.budget.dense
    ranking = rank(model, shape, ids, replace(options, method="shortgpt"), progress)
    if stage.layers > len(ranking.removals):
        raise UserError(
            f"--drop-layers {stage.layers} leaves no attention: {counted(len(ranking.removals), 'layer')} may go"
        )
    gone = sum(removal.weights for removal in ranking.removals[: stage.layers])
    plan = ranking.plan_below(gone / shape.layer_weights)
    reasons = sizes_lost(plan, stage.budget)
    blocks = tuple(replace(block, price=None if block.saved else 0.0) for block in reasons.blocks)
    return replace(plan, reasons=replace(reasons, blocks=blocks))


class KeptStages:
    """The hidden folder beside the output, which holds the stages, and what a stage puts aside."""

    def __init__(self, folder: Path, key: str) -> None:
        """``key`` names all that the stages depend on."""
        self.folder, self._key = folder, key

    def path(self, number: int) -> Path:
        return self.folder / f"{number}-{self._key}"

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
def kept_stages(output: Path, *parts: object, owner: bool = True) -> Iterator[KeptStages]:
    """The stages of an output for the time of the block; they are removed when it ends, but not when it is killed.

    Args:
        parts: all that the stages depend on, but for the versions of the packages; tensors count by their bytes.
        owner: this process writes and removes them; others read them.
    """
    said = [p if not isinstance(p, torch.Tensor) else hashlib.sha256(p.numpy().tobytes()).hexdigest() for p in parts]
    versions = [__version__, torch.__version__, transformers.__version__]
    key = hashlib.sha256(json.dumps([versions, *said], default=repr, sort_keys=True).encode()).hexdigest()[:16]
    folder = output.parent / f".{output.name}.pruning"
    if not owner:
        yield KeptStages(folder, key)
        return
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
