"""Prices of smaller blocks, and of removed blocks and runs of them, in nats after compensation.

One walk through the model, which stays whole, collects what enters the matrix that writes of every block. For a few
widths of a block, for every choice of its heads, and for runs of blocks that could go, the remaining matrix is refitted
as :mod:`saap.prune.cut.refit` would, and what is still missing on other text, d, is priced by the Fisher information
there, 1/2 E[(g.d)^2] (:mod:`saap.prune.scores.gradients`). All prices are of one kind, the KL divergence from the model
as it is, so that a channel, a KV group, a block and a run of layers compete for the same milliseconds.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from saap.base.errors import UserError
from saap.base.progress import Progress, advance
from saap.models.architectures import architecture_of, shape_of
from saap.models.layer_walk import Batch, batches_of, inputs_of, layers_of, output_of, outputs_of, run_layer
from saap.models.shape import ATTENTION, KINDS, BlockKind
from saap.models.streaming import is_streamed, present
from saap.prune.cut.ridge import Products, regression, token_weights
from saap.prune.cut.surgery import kept_columns
from saap.prune.forms import Place
from saap.prune.plan import LayerPlan
from saap.prune.scores.gradients import NOT_FINITE, adding_module, block_gradients
from saap.prune.search.choices import RUNS, Allowed, choices, runs_of
from saap.prune.search.milp import LEAST_PRICE, Gap, Library
from saap.prune.search.rounding import Prices, RoundedMatrix, Rounding, rounded_block, vocabulary_prices

FITTED, FITTED_STREAMED = 24, 12
DAMPING = 0.3
ANCHORS = (0.125, 0.25, 0.5, 0.75, 0.875)  # shares of a block's channels that are refitted; widths between are read off
MOST_STREAMED = 1  # layers in one piece, where layers are read one at a time: what enters their matrices is held

Learnt = Callable[[torch.Tensor], torch.Tensor]  # from the kept columns of a matrix to what a refit adds to them
Run = tuple[Place, ...]


@dataclass
class _Point:
    """A block of the model as it is, on batches of the fitted text, followed by batches of the judged text."""

    place: Place
    linear: nn.Linear
    behind: nn.Module | None  # the norm behind the matrix
    x: list[torch.Tensor]  # what enters the matrix
    out: list[torch.Tensor]  # what the block adds
    weigh: list[torch.Tensor]  # by what a token counts
    fitted: int  # number of the batches that are fitted
    rounding: tuple[Prices, Prices] | None = None  # of the matrix that reads, and of the one that writes
    later: list[tuple[Run, list[torch.Tensor]]] = field(default_factory=list)  # runs behind it, and what they add
    bare: list[tuple[Run, list[torch.Tensor]]] = field(default_factory=list)  # that end here, nothing in front of them

    @property
    def tokens(self) -> int:
        """Tokens of the fitted text."""
        return sum(x[..., 0].numel() for x in self.x[: self.fitted])


@dataclass(frozen=True)
class _Judge:
    """Prices changes of what a block adds, on the judged text."""

    gradients: Mapping[Place, torch.Tensor]  # at what each block adds, [sequences, tokens, hidden]

    def price(self, place: Place, change: list[torch.Tensor]) -> float:
        """Nats per token of a change, in batches of the judged text."""
        d = torch.cat(change).float()
        price = 0.5 * float((self.gradients[place].to(d.device).float() * d).sum(-1).square().mean())
        if not math.isfinite(price):
            raise UserError(NOT_FINITE)
        return max(price, LEAST_PRICE)

    def difference(self, place: Place, before: Sequence[torch.Tensor], now: Sequence[torch.Tensor]) -> float:
        """Price a block that adds something else now, in batches of the judged text."""
        return self.price(place, [b - a for a, b in zip(before, now, strict=True)])


@dataclass(frozen=True, eq=False)
class Change:
    """One option or run as a change of the model: removed blocks, and the matrix that makes up for them.

    Attributes:
        of: the block that keeps less, or in front of the run; None where nothing is.
        weight: [outputs, inputs] of its matrix, 0 in columns that go.
        gone: blocks that add nothing.
    """

    of: Place | None
    weight: torch.Tensor | None
    gone: Run


def most_blocks(streamed: bool) -> int:
    """Blocks in the longest run that is priced; what enters as many matrices, and one, is held at a time."""
    return 2 * (MOST_STREAMED if streamed else max(RUNS))


def fitted_on(streamed: bool) -> int:
    """Sequences that prices are fitted on; the refit of the plan itself takes all."""
    return FITTED_STREAMED if streamed else FITTED


class Pricing:
    """The walk that prices a library.

    Args:
        scores: P of every structure by its type, per layer [structures]; they say which go first of a block.
        texts: ids [sequences, tokens] that are fitted, and that are judged.
        refits: a matrix makes up for what goes.
        rounded: price integers, too; it takes a fifth of the time, and only a search that chooses them asks.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        scores: Mapping[str, list[torch.Tensor]],
        texts: tuple[torch.Tensor, torch.Tensor],
        allowed: Allowed,
        *,
        refits: bool = True,
        rounded: bool = True,
    ) -> None:
        self.model, self.shape, self.rounded = model, shape_of(model.config), rounded
        self._allowed, self._refits = allowed, refits
        ranked = {type_: [row.double().cpu().numpy() for row in rows] for type_, rows in scores.items()}
        self.choices = choices(self.shape, allowed, ranked)
        self._fitted, self._judged = texts[0][: fitted_on(is_streamed(model))], texts[1]
        architecture = architecture_of(model.config)
        normed = architecture.attention_post_norm or architecture.ffn_post_norm
        self._makes_up = refits and not normed  # whether a matrix does for what is behind it

    def library(self, progress: Progress | None = None) -> Library:
        """Price everything. Raises UserError: a price is not finite."""
        judge = _Judge(block_gradients(self.model, self.shape, self._judged, progress=progress))
        with torch.no_grad():
            return self._priced(judge, progress)

    def _priced(self, judge: _Judge, progress: Progress | None) -> Library:
        offers: dict[Place, tuple[tuple[LayerPlan, float], ...]] = {}
        gaps: list[Gap] = []
        rounding: dict[Place, tuple[Prices, Prices]] = {}
        most = most_blocks(is_streamed(self.model))
        runs = [run for run in runs_of(self.shape, self._allowed) if len(run) <= most]

        def offered() -> Iterator[_Point]:  # at once: where layers are read one at a time, the matrix goes again
            for done, point in enumerate(self._points(self._fitted, self._judged, judge=judge)):
                advance(progress, "pricing (blocks)", done, len(self.choices))
                offers[point.place] = self._offers(point, judge)
                if point.rounding is not None:
                    rounding[point.place] = point.rounding
                yield point

        for point in self._with_runs(offered(), runs):
            gaps += self._gaps(point, judge)
        advance(progress, "pricing (blocks)", len(self.choices), len(self.choices))
        vocabulary = vocabulary_prices(self.model, self._judged) if self.rounded else None
        return Library(offers, tuple(gaps), Rounding(rounding, vocabulary) if vocabulary is not None else None)

    @torch.no_grad()
    def changes(self, options: Mapping[Place, LayerPlan], runs: Collection[Run]) -> Iterator[Change]:
        """Yield the change of the model by each of these options, and by the removal of each of these runs."""
        left = len(options) + len(runs)
        places = {*options, *(place for run in runs for place in self._with_before(run))}
        for point in self._with_runs(self._points(self._fitted, places=places), runs):
            weight = point.linear.weight
            changes = [Change(None, None, run) for run, _ in point.bare]
            for (run, _), change in zip(point.later, self._parts(point), strict=True):
                changes.append(Change(point.place, weight if change is None else weight + change, run))
            if point.place in options:
                kept = kept_columns(KINDS[point.place[1]], options[point.place], self.shape)
                new = torch.zeros_like(weight)
                new[:, kept] = weight[:, kept] + self._learnt(point)(kept)
                changes.append(Change(point.place, new, ()))
            yield from changes
            left -= len(changes)
            if not left:
                return

    def _with_runs(self, points: Iterator[_Point], runs: Collection[Run]) -> Iterator[_Point]:
        """Yield the points, each as soon as the output of the runs behind it is known."""
        number = {place: n for n, place in enumerate(self.choices)}
        ending: dict[Place, list[Run]] = {}
        until = dict(number)  # the last point that each must wait for
        for run in runs:
            ending.setdefault(run[-1], []).append(run)
            for place in self._with_before(run):
                until[place] = max(until[place], number[run[-1]])
        waiting: deque[_Point] = deque()
        for point in points:
            waiting.append(point)
            for run in ending.get(point.place, []):
                added = [sum(rows) for rows in zip(*(p.out for p in waiting if p.place in run), strict=True)]
                before = self._with_before(run)[0]
                if before == run[0]:
                    point.bare.append((run, added))
                else:
                    next(p for p in waiting if p.place == before).later.append((run, added))
            while waiting and until[waiting[0].place] <= number[point.place]:
                yield waiting.popleft()

    def _with_before(self, run: Run) -> Run:
        """Return the run, preceded by the block before it if there is one."""
        order = list(self.choices)
        first = order.index(run[0])
        return (*order[max(0, first - 1) : first], *run)

    def _points(
        self, *texts: torch.Tensor, places: Container[Place] | None = None, judge: _Judge | None = None
    ) -> Iterator[_Point]:
        """Yield the blocks of the model in their order, on a text that is fitted and, for prices, one that is judged.

        ``wanted``: which of them; None is all. ``judge``: prices their integers, where those are wanted.
        """
        batches = [batches_of(self.model, list(text.split(8))) for text in texts]
        flat = [batch for part in batches for batch in part]
        fitted = len(batches[0])
        stream = [batch.hidden for batch in flat]
        architecture = architecture_of(self.model.config)
        for index, layer in enumerate(layers_of(self.model)):
            with present(layer):
                modules = dict(layer.named_modules())
                kinds = [k for k in self.shape.layers[index].blocks if places is None or (index, k.name) in places]
                writing = {kind.name: modules[architecture.writing(kind)] for kind in kinds}
                reading = dict(writing)
                for kind in kinds:
                    if (norm := modules.get(architecture.norm_before(kind))) is not None and norm is not layer:
                        reading[f"stream {kind.name}"] = norm
                passes: list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]] = []
                # Before the layer runs as it is: what layers leave for later ones is then as it should be.
                entering = list(zip(stream, flat, strict=True))[fitted:]
                integers = {
                    kind: self._in_integers(index, kind, layer, entering) for kind in kinds if judge and self.rounded
                }
                for number, (hidden, batch) in enumerate(zip(stream, flat, strict=True)):
                    with inputs_of(reading) as inputs, outputs_of(writing) as outputs:
                        stream[number] = run_layer(layer, hidden, batch.arguments[index])
                    passes.append((dict(inputs), dict(outputs)))
                for kind in kinds:
                    linear = writing[kind.name]
                    adding = adding_module(self.model, index, kind)
                    behind = None if adding is linear else adding
                    x = [inputs.pop(kind.name) for inputs, _ in passes]
                    products = [outputs.pop(kind.name) for _, outputs in passes]
                    read = [inputs.pop(f"stream {kind.name}", None) for inputs, _ in passes]
                    weigh = [
                        token_weights((p if s is None else s).float()) for p, s in zip(products, read, strict=True)
                    ]
                    out = products if behind is None else [behind(p) for p in products]
                    point = _Point((index, kind.name), linear, behind, x, out, weigh, fitted)
                    if judge and kind in integers:
                        price = partial(judge.difference, point.place, out[fitted:])
                        reads, writes = integers[kind]
                        point.rounding = reads.prices(price), writes.prices(price)
                    yield point

    def _in_integers(
        self, index: int, kind: BlockKind, layer: nn.Module, entering: Sequence[tuple[torch.Tensor, Batch]]
    ) -> tuple[RoundedMatrix, RoundedMatrix]:
        """Round the matrices of a block; ``entering``: states of the judged text before its layer."""
        adding = adding_module(self.model, index, kind)

        def adds() -> list[torch.Tensor]:
            return [output_of(layer, hidden, batch.arguments[index], adding) for hidden, batch in entering]

        parts = architecture_of(self.model.config).matrices
        return rounded_block(dict(layer.named_modules()), parts, kind, adds)

    def _gaps(self, point: _Point, judge: _Judge) -> Iterator[Gap]:
        """Price the runs behind a block: the part that its matrix cannot replace."""
        for run, missing in point.bare:
            yield Gap(run, judge.price(run[-1], [-x for x in missing[point.fitted :]]))
        for (run, missing), change in zip(point.later, self._parts(point), strict=True):
            left = [-x for x in missing[point.fitted :]]
            if change is not None:
                left = [d + x @ change.t() for d, x in zip(left, point.x[point.fitted :], strict=True)]
            yield Gap(run, judge.price(run[-1], left))

    def _parts(self, point: _Point) -> Sequence[torch.Tensor | None]:
        """Fit the block's matrix to each run behind it, [outputs, inputs]; None if it learns nothing."""
        if not self._makes_up or not point.later:
            return [None] * len(point.later)
        added = [torch.cat(rows, -1) for rows in zip(*(a for _, a in point.later), strict=True)]
        return list(self._fit(point, torch.arange(point.linear.in_features), added).tensor_split(len(point.later)))

    def _fit(self, point: _Point, kept: torch.Tensor, targets: list[torch.Tensor]) -> torch.Tensor:
        """C of the targets, batch by batch, on those inputs: [outputs, kept], in the matrix's type."""
        fit = regression(point.tokens, len(kept), targets[0].shape[-1], point.x[0].device)
        for x, weigh, target in list(zip(point.x, point.weigh, targets, strict=False))[: point.fitted]:
            fit.add((x[..., kept].float() * weigh).flatten(0, -2), (target.float() * weigh).flatten(0, -2))
        return fit.solved(DAMPING).to(point.x[0].dtype)

    def _offers(self, point: _Point, judge: _Judge) -> tuple[tuple[LayerPlan, float], ...]:
        """Price the options of a block: some widths are refitted, others are interpolated."""
        index, name = point.place
        whole, *plans = self.choices[point.place]
        if not plans:
            return ((whole, 0.0),)
        learnt = self._learnt(point)
        if name == ATTENTION.name:
            return ((whole, 0.0), *((plan, self._option_price(point, plan, learnt, judge)) for plan in plans))
        field = KINDS[name].sizes[0]
        channels = getattr(self.shape.layers[index], field)
        widths = [len(getattr(plan, field)) for plan in plans]
        near = {int(np.abs(np.array(widths) - share * channels).argmin()) for share in ANCHORS}
        prices = {widths[n]: self._option_price(point, plans[n], learnt, judge) for n in near}
        return ((whole, 0.0), *zip(plans, between(prices, channels, widths), strict=True))

    def _option_price(self, point: _Point, plan: LayerPlan, learnt: Learnt, judge: _Judge) -> float:
        """Price an option: what is missing after compensation."""
        kept = kept_columns(KINDS[point.place[1]], plan, self.shape)
        weight, bias = point.linear.weight, point.linear.bias
        change = -weight
        change[:, kept] = learnt(kept)
        left = []
        for x, out in list(zip(point.x, point.out, strict=True))[point.fitted :]:
            changed = x @ change.t()
            if point.behind is not None:
                whole = x @ weight.t() + (0 if bias is None else bias)
                changed = point.behind(whole + changed) - out
            left.append(changed)
        return judge.price(point.place, left)

    def _learnt(self, point: _Point) -> Learnt:
        """Return a function of the kept columns that computes what a refit adds to them, [outputs, kept]."""
        weight, fitted = point.linear.weight, point.x[: point.fitted]
        if not self._refits:
            return lambda kept: weight.new_zeros(())
        inputs = weight.shape[1]
        if point.tokens < inputs:

            def of_rows(kept: torch.Tensor) -> torch.Tensor:
                gone = torch.ones(inputs, dtype=torch.bool).index_fill(0, kept, False)
                return self._fit(point, kept, [x[..., gone] @ weight[:, gone].t() for x in fitted])

            return of_rows
        products = Products(inputs, 0, weight.device)  # the same for every choice of what stays
        for x, weigh in zip(fitted, point.weigh, strict=False):
            products.add(rows := (x.float() * weigh).flatten(0, -2), rows[:, :0])
        return lambda kept: products.on(kept, weight.float()).solved(DAMPING).to(weight.dtype)


def between(prices: Mapping[int, float], channels: int, widths: Sequence[int]) -> list[float]:
    """Prices of all widths from those of some: log price runs straight in log channels gone, and never falls."""
    known = sorted(prices, reverse=True)  # fewest gone first
    x = np.log([channels - width for width in known])
    y = np.maximum.accumulate(np.log([max(prices[width], LEAST_PRICE) for width in known]))
    at = np.log([channels - width for width in widths])
    logs = np.interp(at, x, y)
    slope = max(1.0, (y[1] - y[0]) / (x[1] - x[0])) if len(known) > 1 else 1.0
    logs = np.where(at < x[0], y[0] + slope * (at - x[0]), logs)
    slope = max(1.0, (y[-1] - y[-2]) / (x[-1] - x[-2])) if len(known) > 1 else 1.0
    logs = np.where(at > x[-1], y[-1] + slope * (at - x[-1]), logs)
    return [float(price) for price in np.exp(logs)]
