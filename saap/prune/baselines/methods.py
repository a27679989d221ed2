"""The methods that SAAP is compared with, in the same harness: the same grid, budget and cut.

docs/baselines.md says what each does, where it differs from its reference code and how that was checked.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from saap.base.errors import UserError
from saap.base.progress import Progress
from saap.models.shape import ModelShape
from saap.prune.baselines.plans import Ranking, Removal, block_removals, meet, threshold_key, uniform_key
from saap.prune.baselines.scores import (
    StructureScores,
    flap_scores,
    taylor_scores,
    wanda_scores,
)
from saap.prune.options import METHODS, TAYLOR, PruneOptions
from saap.prune.plan import PrunePlan
from saap.prune.scores.activations import Activations, collect
from saap.prune.search.budget import Budget
from saap.prune.search.explain import sizes_lost

BASELINES = METHODS[1:]


@dataclass(frozen=True)
class Published:
    """A method's settings as its authors have them; docs/baselines.md has the sources."""

    sequences: int | None  # calibration sequences; None is every window of the text
    tokens: int  # per sequence
    keep_layers_rule: tuple[int, int]  # how many first and last layers stay whole in a model of 32 layers
    text: str  # what the calibration text is

    def kept(self, layers: int) -> frozenset[int]:
        """Return the layers that the rule keeps whole in a model of this many; shallow models keep fewer."""
        first, last = self.keep_layers_rule
        first, last = min(first, layers // 4), min(last, layers // 8)
        return frozenset((*range(first), *range(layers - last, layers)))


_PUBLISHED = {
    **dict.fromkeys(TAYLOR, Published(10, 64, (4, 2), "BookCorpus, train")),
    "wanda_sp": Published(128, 128, (0, 0), "C4, train"),
    "flap": Published(1024, 128, (0, 0), "WikiText-2 raw, train"),
    "shortgpt": Published(None, 256, (0, 0), "PG19, validation"),
}


def published(method: str) -> Published:
    """Return the settings of a method as its authors have them; UserError for an unknown method."""
    _check_method(method)
    return _PUBLISHED[method]


def ranked_plan(
    model: PreTrainedModel, ids: torch.Tensor, budget: Budget, options: PruneOptions, progress: Progress | None = None
) -> PrunePlan:
    """Return the method's plan for ``budget.dense`` that meets the budget; the model is left as it was.

    Raises:
        UserError: the requirement cannot be met, or the model is not finite on the text.
    """
    plan = meet(rank(model, budget.dense, ids, options, progress).plan_at, budget, budget.cut)
    return replace(plan, reasons=sizes_lost(plan, budget))


def rank(
    model: PreTrainedModel,
    shape: ModelShape,
    ids: torch.Tensor,
    options: PruneOptions,
    progress: Progress | None = None,
) -> Ranking:
    """Score ``model`` once; the ranking then gives a plan for any share. Weights and flags stay as they were.

    If no layers are to stay whole, LLM-Pruner's methods keep the first 4 and last 2 (of 16 or more).

    ``ids``: [sequences, tokens] int64.

    Raises:
        UserError: no such method or layer, or the model is not finite on the text.
    """
    method, keep_layers, heads = options.method, options.keep_layers, options.prunes_heads(shape)
    _check_method(method)
    if keep_layers is not None and not keep_layers and method in TAYLOR:
        keep_layers = published(method).kept(len(shape.layers))
    kept = keep_layers or frozenset()
    if wrong := sorted(i for i in kept if not 0 <= i < len(shape.layers)):
        raise UserError(f"there is no layer {wrong[0]} to keep; the model has layers 0 to {len(shape.layers) - 1}")
    free = [i for i in range(len(shape.layers)) if i not in kept]
    if method == "shortgpt":
        layers = _whole_layers(shape, free, collect(model, shape, ids, progress=progress))
        return Ranking(method, shape, tuple(layers))
    scores = _scores(method, model, shape, ids, progress)
    removals = []
    for place, layer in enumerate(free):
        for kind, values in (("ffn", scores.ffn[layer]), *((("group", scores.group[layer]),) if heads else ())):
            if not len(values):
                continue
            if not torch.isfinite(values).all():
                raise UserError(f"layer {layer}: the scores of {method} are not finite: check the model and the text")
            key = threshold_key(values) if method == "flap" else uniform_key(place, kind)
            removals += [each.at(key(each)) for each in block_removals(shape, layer, kind, values, options.least_group)]
    return Ranking(method, shape, tuple(sorted(removals, key=lambda each: each.key)))


def _scores(
    method: str, model: PreTrainedModel, shape: ModelShape, ids: torch.Tensor, progress: Progress | None
) -> StructureScores:
    if method in TAYLOR:
        return taylor_scores(method, model, shape, ids, progress)
    score = wanda_scores if method == "wanda_sp" else flap_scores
    return score(model, shape, collect(model, shape, ids, progress=progress))


def _whole_layers(shape: ModelShape, free: list[int], activations: Activations) -> list[Removal]:
    """Whole layers, least block influence first; the last layer with attention stays, wherever it is in the order."""
    order = sorted(free, key=lambda layer: float(activations.influence[layer]))
    attending = [i for i, sizes in enumerate(shape.layers) if sizes.query_heads]
    if all(i in free for i in attending):
        order.remove(max(attending, key=order.index))
    weights = [shape.weights_of(sizes) for sizes in shape.layers]
    return [
        Removal(layer, "layer", (), weights[layer], 0.0, 1.0, float(activations.influence[layer])) for layer in order
    ]


def _check_method(method: str) -> None:
    if method not in BASELINES:
        raise UserError(f"method {method!r} is not known; known: {', '.join(BASELINES)}")
