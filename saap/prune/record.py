"""What a pruned directory says of itself, its ``saap.json``: the plan, the options and where it all came from."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
import transformers

from saap import __version__
from saap.prune.plan import PrunePlan
from saap.prune.search.budget import Budget

if TYPE_CHECKING:
    from saap.prune.options import PruneOptions


def record_of(
    plan: PrunePlan,
    achieved: dict[str, float | None],
    options: PruneOptions,
    budget: Budget,
    calibration: torch.Tensor,
    lineage: dict[str, Any],
    steps: int,
) -> dict[str, Any]:
    """The record of a slim directory.

    Args:
        plan: of the base, with the requirement and the reasons.
        achieved: what the slim model has of what was asked for.
        calibration: ids [sequences, tokens].
        steps: how many led to it.
    """
    return {
        "method": options.method,
        "plan": {
            **plan.requirement,
            "achieved": achieved,
            "price_nats": plan.price,
            "reasons": plan.reasons.record() if plan.reasons else None,
            "dense_layers": [asdict(sizes) for sizes in budget.dense.layers],
            "layers": [asdict(layer) for layer in plan.layers],
        },
        "options": {
            "block": options.group_size,
            "compensate": options.compensation,
            "heads": options.heads if options.method == "saap" else options.prunes_heads(budget.dense),
            "steps": steps,
            **({"drop_layers": options.drop_layers} if options.drop_layers else {}),
            "keep_layers": sorted(options.kept_layers),
            "seed": options.seed,
            **({"modules": options.modules, "adaptive": asdict(options.adaptive)} if options.method == "saap" else {}),
        },
        "lineage": {
            **lineage,
            "calibration": {
                "sequences": len(calibration),
                "tokens": calibration.shape[1],
                "sha256": hashlib.sha256(calibration.numpy().tobytes()).hexdigest(),
                **lineage.get("calibration", {}),
            },
            "versions": {"saap": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        },
    }
