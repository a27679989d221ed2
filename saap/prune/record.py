"""What a pruned directory says of itself in its ``saap.json``: the plan, the options and where it all came from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
import transformers

from saap import __version__
from saap.models.record import Lineage, Plan, Record
from saap.models.shape import LayerSizes
from saap.prune.options import PruneOptions
from saap.prune.plan import LayerPlan, Move, PrunePlan, Reason, Reasons, Weighed
from saap.prune.search.budget import Budget


@dataclass(frozen=True)
class Pruning:
    """One pruning: what it was asked, and what it is made from; all of its stages share it.

    Attributes:
        budget: of the base model.
        ids: of calibration, [sequences, tokens].
        lineage: the base model, and what is known of the text.
        stages: how many there are.
    """

    options: PruneOptions
    budget: Budget
    ids: torch.Tensor
    lineage: Mapping[str, Any]
    stages: int


def record_of(pruning: Pruning, plan: PrunePlan, achieved: dict[str, float | None]) -> Record:
    """The record of a slim directory.

    Args:
        plan: of the base, with the requirement and the reasons.
        achieved: what the slim model has of what was asked for.
    """
    options, lineage, ids = pruning.options, pruning.lineage, pruning.ids
    ours = options.method == "saap"
    return {
        "method": options.method,
        "plan": cast(
            "Plan",
            {
                **plan.requirement,
                "achieved": achieved,
                "price_nats": plan.price,
                "reasons": plan.reasons.record() if plan.reasons else None,
                "dense_layers": [asdict(sizes) for sizes in pruning.budget.dense.layers],
                "layers": [asdict(layer) for layer in plan.layers],
            },
        ),
        "options": {
            "block": options.group_size,
            "compensate": options.compensation,
            "heads": options.heads if ours else options.prunes_heads(pruning.budget.dense),
            "steps": pruning.stages,
            **({"drop_layers": options.drop_layers} if options.drop_layers else {}),
            "keep_layers": sorted(options.kept_layers),
            "seed": options.seed,
            **({"modules": options.modules, "adaptive": asdict(options.adaptive)} if ours else {}),
        },
        "lineage": cast(
            "Lineage",
            {
                **lineage,
                "calibration": {
                    "sequences": len(ids),
                    "tokens": ids.shape[1],
                    "sha256": hashlib.sha256(ids.numpy().tobytes()).hexdigest(),
                    **lineage.get("calibration", {}),
                },
                "versions": {"saap": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
            },
        ),
    }


def plan_of(recorded: Mapping[str, Any]) -> PrunePlan:
    """The plan in the record of a slim directory, as :func:`record_of` writes it.

    Raises:
        KeyError, TypeError: it holds none.
    """
    known = recorded["reasons"]
    weighed = tuple(Weighed(**each) for each in known.get("weighed", ())) if known else ()
    reasons = Reasons(known["unit"], tuple(map(_reason, known["blocks"])), weighed) if known else None
    beside = ("achieved", "price_nats", "reasons", "dense_layers", "layers")
    requirement = {name: value for name, value in recorded.items() if name not in beside}
    return PrunePlan(layers_of(recorded["layers"]), requirement, recorded["price_nats"], reasons)


def layers_of(recorded: Sequence[Mapping[str, Sequence[int]]]) -> tuple[LayerPlan, ...]:
    return tuple(
        LayerPlan(tuple(kept["query_heads"]), tuple(kept["kv_heads"]), tuple(kept["ffn"])) for kept in recorded
    )


def _reason(block: Mapping[str, Any]) -> Reason:
    sizes = {name: LayerSizes(**block[name]) for name in ("had", "keeps")}
    moves = {
        name: Move(**{**move, "to": LayerSizes(**move["to"])}) if (move := block[name]) else None
        for name in ("last", "next", "quarter")
    }
    return Reason(**{**block, **sizes, **moves})
