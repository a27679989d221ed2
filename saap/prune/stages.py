"""The steps of a pruning: whole layers first where that is asked, then structures, scored anew in each.

Layers are chosen by block influence, ShortGPT's criterion (arXiv 2403.03853), not by the loss without them: that is the
loss of a model that was not tuned, and tuning makes up for a layer better than for as many weights of channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from devices.common.progress import Progress
from saap.models.shape import ModelShape
from saap.prune.baselines.methods import rank
from saap.prune.options import PruneOptions
from saap.prune.plan import PrunePlan
from saap.prune.search.budget import Budget
from saap.prune.search.explain import sizes_lost
from saap.prune.search.milp import check_floor
from saap.system.errors import UserError

SHARE_PER_STEP = 0.15  # of what the layers cost; more at a time and scores say little about what goes together


@dataclass(frozen=True)
class Stage:
    """One step.

    Attributes:
        budget: what the model meets after it.
        layers: how many go whole; 0 where structures go.
        last: whether no other follows.
    """

    budget: Budget
    layers: int = 0
    last: bool = True


def stages_of(budget: Budget, options: PruneOptions) -> list[Stage]:
    """The steps to the requirement.

    Raises:
        UserError: the layers that go whole are more than has to go, or than there are.
    """
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
    count = options.stages or max(1, math.ceil(share / SHARE_PER_STEP - 1e-9))
    parts = [budget.partway(way + (1 - way) * step / count) for step in range(1, count)]
    return [*first, *(Stage(part, last=False) for part in parts), Stage(budget)]


def share_of(budget: Budget) -> float:
    """The share of what the layers cost that has to go."""
    return 1 - budget.limit / (budget.total(budget.dense) - budget.measure.outside(budget.dense))


def check_reachable(budget: Budget, options: PruneOptions) -> None:
    """Refuse, before anything is scored, what no choice of SAAP's options can meet.

    Raises:
        UserError: names the nearest that can be met, or how many layers can go.
    """
    shape, kept = budget.dense, options.kept_layers
    if options.drop_layers:
        free = [i for i in range(len(shape.layers)) if i not in kept]
        if options.drop_layers >= len(free) + bool(kept):
            raise UserError(
                f"--drop-layers {options.drop_layers} leaves no layer: {len(free)} of {len(shape.layers)} may go"
            )
        # Which ones go is not known yet; those that cost most leave the least.
        cost = [budget.attention_cost(sizes) + budget.ffn_cost(sizes) for sizes in shape.layers]
        gone = sorted(free, key=cost.__getitem__)[-options.drop_layers :]
        left = [i for i in range(len(shape.layers)) if i not in gone]
        kept = frozenset(place for place, index in enumerate(left) if index in kept)
        shape = shape.with_layers(tuple(shape.layers[i] for i in left))
    check_floor(shape, options.group_size, kept, options.modules, budget, options.prunes_heads(shape))


def layers_plan(
    model: PreTrainedModel,
    shape: ModelShape,
    calibration: torch.Tensor,
    count: int,
    budget: Budget,
    *,
    keep_layers: frozenset[int] = frozenset(),
    progress: Progress | None = None,
) -> PrunePlan:
    """The plan without the ``count`` layers that change least what passes through them.

    Its reasons have no price for what went whole, and its own price is 0.

    Args:
        calibration: [sequences, tokens] int64.

    Raises:
        UserError: no layer with attention would be left, or the model is not finite on the text.
    """
    ranking = rank(
        "shortgpt", model, shape, calibration, keep_layers=keep_layers, heads=False, block=1, seed=0,
        progress=progress,
    )  # fmt: skip
    if count > len(ranking.steps):
        raise UserError(f"--drop-layers {count} leaves no attention: {len(ranking.steps)} layers may go")
    plan = ranking.plan_below(sum(step.weights for step in ranking.steps[:count]) / shape.layer_weights)
    reasons = sizes_lost(plan, budget)
    blocks = tuple(replace(block, price=None if block.saved else 0.0) for block in reasons.blocks)
    return replace(plan, reasons=replace(reasons, blocks=blocks))
