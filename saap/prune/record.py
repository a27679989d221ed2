"""The ``saap.json`` of a pruned directory: the plan, the options and the lineage."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
import transformers
from msgspec import convert, to_builtins

from saap import __version__
from saap.models.architectures import architecture_of
from saap.models.record import Lineage, Plan, Record, Words
from saap.prune.options import PruneOptions
from saap.prune.plan import LayerPlan, PrunePlan, Reasons
from saap.prune.search.budget import Budget
from saap.prune.vocabulary import Chosen


@dataclass(frozen=True)
class Pruning:
    """One pruning: its options, and what it is made from."""

    options: PruneOptions
    budget: Budget  # of the base model
    ids: torch.Tensor  # of calibration, [sequences, tokens]
    lineage: Lineage  # the base model, and what is known of the text
    words: Chosen | None = None  # that stay; None: as the base model
    vocabulary: Words | None = None  # what the record says of them
    candidates: tuple[Chosen, ...] = ()  # vocabularies that the search chooses between

    @property
    def text(self) -> str | None:
        """Source of the calibration text; None if ids were passed."""
        return self.lineage.get("calibration", {}).get("source")

    def choosing(self, words: Chosen | Sequence[Chosen] | None) -> Pruning:
        """Set this vocabulary, or several to choose between."""
        return self.saying(words) if isinstance(words, Chosen) else replace(self, candidates=tuple(words or ()))

    def with_candidate(self, place: int) -> Pruning:
        """Choose one of the candidates; the requirement is then on that vocabulary."""
        return replace(self.saying(self.candidates[place]), budget=self.budget.saying(self.budget.words[place]))

    def saying(self, words: Chosen) -> Pruning:
        """Set this vocabulary."""
        lineage: Lineage = {**self.lineage, "words": words.lineage()}
        return replace(self, words=words, vocabulary=words.record(), lineage=lineage)


def record_of(
    pruning: Pruning, plan: PrunePlan, achieved: dict[str, float | None], config: Mapping[str, object]
) -> Record:
    """Return the record of a slim directory: the plan of the base model, and what the slim model achieved.

    ``config``: of a model of its family.
    """
    options, lineage, ids = pruning.options, pruning.lineage, pruning.ids
    kept = {layer: plan.layers[layer].sizes for layer in plan.kept_layers}
    ours = options.method == "saap"
    return {
        **({"vocabulary": pruning.vocabulary} if pruning.vocabulary else {}),
        "method": options.method,
        "plan": {
            **pruning.budget.record(),
            **({"bundle": plan.forms.bundle(architecture_of(dict(config)), kept)} if plan.forms else {}),
            "planned": pruning.budget.report(plan.kept_shape(pruning.budget.cut), plan=plan),
            "achieved": achieved,
            "price_nats": plan.price,
            **({"gap": plan.gap} if plan.gap else {}),
            "reasons": plan.reasons.record() if plan.reasons else None,
            "dense_layers": to_builtins([sizes.record() for sizes in pruning.budget.dense.layers]),
            "layers": to_builtins([keep.record() for keep in plan.layers]),
        },
        "options": {
            "block": pruning.budget.group_size,
            "compensate": options.compensation,
            "heads": options.heads if ours else options.prunes_heads(pruning.budget.dense),
            "keep_layers": sorted(options.kept_layers),
            "seed": options.seed,
            "keep": sorted(options.keep),
            **({"adaptive": asdict(options.adaptive)} if ours else {}),
        },
        "lineage": {
            **lineage,
            "calibration": {
                "sequences": len(ids),
                "tokens": ids.shape[1],
                "sha256": hashlib.sha256(ids.numpy().tobytes()).hexdigest(),
                **lineage.get("calibration", {}),
            },
            "versions": {"saap": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        },
    }


def plan_of(recorded: Plan) -> PrunePlan:
    """Read a plan that :func:`record_of` wrote; KeyError or ValueError if there is none."""
    layers, reasons = convert(recorded["layers"], tuple[LayerPlan, ...]), recorded["reasons"]
    known = convert(reasons, Reasons) if reasons else None
    return PrunePlan(layers, recorded["price_nats"] or 0.0, known, recorded.get("gap", 0.0))
