"""From scores to nats: what removing a structure costs, fitted to the calibration loss.

Fused scores have mean 1 within a type, so they rank structures of one type but do not compare types. Two numbers per
type turn them into a loss,

    price(module option) = kappa * sum of P over what goes * (1 + alpha * share of the module that goes)

fitted to the loss measured with the cheapest structures of *every* layer silenced together, at two levels. Joint
removals matter: prices measured one at a time underestimate them by an order of magnitude, and without alpha the search
empties a few layers that a first-order score calls cheap.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from saap.importance import TYPES, Progress
from saap.masking import masked, mean_nll, without_attention, without_ffn
from saap.search import Prices
from saap.structures import LayerPlan, LayerSizes, ModelShape, whole_layer

# Shares of every layer's structures that are silenced to fit a type's curve; heads and groups go one or two at a time.
FFN_LEVELS = (0.125, 0.25)
MODULES_TOGETHER = 5


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
    modules: bool = False,
    progress: Progress | None = None,
) -> Prices:
    """Price every structure and every whole module in nats per token.

    Args:
        fused: P(G) per type and layer, from :func:`saap.fusion.fuse`.
        ids: [sequences, tokens] of calibration text, other than what the scores were computed on.
        modules: price whole attention and FFN blocks too, each silenced by itself (two forward passes per layer).
    """
    steps = 2 * len(TYPES) + 1 + (2 * len(shape.layers) + 2 if modules else 0)
    done = 0

    def loss_of(plans: dict[int, LayerPlan]) -> float:
        nonlocal done
        if progress:
            progress("pricing", done, steps)
        done += 1
        with masked(model, plans, shape.head_dim):
            return mean_nll(model, ids)

    base = loss_of({})
    curves = {kind: _fit_curve(kind, shape, fused[kind], base, loss_of, keep_layers) for kind in TYPES}
    priced = {kind: [(curves[kind].kappa * p).double().numpy() for p in fused[kind]] for kind in TYPES}
    no_attention: list[float | None] = [None] * len(shape.layers)
    no_ffn = no_attention
    if modules:
        no_attention = _module_prices(shape, base, loss_of, keep_layers, "query_heads", without_attention)
        no_ffn = _module_prices(shape, base, loss_of, keep_layers, "ffn", without_ffn)
    if progress:
        progress("pricing", steps, steps)
    alpha = {kind: curve.alpha for kind, curve in curves.items()}
    return Prices(priced["ffn"], priced["head"], priced["group"], no_attention, no_ffn, alpha)


def _fit_curve(
    kind: str,
    shape: ModelShape,
    scores: list[torch.Tensor],
    base: float,
    loss_of: Callable[[dict[int, LayerPlan]], float],
    keep_layers: frozenset[int],
) -> Curve:
    rows, increases = [], []
    for level in (0, 1):
        plans, scored, weighted = {}, 0.0, 0.0
        for layer, sizes in enumerate(shape.layers):
            lost = [] if layer in keep_layers else _cheapest(kind, sizes, scores[layer], level)
            if lost:
                plans[layer] = _without(kind, sizes, set(lost))
                total, share = float(scores[layer][lost].sum()), len(lost) / len(scores[layer])
                scored, weighted = scored + total, weighted + total * share
        rows.append((scored, weighted))
        increases.append(max(loss_of(plans) - base, 1e-4))
    if not all(total for total, _ in rows):
        return Curve(0.0, 0.0)
    # Two equations: kappa * scored + (kappa * alpha) * weighted = increase; neither term may be negative.
    from scipy.optimize import nnls

    (linear, interaction), _ = nnls(np.array(rows), np.array(increases))
    if not linear:  # all of it is interaction: keep the ratio finite
        linear = 1e-3 * increases[0] / rows[0][0]
    return Curve(float(linear), float(interaction / linear))


def _cheapest(kind: str, sizes: LayerSizes, scores: torch.Tensor, level: int) -> list[int]:
    """The structures that go at a level: FFN channels by share, one or two heads of each group, one or two groups."""
    order = torch.argsort(scores, stable=True).tolist()
    if kind == "ffn":
        return order[: round(FFN_LEVELS[level] * len(order))]
    if kind == "group":
        return order[: min(level + 1, sizes.kv_heads - 1)]
    each = min(level + 1, sizes.heads_per_group - 1)
    groups = range(sizes.kv_heads)
    return [h for g in groups for h in [i for i in order if i // sizes.heads_per_group == g][:each]]


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
    keep_layers: frozenset[int],
    size: str,
    without: Callable[[LayerSizes], LayerPlan],
) -> list[float | None]:
    allowed = [i for i, s in enumerate(shape.layers) if getattr(s, size) and i not in keep_layers]
    single = {i: max(loss_of({i: without(shape.layers[i])}) - base, 1e-4) for i in allowed}
    cheapest = sorted(single, key=single.__getitem__)[:MODULES_TOGETHER]
    if len(cheapest) < 2:
        return [single.get(i) for i in range(len(shape.layers))]
    together = loss_of({i: without(shape.layers[i]) for i in cheapest}) - base
    factor = max(1.0, together / sum(single[i] for i in cheapest))
    return [single[i] * factor if i in single else None for i in range(len(shape.layers))]
