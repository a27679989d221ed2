"""Scores of all sequences from portions that are kept one by one: what was killed goes on where it stopped."""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import PreTrainedModel

from saap.base.progress import Progress, advance
from saap.models.shape import ModelShape
from saap.models.streaming import is_streamed
from saap.prune.options import AdaptiveOptions
from saap.prune.scores.cache import keep_scores, read_scores, scores_path
from saap.prune.scores.importance import Scores, estimate, merged
from saap.prune.scores.layerwise import estimate_layerwise, rows_at_once

PORTION = 8  # sequences; seconds of a small model, a minute of one that barely fits


def scores_of(
    model: PreTrainedModel,
    shape: ModelShape,
    ids: torch.Tensor,
    options: AdaptiveOptions,
    *,
    weights: str | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Score every structure on ids [sequences, tokens], portion by portion; UserError where a loss is not finite.

    Portions are kept under ``weights``, the hash of the model's weights; None keeps none.
    """
    c, element = float(ids.shape[1]), options.element
    by_layer = is_streamed(model)
    estimator = estimate_layerwise if by_layer else estimate
    rows = rows_at_once(shape, ids.shape[1]) if by_layer else PORTION
    settings = {"element": element} if element == "none" else {"element": element, "c": c}
    portions = [ids] if element == "exact" else list(ids.split(rows))  # exact scores do not add up
    scores: list[Scores] = []
    done = 0
    for portion in portions:

        def report(label: str, part: float, total: float, done: int = done, count: int = len(portion)) -> None:
            advance(progress, label, done + count * part / total, len(ids))  # of a portion as that of all sequences

        path = scores_path(weights, portion, settings) if weights else None
        known = read_scores(path) if path else None
        if known is None:
            known = estimator(model, shape, portion, c=c, element=element, progress=report)
            if path:
                keep_scores(path, known)
        scores.append(known)
        done += len(portion)
    return replace(merged(scores), c=c)
