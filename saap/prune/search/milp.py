"""Adaptive structure search: one option per module, least summed price, whole model within a budget.

Every attention block and every FFN offers a few options (widths on the quantisation grid, query heads per KV group, KV
groups, nothing). An option has a price in nats (predicted loss) and a cost in the budget's unit. Choosing one option
per module is a multiple-choice knapsack, solved exactly as a mixed-integer program by HiGHS (scipy.optimize.milp).

A method that knows nothing of options, only of a share of weights to remove, meets the same budget by :func:`meet`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from saap.models.shape import LayerSizes, ModelShape
from saap.prune.plan import LayerPlan, PrunePlan
from saap.prune.search.budget import Budget
from saap.system.errors import UserError

GAP = 0.0  # between the answer and the bound: none, the answer is the best
NODES = 50_000  # of branch and bound; a limit in seconds would make the answer depend on the machine
RETRIES = 8
SHARES = 20  # of weights, tried one after another by meet()
SHARE_STEP = 1 / 4096  # how closely meet() finds the smallest of them


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
    heads: bool = True  # whether query heads and KV groups may go one by one


def modules_of(
    shape: ModelShape, prices: Prices, block: int, keep_layers: frozenset[int], budget: Budget
) -> list[Module]:
    """All modules with their options; layers of ``keep_layers`` offer only to stay whole. The budget prices costs."""
    found = []
    for index, sizes in enumerate(shape.layers):
        whole = index in keep_layers
        if sizes.query_heads:
            options = _attention_options(shape, sizes, prices, index, block, whole, budget)
            found.append(Module(index, "attention", tuple(options)))
        if sizes.ffn:
            found.append(Module(index, "ffn", tuple(_ffn_options(sizes, prices, index, block, whole, budget))))
    return found


def _ffn_options(
    sizes: LayerSizes, prices: Prices, index: int, block: int, whole: bool, budget: Budget
) -> list[Option]:
    order = np.argsort(prices.ffn[index], kind="stable")
    lost = np.concatenate([[0.0], np.cumsum(prices.ffn[index][order], dtype=np.float64)])
    # Rows in multiples of 64 suit the fast kernels, and a quantised down_proj needs whole groups.
    step = max(block, 64) if sizes.ffn >= 512 else block
    widths = [sizes.ffn] if whole else [*range(step, sizes.ffn, step), sizes.ffn]
    options = []
    for width in widths:
        kept = tuple(sorted(int(i) for i in order[sizes.ffn - width :]))
        cost = budget.ffn_cost(LayerSizes(0, 0, width))
        gone = sizes.ffn - width
        price = float(lost[gone]) * (1 + prices.alpha["ffn"] * gone / sizes.ffn)
        options.append(Option(LayerPlan((), (), kept), price, cost))
    if not whole and (emptied := prices.no_ffn[index]) is not None:
        options.append(Option(LayerPlan((), (), ()), emptied, 0.0))
    return options


def _attention_options(
    shape: ModelShape, sizes: LayerSizes, prices: Prices, index: int, block: int, whole: bool, budget: Budget
) -> list[Option]:
    options = []
    fixed = whole or not prices.heads
    for groups in [sizes.kv_heads] if fixed else range(1, sizes.kv_heads + 1):
        for per_group in [sizes.heads_per_group] if fixed else range(1, sizes.heads_per_group + 1):
            kept = LayerSizes(groups * per_group, groups, 0)
            if kept != LayerSizes(sizes.query_heads, sizes.kv_heads, 0) and kept.query_heads * shape.head_dim % block:
                continue
            plan, price = _cheapest_heads(sizes, prices, index, groups, per_group)
            options.append(Option(plan, price, budget.attention_cost(kept)))
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


def check_floor(
    shape: ModelShape,
    block: int,
    keep_layers: frozenset[int],
    remove_modules: bool,
    budget: Budget,
    heads: bool = True,
) -> None:
    """Refuse, before minutes of scoring, what no choice of options can meet.

    Args:
        remove_modules: whether whole attention and feed-forward blocks may go.
        heads: whether query heads and KV groups may.

    Raises:
        UserError: names the floor in the unit that was asked in.
    """
    gone = [0.0 if remove_modules and i not in keep_layers else None for i in range(len(shape.layers))]
    free = Prices(
        ffn=[np.zeros(s.ffn) for s in shape.layers],
        head=[np.zeros(s.query_heads) for s in shape.layers],
        group=[np.zeros(s.kv_heads) for s in shape.layers],
        no_attention=gone,
        no_ffn=gone,
        alpha={"ffn": 0.0, "head": 0.0, "group": 0.0},
        heads=heads,
    )
    _check_floor(modules_of(shape, free, block, keep_layers, budget), budget)


def _check_floor(modules: list[Module], budget: Budget) -> None:
    """The least summed cost of any choice that leaves attention somewhere must fit."""
    least = [min(o.cost for o in module.options) for module in modules]
    to_attend = [
        min(o.cost for o in module.options if o.keep.query_heads) - cost
        for module, cost in zip(modules, least, strict=True)
        if module.kind == "attention"
    ]
    floor = budget.fixed + sum(least) + min(to_attend, default=0.0)
    if not budget.fits(floor):
        raise budget.below_floor(floor)


def solve(modules: list[Module], budget: Budget) -> list[Option]:
    """The option of each module with the least summed price, all costs together within the budget.

    At least one module keeps attention.

    Raises:
        UserError: even the smallest options exceed the budget; the floor is named.
    """
    _check_floor(modules, budget)
    limit = budget.limit
    for _ in range(RETRIES):
        chosen = _least_price(modules, limit, budget)
        excess = budget.fixed + sum(option.cost for option in chosen) - budget.most
        if budget.fits(budget.most + excess):
            return _use_up(modules, chosen, -excess)
        limit -= 2 * excess  # HiGHS holds a constraint to a tolerance only
    raise UserError(f"no choice of options was found within {budget.in_words(budget.most)}: ask for a little less")


def _least_price(modules: list[Module], limit: float, budget: Budget) -> list[Option]:
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    flat = [option for module in modules for option in module.options]
    owner = np.repeat(np.arange(len(modules)), [len(m.options) for m in modules])
    price, cost = np.array([o.price for o in flat]), np.array([o.cost for o in flat])
    columns = np.arange(len(flat))
    attends = [i for i, option in enumerate(flat) if option.keep.query_heads]
    some_attention = coo_array((np.ones(len(attends)), (np.zeros(len(attends), int), attends)), (1, len(flat)))
    largest = max(float(cost.max()), 1e-12)
    constraints = [
        LinearConstraint(coo_array((np.ones(len(flat)), (owner, columns)), (len(modules), len(flat))), 1, 1),
        LinearConstraint(cost[None] / largest, -np.inf, limit / largest),
        LinearConstraint(some_attention, 1, np.inf),
    ]
    answer = milp(
        price / max(float(price.max()), 1e-12),
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": GAP, "node_limit": NODES},
    )
    if answer.x is None:
        raise UserError(f"no choice of options meets {budget.in_words(budget.most)} ({answer.message}): ask for less")
    return [flat[i] for i in np.flatnonzero(answer.x > 0.5)]


def _use_up(modules: list[Module], chosen: list[Option], left: float) -> list[Option]:
    """Give what is left of the budget back, to what gains most by it.

    HiGHS takes objectives as equal that differ by a millionth of the largest price. Where most prices are smaller than
    that, as those of random weights are, it would remove twice what was asked for.
    """
    chosen = list(chosen)
    while True:
        larger = [
            (option.price - other.price, other.cost - option.cost, -place, other)
            for place, (module, option) in enumerate(zip(modules, chosen, strict=True))
            for other in module.options
            if 0 < other.cost - option.cost <= left and other.price <= option.price
        ]
        if not larger:
            return chosen
        _, cost, place, option = max(larger, key=lambda found: found[:3])
        chosen[-place] = option
        left -= cost


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


def meet(plan_at: Callable[[float], PrunePlan], budget: Budget, dense: ModelShape) -> PrunePlan:
    """The plan that removes the smallest share of weights and meets the budget in its own unit.

    Plans cost less with the share only roughly (milliseconds do not follow weights), so shares are tried from the least
    upwards until one meets the budget, and the step in which that happened is halved; what is returned meets it.

    Args:
        plan_at: the plan that removes a share of the decoder layers' weights; raises UserError where it cannot.
        dense: the shape that the plans index into.

    Raises:
        UserError: not even the largest share meets the budget; names the least that a plan costs.
    """

    below, above, least = 0.0, 1.0, np.inf
    best: PrunePlan | None = None
    refusal: UserError | None = None
    while above - below > SHARE_STEP:
        share = min(below + 1 / SHARES, (below + above) / 2)
        try:
            plan = plan_at(share)
        except UserError as error:
            refusal, above = error, share
            continue
        total = budget.total(plan.kept_shape(dense))
        least = min(least, total)
        if budget.fits(total):
            best, above = plan, share
        else:
            below = share
    if best is not None:
        return best
    if refusal is not None and not np.isfinite(least):
        raise refusal
    raise budget.below_floor(float(least))
