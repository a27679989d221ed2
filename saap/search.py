"""Adaptive structure search: one option per module, least summed price, whole model within a budget.

Every attention block and every FFN offers a few options (widths on the quantisation grid, query heads per KV group, KV
groups, nothing). An option has a price in nats (predicted loss) and a cost in the budget's unit. Choosing one option
per module is a multiple-choice knapsack, solved exactly as a mixed-integer program by HiGHS (scipy.optimize.milp).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from saap.errors import SaapError
from saap.structures import LayerPlan, LayerSizes, ModelShape, PrunePlan


@dataclass(frozen=True)
class Option:
    """One way to cut one module: what is kept, its price in nats and its cost in the budget's unit."""

    keep: LayerPlan  # attention options leave ffn empty, FFN options leave the heads empty
    price: float
    cost: float


@dataclass(frozen=True)
class Module:
    """One attention block or FFN of the dense model with its options."""

    layer: int
    kind: str  # attention | ffn
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Prices:
    """Prices in nats: per structure, and per whole module (None where it may not go)."""

    ffn: list[np.ndarray]  # per layer [channels]
    head: list[np.ndarray]  # per layer [query_heads]
    group: list[np.ndarray]  # per layer [kv_heads]
    no_attention: list[float | None]
    no_ffn: list[float | None]
    alpha: dict[str, float]  # interaction per type: price * (1 + alpha * share of the module's structures that goes)


def modules_of(
    shape: ModelShape, prices: Prices, block: int, keep_layers: frozenset[int] = frozenset()
) -> list[Module]:
    """All modules with their options; layers of ``keep_layers`` offer only to stay whole. Costs are weights."""
    found = []
    for index, sizes in enumerate(shape.layers):
        whole = index in keep_layers
        if sizes.query_heads:
            found.append(
                Module(index, "attention", tuple(_attention_options(shape, sizes, prices, index, block, whole)))
            )
        if sizes.ffn:
            found.append(Module(index, "ffn", tuple(_ffn_options(shape, sizes, prices, index, block, whole))))
    return found


def _ffn_options(
    shape: ModelShape, sizes: LayerSizes, prices: Prices, index: int, block: int, whole: bool
) -> list[Option]:
    order = np.argsort(prices.ffn[index], kind="stable")
    lost = np.concatenate([[0.0], np.cumsum(prices.ffn[index][order], dtype=np.float64)])
    # Rows in multiples of 64 suit the fast kernels, and a quantised down_proj needs whole groups.
    step = max(block, 64) if sizes.ffn >= 512 else block
    widths = [sizes.ffn] if whole else [*range(step, sizes.ffn, step), sizes.ffn]
    options = []
    for width in widths:
        kept = tuple(sorted(int(i) for i in order[sizes.ffn - width :]))
        cost = shape.ffn_weights(LayerSizes(0, 0, width))
        gone = sizes.ffn - width
        price = float(lost[gone]) * (1 + prices.alpha["ffn"] * gone / sizes.ffn)
        options.append(Option(LayerPlan((), (), kept), price, cost))
    if not whole and (emptied := prices.no_ffn[index]) is not None:
        options.append(Option(LayerPlan((), (), ()), emptied, 0.0))
    return options


def _attention_options(
    shape: ModelShape, sizes: LayerSizes, prices: Prices, index: int, block: int, whole: bool
) -> list[Option]:
    options = []
    for groups in [sizes.kv_heads] if whole else range(1, sizes.kv_heads + 1):
        for per_group in [sizes.heads_per_group] if whole else range(1, sizes.heads_per_group + 1):
            kept = LayerSizes(groups * per_group, groups, 0)
            if kept != LayerSizes(sizes.query_heads, sizes.kv_heads, 0) and kept.query_heads * shape.head_dim % block:
                continue
            plan, price = _cheapest_heads(sizes, prices, index, groups, per_group)
            options.append(Option(plan, price, shape.attention_weights(kept)))
    if not whole and (gone := prices.no_attention[index]) is not None:
        options.append(Option(LayerPlan((), (), ()), gone, 0.0))
    return options


def _cheapest_heads(
    sizes: LayerSizes, prices: Prices, index: int, groups: int, per_group: int
) -> tuple[LayerPlan, float]:
    order = np.argsort(prices.group[index], kind="stable")
    kept_groups = sorted(int(g) for g in order[sizes.kv_heads - groups :])
    gone = sizes.kv_heads - groups
    price = float(prices.group[index][order[:gone]].sum()) * (1 + prices.alpha["group"] * gone / sizes.kv_heads)
    heads: list[int] = []
    per_head = 1 + prices.alpha["head"] * (1 - per_group / sizes.heads_per_group)
    for group in kept_groups:
        members = np.arange(sizes.heads_per_group) + group * sizes.heads_per_group
        ranked = members[np.argsort(prices.head[index][members], kind="stable")]
        heads += [int(h) for h in ranked[sizes.heads_per_group - per_group :]]
        price += float(prices.head[index][ranked[: sizes.heads_per_group - per_group]].sum()) * per_head
    return LayerPlan(tuple(sorted(heads)), tuple(kept_groups), ()), price


def solve(modules: list[Module], budget: float, unit: str) -> list[Option]:
    """The option of each module with the least summed price whose costs add up to at most ``budget``.

    Raises:
        SaapError: even the smallest options exceed the budget; the floor is named.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    floor = sum(min(o.cost for o in module.options) for module in modules)
    if floor > budget:
        raise SaapError(f"the budget of {budget:,.0f} {unit} is below the floor of {floor:,.0f} {unit}: ask for more")
    owner = np.repeat(np.arange(len(modules)), [len(m.options) for m in modules])
    price = np.array([o.price for m in modules for o in m.options])
    cost = np.array([o.cost for m in modules for o in m.options])
    columns = np.arange(len(owner))
    attends = [i for i, o in enumerate(o for m in modules for o in m.options) if o.keep.query_heads]
    some_attention = coo_array((np.ones(len(attends)), (np.zeros(len(attends), int), attends)), (1, len(owner)))
    constraints = [
        LinearConstraint(coo_array((np.ones(len(owner)), (owner, columns)), (len(modules), len(owner))), 1, 1),
        LinearConstraint(cost[None] / max(cost.max(), 1), -np.inf, budget / max(cost.max(), 1)),
        LinearConstraint(some_attention, 1, np.inf),
    ]
    scale = max(price.max(), 1e-12)
    answer = milp(
        price / scale,
        integrality=np.ones(len(owner)),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": 1e-4, "time_limit": 60},
    )
    if answer.x is None:
        raise SaapError(f"no choice of options meets {budget:,.0f} {unit} ({answer.message}): ask for more")
    chosen = np.flatnonzero(answer.x > 0.5)
    flat = [o for m in modules for o in m.options]
    return [flat[i] for i in chosen]


def plan_from(modules: list[Module], chosen: list[Option], shape: ModelShape) -> PrunePlan:
    """Put the chosen options of attention and FFN together, layer by layer."""
    parts: dict[tuple[int, str], LayerPlan] = {
        (module.layer, module.kind): option.keep for module, option in zip(modules, chosen, strict=True)
    }
    nothing = LayerPlan((), (), ())
    layers = []
    for index in range(len(shape.layers)):
        attention, ffn = parts.get((index, "attention"), nothing), parts.get((index, "ffn"), nothing)
        layers.append(LayerPlan(attention.query_heads, attention.kv_heads, ffn.ffn))
    return PrunePlan(tuple(layers), price=sum(option.price for option in chosen))
