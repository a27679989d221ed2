"""Scores of all sequences from portions that are kept one by one: what was killed goes on where it stopped."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from transformers import PreTrainedModel

from saap.importance import Element, Progress, Scores, estimate, merged
from saap.importance_layerwise import estimate_layerwise, rows_at_once
from saap.score_cache import cached_scores
from saap.streaming import is_streamed
from saap.structures import ModelShape

PORTION = 8  # sequences; seconds of a small model, a minute of one that barely fits


def scores_of(
    model: PreTrainedModel,
    shape: ModelShape,
    ids: torch.Tensor,
    *,
    c: float,
    element: Element,
    weights: str | None,
    progress: Progress | None = None,
) -> Scores:
    """Score every structure on ids [sequences, tokens], portion by portion.

    Args:
        weights: hash of the model's weights, under which scores are kept; None keeps none.

    Raises:
        SaapError: a loss is not finite.
    """
    by_layer = is_streamed(model)
    estimator = estimate_layerwise if by_layer else estimate
    rows = rows_at_once(shape, ids.shape[1]) if by_layer else PORTION
    settings = {"element": element} if element == "none" else {"element": element, "c": c}
    found: list[Scores] = []
    done = 0
    for portion in [ids] if element == "exact" else ids.split(rows):  # exact scores do not add up
        say = partial(_portion, progress, done, len(portion), len(ids)) if progress else None
        compute = partial(estimator, model, shape, portion, c=c, element=element, progress=say)
        found.append(compute() if weights is None else cached_scores(weights, portion, settings, compute)[0])
        done += len(portion)
    return replace(merged(found), c=c)


def _portion(progress: Progress, before: int, count: int, of: int, label: str, done: float, total: float) -> None:
    """Progress of a portion as that of all sequences."""
    progress(label, before + count * done / total, of)
