"""From scores to nats: what removing a structure costs, fitted to the calibration loss.

Fused scores rank structures of one type but do not compare types. Two numbers per type turn them into a loss,

    price(module option) = kappa * sum of P over what goes * (1 + alpha * share of the module that goes)

fitted to the loss measured with the cheapest structures of *every* layer gone together, at two levels. Joint removals
matter: prices measured one at a time underestimate them by an order of magnitude, and without alpha the search empties
a few layers that a first-order score calls cheap. What is to be compensated is priced by the loss after that: a refit
makes up for most of what a query head did, and for little of what FFN channels did.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from devices.common.progress import Progress
from saap.models.shape import LayerSizes, ModelShape
from saap.prune.plan import LayerPlan, PrunePlan, whole_layer
from saap.prune.scores.cache import KnownLosses
from saap.prune.scores.importance import TYPES
from saap.prune.search.masking import WorkingPoint, masked, mean_nll, without_attention, without_ffn
from saap.prune.search.milp import Module, Option, Prices
from saap.system.errors import UserError

# Shares of every layer's structures that are silenced to fit a type's curve; heads and groups go one or two at a time.
FFN_LEVELS = (0.125, 0.25)
FFN_LEVELS_COMPENSATED = (0.25, 0.5)  # less is made up for so well that it says nothing about more
MODULES_TOGETHER = 5
# How far one measurement may move a price, and the least that anything costs, nats per token.
FACTOR_LIMIT = 10.0
LEAST_PRICE = 1e-4


@dataclass(frozen=True)
class Curve:
    """price = kappa * score * (1 + alpha * share)."""

    kappa: float
    alpha: float


def fit_prices(
    model: PreTrainedModel,
    shape: ModelShape,
    fused: dict[str, list[torch.Tensor]],
    ids: torch.Tensor,
    *,
    keep_layers: frozenset[int] = frozenset(),
    heads: bool = True,
    modules: bool = False,
    compensated: Callable[[PrunePlan], float] | None = None,
    known: KnownLosses | None = None,
    progress: Progress | None = None,
) -> Prices:
    """Price every structure and every whole module in nats per token.

    Args:
        fused: P(G) per type and layer, from :func:`saap.prune.scores.fusion.fuse`.
        ids: [sequences, tokens] of calibration text, other than what the scores were computed on.
        heads: whether query heads and KV groups may go.
        modules: price whole attention and FFN blocks too, each silenced by itself (two forward passes per layer).
        compensated: the loss on ``ids`` of the model that is cut to a plan and compensated, nats per token; None prices
            structures by the loss where they are silenced, as modules always are.
        known: losses that were measured before, on this model and these ids, compensated alike.

    Raises:
        UserError: a loss is not finite.
    """
    kinds = TYPES if heads else ("ffn",)
    free = [i for i in range(len(shape.layers)) if i not in keep_layers]
    steps = 2 * len(kinds) + 1 + (2 * len(shape.layers) + 2 if modules else 0)
    done = 0

    def counted(plans: dict[int, LayerPlan], measure: Callable[[], float], way: str = "") -> float:
        nonlocal done
        if progress:
            progress("pricing", done, steps)
        done += 1
        return finite(measure() if known is None else known.of(plans, measure, way))

    def silenced(plans: dict[int, LayerPlan]) -> float:
        def measure() -> float:
            with masked(model, plans, shape.head_dim):
                return mean_nll(model, ids)

        return counted(plans, measure)

    def gone(plans: dict[int, LayerPlan]) -> float:
        if compensated is None:
            return silenced(plans)
        plan = PrunePlan(tuple(plans.get(i, whole_layer(sizes)) for i, sizes in enumerate(shape.layers)))
        return counted(plans, lambda: compensated(plan), "compensated")

    base = silenced({})
    levels = FFN_LEVELS if compensated is None else FFN_LEVELS_COMPENSATED
    curves = {kind: _fit_curve(kind, shape, fused[kind], base, gone, free, levels) for kind in kinds}
    curves = {kind: curves.get(kind, Curve(0.0, 0.0)) for kind in TYPES}
    priced = {kind: [(curves[kind].kappa * p).double().numpy() for p in fused[kind]] for kind in TYPES}
    no_attention: list[float | None] = [None] * len(shape.layers)
    no_ffn = no_attention
    if modules:
        no_attention = _module_prices(shape, base, silenced, free, "query_heads", without_attention)
        no_ffn = _module_prices(shape, base, silenced, free, "ffn", without_ffn)
    if known:
        known.save()
    if progress:
        progress("pricing", steps, steps)
    alpha = {kind: curve.alpha for kind, curve in curves.items()}
    return Prices(priced["ffn"], priced["head"], priced["group"], no_attention, no_ffn, alpha, heads)


def finite(loss: float) -> float:
    """The loss itself.

    Raises:
        UserError: it is NaN or infinite.
    """
    if not math.isfinite(loss):
        raise UserError(f"the loss is {loss} on the calibration sequences for pricing: check the model and the text")
    return loss


def _fit_curve(
    kind: str,
    shape: ModelShape,
    scores: list[torch.Tensor],
    base: float,
    loss_of: Callable[[dict[int, LayerPlan]], float],
    free: list[int],
    ffn_levels: tuple[float, float],
) -> Curve:
    rows, increases = [], []
    for level in (0, 1):
        plans, scored, weighted = {}, 0.0, 0.0
        for layer in free:
            sizes = shape.layers[layer]
            lost = _cheapest(kind, sizes, scores[layer], level, ffn_levels)
            if lost:
                plans[layer] = _without(kind, sizes, set(lost))
                total, share = float(scores[layer][lost].sum()), len(lost) / len(scores[layer])
                scored, weighted = scored + total, weighted + total * share
        rows.append((scored, weighted))
        increases.append(max(loss_of(plans) - base, LEAST_PRICE))
    if not all(total for total, _ in rows):
        return Curve(0.0, 0.0)
    # Two equations: kappa * scored + (kappa * alpha) * weighted = increase; neither term may be negative.
    from scipy.optimize import nnls

    (linear, interaction), _ = nnls(np.array(rows), np.array(increases))
    if not linear:  # all of it is interaction: keep the ratio finite
        linear = 1e-3 * increases[0] / rows[0][0]
    return Curve(float(linear), float(interaction / linear))


def _cheapest(
    kind: str, sizes: LayerSizes, scores: torch.Tensor, level: int, ffn_levels: tuple[float, float]
) -> list[int]:
    """The structures that go at a level: FFN channels by share, one or two heads of each group, one or two groups."""
    order = torch.argsort(scores, stable=True).tolist()
    if kind == "ffn":
        return order[: round(ffn_levels[level] * len(order))]
    if kind == "group":
        return order[: min(level + 1, max(sizes.kv_heads - 1, 0))]
    each = min(level + 1, max(sizes.heads_per_group - 1, 0))
    return [
        head
        for group in range(sizes.kv_heads)
        for head in [i for i in order if i // sizes.heads_per_group == group][:each]
    ]


def _without(kind: str, sizes: LayerSizes, lost: set[int]) -> LayerPlan:
    whole = whole_layer(sizes)
    if kind == "ffn":
        return LayerPlan(whole.query_heads, whole.kv_heads, tuple(i for i in whole.ffn if i not in lost))
    if kind == "group":
        lost = {head for head in whole.query_heads if head // sizes.heads_per_group in lost}
    return LayerPlan(tuple(h for h in whole.query_heads if h not in lost), whole.kv_heads, whole.ffn)


def _module_prices(
    shape: ModelShape,
    base: float,
    loss_of: Callable[[dict[int, LayerPlan]], float],
    free: list[int],
    size: str,
    without: Callable[[LayerPlan], LayerPlan],
) -> list[float | None]:
    """Measured loss without each module, times what the cheapest cost more together than one by one."""
    allowed = [i for i in free if getattr(shape.layers[i], size)]
    single = {i: max(loss_of({i: without(whole_layer(shape.layers[i]))}) - base, LEAST_PRICE) for i in allowed}
    cheapest = sorted(single, key=single.__getitem__)[:MODULES_TOGETHER]
    if len(cheapest) < 2:
        return [single.get(i) for i in range(len(shape.layers))]
    together = loss_of({i: without(whole_layer(shape.layers[i])) for i in cheapest}) - base
    factor = max(1.0, together / sum(single[i] for i in cheapest))
    return [single[i] * factor if i in single else None for i in range(len(shape.layers))]


def correct_prices(
    model: PreTrainedModel,
    shape: ModelShape,
    prices: Prices,
    modules: list[Module],
    chosen: list[Option],
    plan: PrunePlan,
    ids: torch.Tensor,
    *,
    progress: Progress | None = None,
) -> tuple[Prices, float]:
    """Scale each module's prices so that they agree with a loss measured where all others are cut as planned.

    A module that the plan cuts is made whole again; one that it leaves whole is cut to three quarters. Either way one
    number per module is measured: what its removal costs on top of all the others.

    Args:
        modules: the options that the plan was chosen from, at these prices; ``chosen``: one of each.
        ids: calibration ids [sequences, tokens] other than what the scores were computed on.

    Returns:
        the corrected prices, and the loss of the plan itself on ``ids``, nats per token.
    """
    factors: dict[tuple[int, str], float] = {}
    cut = {i: keep for i, keep in enumerate(plan.layers) if keep != whole_layer(shape.layers[i])}
    with WorkingPoint(model, shape, cut, ids).entered() as here:
        for done, (module, option) in enumerate(zip(modules, chosen, strict=True)):
            if progress:
                progress("correcting prices", done, len(modules))
            whole = max(module.options, key=_kept)
            other = whole if option is not whole else _probe(module)
            if other is option:
                continue
            loss = here.loss_with(module.layer, _with_option(plan.layers[module.layer], module.kind, other))
            measured = max((here.loss - loss) if other is whole else (loss - here.loss), LEAST_PRICE)
            predicted = max(option.price if other is whole else other.price, LEAST_PRICE)
            factors[module.layer, module.kind] = min(max(measured / predicted, 1 / FACTOR_LIMIT), FACTOR_LIMIT)
        loss = here.loss
    if progress:
        progress("correcting prices", len(modules), len(modules))
    return scaled_prices(prices, factors), loss


def scaled_prices(prices: Prices, factors: dict[tuple[int, str], float]) -> Prices:
    """Prices of each module, (layer, ``attention`` or ``ffn``), times a factor."""

    def scaled(values: list, kind: str) -> list:
        return [None if v is None else v * factors.get((i, kind), 1.0) for i, v in enumerate(values)]

    return Prices(
        scaled(prices.ffn, "ffn"),
        scaled(prices.head, "attention"),
        scaled(prices.group, "attention"),
        scaled(prices.no_attention, "attention"),
        scaled(prices.no_ffn, "ffn"),
        prices.alpha,
        prices.heads,
    )


def _kept(option: Option) -> int:
    return len(option.keep.query_heads) + len(option.keep.ffn)


def _probe(module: Module) -> Option:
    """The option that keeps closest to three quarters of the module; the cheaper of two."""
    most = max(map(_kept, module.options))
    rest = [option for option in module.options if 0 < _kept(option) < most] or list(module.options)
    return min(rest, key=lambda option: (abs(_kept(option) - 0.75 * most), option.price))


def _with_option(layer: LayerPlan, kind: str, option: Option) -> LayerPlan:
    if kind == "ffn":
        return LayerPlan(layer.query_heads, layer.kv_heads, option.keep.ffn)
    return LayerPlan(option.keep.query_heads, option.keep.kv_heads, layer.ffn)
