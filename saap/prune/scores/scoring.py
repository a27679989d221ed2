"""Scores of all sequences from portions that are kept one by one: what was killed goes on where it stopped."""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import PreTrainedModel

from saap.base.errors import UserError
from saap.base.progress import Progress
from saap.models.shape import ModelShape
from saap.models.streaming import is_streamed
from saap.prune.options import AdaptiveOptions
from saap.prune.scores.cache import keep_scores, read_scores, scores_path
from saap.prune.scores.importance import Scores, estimate, merged
from saap.prune.scores.layerwise import estimate_layerwise, rows_at_once
from saap.prune.shares import shares

LOSS = "loss"  # beside the scores on their way to other processes
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
    c, element = float(ids.shape[1]) if options.c is None else options.c, options.element
    by_layer = is_streamed(model)
    estimator = estimate_layerwise if by_layer else estimate
    rows = rows_at_once(shape, ids.shape[1]) if by_layer else PORTION
    settings = {"element": element} if element == "none" else {"element": element, "c": c}
    together = shares()
    rows = min(rows, -(-len(ids) // together.count))
    portions = [ids] if element == "exact" else list(ids.split(rows))  # exact scores do not add up
    mine = together.mine(portions)
    of = sum(map(len, mine))
    found: list[Scores] = []
    done = 0
    error = None
    for portion in mine:

        def say(label: str, part: float, total: float, done: int = done, count: int = len(portion)) -> None:
            if progress:  # of a portion as that of all sequences
                progress(label, done + count * part / total, of)

        path = scores_path(weights, portion, settings) if weights else None
        scores = read_scores(path) if path else None
        try:
            if scores is None:
                scores = estimator(model, shape, portion, c=c, element=element, progress=say)
                if path:
                    keep_scores(path, scores)
        except UserError as problem:
            if together.count == 1:
                raise
            error = problem  # which the others wait for
            break
        found.append(scores)
        done += len(portion)
    return replace(merged(_of_all(found, error, len(portions), c) if together.count > 1 else found), c=c)


def _of_all(mine: list[Scores], error: UserError | None, portions: int, c: float) -> list[Scores]:
    """The scores of all portions, in their order, from those of every process."""
    together, found = shares(), []
    for number in range(portions):
        place, owner = divmod(number, together.count)
        own: dict[str, torch.Tensor] | UserError | None = None
        if owner == together.rank:
            own = (
                error
                if place >= len(mine)
                else {**mine[place].tensors(), LOSS: torch.tensor([mine[place].loss], dtype=torch.float64)}
            )
        tensors = together.tensors(owner, own)
        loss = float(tensors.pop(LOSS))
        found.append(Scores.named(tensors, c, loss))
    return found
