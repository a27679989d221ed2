"""Measured prices of narrower attention and of removed runs, in long windows.

A price (:mod:`saap.prune.search.library`) is of second order, on windows as short as those that calibrate. Some
attentions are needed for what lies further back, and their price does not say so: it can be a quarter of what they cost
in windows of 1,024 tokens. A run of several layers is not a small change, and costs up to three times its price. So the
search solves, what its plan takes is put into the model, one thing at a time and refitted, and the KL divergence from
the model as it is takes the place of the price; until a plan takes nothing that was not measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from saap.base.progress import Progress
from saap.models.architectures import architecture_of
from saap.models.layer_walk import batches_of, layers_of, logits_after, removed_hooks, run_layer, states_after
from saap.models.shape import ATTENTION, KINDS
from saap.prune.forms import Place
from saap.prune.plan import LayerPlan
from saap.prune.scores.gradients import adding_module
from saap.prune.search.kept_prices import KeptDivergences
from saap.prune.search.library import Change, Pricing, Run
from saap.prune.search.milp import Library, SearchResult

WINDOW, WINDOWS = 1024, 2  # tokens, and how many
LONG_TEXT = 98_304  # additional tokens of text, to find windows in
FAR = 257  # tokens back, and more
EVERY = 4  # one of this many tokens is judged
SAYING = "measuring the plan, round {}"  # a deep cut needs 20 and more


def long_windows(ids: torch.Tensor) -> torch.Tensor:
    """Find the two windows of packed text [rows, tokens] that repeat most from far back; [windows, tokens].

    Rows that follow each other are one text (:func:`saap.text.documents.pack`). What attention over long distances is
    needed for is tokens that occurred before, and in most windows few did.
    """
    rows = max(1, min(WINDOW // ids.shape[1], len(ids) // WINDOWS))
    windows = ids[: len(ids) // rows * rows].view(-1, rows * ids.shape[1])
    order = torch.tensor([_come_again(window) for window in windows]).argsort(descending=True, stable=True)
    return windows[order[:WINDOWS]]


def _come_again(ids: torch.Tensor) -> int:
    """Count tokens that occurred before, but not in the last 256."""
    before = (ids[:, None] == ids).tril(-1)
    return int((before.tril(-FAR).any(1) & ~before.triu(1 - FAR).any(1)).sum())


class Windows:
    """A model as it is on long windows [windows, tokens], from which the model with a change is told apart."""

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, ids: torch.Tensor) -> None:
        self._model = model
        (self._batch,) = batches_of(model, [ids])
        # Families that leave keys and values for later layers write over them, so that all layers run again.
        whole = [[self._batch.hidden], *states_after(model, [self._batch], [self._batch.hidden])]
        self._states = [hidden for (hidden,) in whole[:1] if self._batch.shared is not None] or [h for (h,) in whole]
        self._dense = self._logprobs(whole[-1][0])

    def _logprobs(self, hidden: torch.Tensor) -> torch.Tensor:
        """Log-probabilities at some places, [1, places, vocab]."""
        return logits_after(self._model, hidden.flatten(0, 1)[None, ::EVERY]).log_softmax(-1)

    @torch.no_grad()
    def divergence(self, change: Change) -> float:
        """KL from the model as it is, nats per token."""
        first = min(place[0] for place in (*change.gone, *([change.of] if change.of else [])))
        first = first if len(self._states) > 1 else 0
        hidden = self._states[first]
        with self._changed(change):
            for index, layer in enumerate(layers_of(self._model)[first:], first):
                hidden = run_layer(layer, hidden, self._batch.arguments[index])
        now = self._logprobs(hidden)
        return float(F.kl_div(now, self._dense, log_target=True, reduction="sum")) / now.shape[1]

    @contextmanager
    def _changed(self, change: Change) -> Iterator[None]:
        with removed_hooks() as handles:
            for index, name in change.gone:
                module = adding_module(self._model, index, KINDS[name])
                handles.append(module.register_forward_hook(lambda _, args, output: torch.zeros_like(output)))
            if change.of is not None and change.weight is not None:
                index, name = change.of
                linear = layers_of(self._model)[index].get_submodule(
                    architecture_of(self._model.config).writing(KINDS[name])
                )
                handles.append(linear.register_forward_hook(partial(_instead, change)))
            yield


def _instead(change: Change, linear: nn.Linear, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
    assert change.weight is not None, "the matrix changes"
    return F.linear(args[0], change.weight, linear.bias)


@dataclass
class Measuring:
    """Measures what plans take, and holds the model's states on the windows from the first time on."""

    pricing: Pricing
    ids: torch.Tensor  # packed rows of text [rows, tokens]
    kept: KeptDivergences
    progress: Progress | None = None
    _windows: Windows | None = field(default=None, init=False)
    _rounds: int = field(default=0, init=False)

    def more(self, library: Library, result: SearchResult) -> Library | None:
        """Measure what this plan uses, and return the library with it; None if nothing is left to measure."""
        self._rounds += 1
        options, runs = _unmeasured(library, result)
        if not options and not runs:
            return None
        self._measure(
            {place: keep for place, keep in options.items() if self.kept.get(_option(place, keep)) is None},
            [run for run in runs if self.kept.get(_run(run)) is None],
        )
        times = dict(library.times)
        for place, keep in options.items():
            price = next(price for offered, price in library.offers[place] if offered == keep)
            times[place] = (self.kept.get(_option(place, keep)) or 0.0) / price
        return library.measured(times, {run: self.kept.get(_run(run)) or 0.0 for run in runs})

    def _measure(self, options: Mapping[Place, LayerPlan], runs: Sequence[Run]) -> None:
        count = len(options) + len(runs)
        if not count:
            return
        if self._windows is None:
            self._windows = Windows(self.pricing.model, long_windows(self.ids))
        divergences: dict[str, float] = {}
        saying = SAYING.format(self._rounds)
        for done, change in enumerate(self.pricing.changes(options, runs)):
            if self.progress:
                self.progress(saying, done, count)
            name = _option(change.of, options[change.of]) if change.of and not change.gone else _run(change.gone)
            divergences[name] = self._windows.divergence(change)
        if self.progress:
            self.progress(saying, count, count)
        self.kept.add(divergences)


def _option(place: Place, keep: LayerPlan) -> str:
    return f"{place[0]}.{place[1]} {len(keep.query_heads)}/{len(keep.kv_heads)}"


def _run(run: Run) -> str:
    return "+".join(f"{index}.{kind}" for index, kind in run)


def _unmeasured(library: Library, result: SearchResult) -> tuple[dict[Place, LayerPlan], list[Run]]:
    """Return what a plan uses unmeasured: narrower attention by its block, and removed runs."""
    options, places = {}, []
    for block, option in zip(result.blocks, result.chosen, strict=True):
        place = (block.layer, block.kind)
        places.append((place, option.kept > 0))
        if block.kind == ATTENTION.name and 0 < option.kept < block.whole.kept and place not in library.times:
            options[place] = option.keep
    priced = {gap.blocks for gap in library.gaps if not gap.measured}
    runs = [tuple(place for place, _ in run) for stays, run in groupby(places, lambda each: each[1]) if not stays]
    return options, [run for run in runs if run in priced]  # the others were measured
