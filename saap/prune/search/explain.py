"""Reasons of a plan: each block's price, its savings, and the price of the next step.

The search (:mod:`saap.prune.search.milp`) looks for the steps that cost the fewest nats per unit saved over the whole
model. Under a Lagrange multiplier of the budget, its shadow price (Everett, Operations Research 11(3), 1963), every
step that costs less per unit is taken and none that costs more, so the dearest step taken and the cheapest one left
enclose it. Options come in whole pieces, so the two may overlap a little. A person gets three sentences
(:func:`summary`) and, if asked for, a row per layer (:func:`layer_table`) and per kind (:func:`kinds_table`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from saap.models.shape import ATTENTION, KINDS, RARE
from saap.prune.plan import Gained, Move, PrunePlan, Reason, Reasons
from saap.prune.search.budget import Budget
from saap.prune.search.milp import Block, Option

# The unit that prices are told in: how many of the budget's units it is, its name, its name in a heading.
UNITS = {
    "weights": (1e6, "million weights", "M"),
    "parameters": (1e6, "million parameters", "M"),
    "bytes": (1e6, "MB", "MB"),
    "ms": (1.0, "millisecond", "ms"),
}
COLUMNS = {
    "query_heads": "query heads", "kv_heads": "KV groups", "conv": "conv channels", "delta": "delta heads",
    "ffn": "FFN channels",
}  # fmt: skip
PARTS = {"attention": "query heads and KV groups", "ffn": "FFN channels"}  # of blocks that are narrower


def reasons_of(searched: Sequence[Block], chosen: Sequence[Option], unit: str) -> Reasons:
    """Explain the chosen option of each block, at the prices of the search."""
    return Reasons(unit, tuple(_reason(block, option) for block, option in zip(searched, chosen, strict=True)))


def _reason(block: Block, chosen: Option) -> Reason:
    whole = block.whole
    steps = [_move(o, chosen) for o in block.options if o.cost > chosen.cost] if chosen is not whole else []
    left = [_move(chosen, o) for o in block.options if o.cost < chosen.cost]
    return Reason(
        block.layer, block.kind, whole.keep.sizes, chosen.keep.sizes, whole.cost, whole.cost - chosen.cost,
        chosen.price,
        max(steps, key=lambda move: move.per_unit, default=None),
        min(left, key=lambda move: move.per_unit, default=None),
    )  # fmt: skip


def _move(start: Option, end: Option) -> Move:
    return Move(end.keep.sizes, end.price - start.price, start.cost - end.cost)


def sizes_lost(plan: PrunePlan, budget: Budget) -> Reasons:
    """Count what each block lost and saved, for a method without prices."""
    blocks = []
    for index, (sizes, keep) in enumerate(zip(budget.dense.layers, plan.layers, strict=True)):
        for kind in sizes.blocks:
            whole, left = budget.cost(kind, sizes), budget.cost(kind, keep.sizes) if keep.has(kind) else 0.0
            blocks.append(Reason(index, kind.name, sizes.only(kind), keep.sizes.only(kind), whole, whole - left))
    return Reasons(budget.unit, tuple(blocks))


@dataclass(frozen=True)
class _Layer:
    """Both blocks of a layer as one."""

    index: int
    blocks: list[Reason]

    @property
    def saved(self) -> float:
        return sum(block.saved for block in self.blocks)

    @property
    def share(self) -> float:
        return self.saved / (sum(block.whole for block in self.blocks) or 1.0)

    @property
    def price(self) -> float | None:
        prices = [block.price for block in self.blocks if block.price is not None]
        return sum(prices) if len(prices) == len(self.blocks) else None

    @property
    def next(self) -> tuple[Reason, Move] | None:
        moves = [(block, block.next) for block in self.blocks if block.next]
        return min(moves, key=lambda pair: pair[1].per_unit, default=None)


def summary(reasons: Reasons) -> list[str]:
    """Return three sentences: the savings by kind, the layer that lost most, and the :func:`next_step`."""
    scale, name, _ = UNITS[reasons.unit]
    parts: list[Reason | Gained] = [*reasons.blocks, *filter(None, (reasons.integers, reasons.words))]
    kinds = ", ".join(f"{kind} {saved}" for kind, _, saved, *_ in kinds_table(reasons)[2])
    saved = f"{short(sum(part.saved for part in parts) / scale)} {name}{'s' * (reasons.unit == 'ms')}"
    prices = [part.price for part in parts if part.price is not None]
    loss = f" for a predicted loss of {short(sum(prices))} nats per token" if len(prices) == len(parts) else ""
    layers = sorted(_layers(reasons), key=lambda layer: -layer.share)
    most, whole = layers[0], sum(layer.saved <= 0 for layer in layers)
    return [
        f"The plan saves {saved} ({kinds}){loss}.",
        f"Layer {most.index} lost the largest share, {most.share:.0%}; {whole} of {len(layers)} layers lost nothing.",
        next_step(reasons) or "The method predicts no losses, so there is no next step.",
    ]


def kinds_table(reasons: Reasons) -> tuple[str, list[str], list[list[str]]]:
    """Title, headings, and a row of cells for each kind of structure that went: what it saved and what it costs."""
    scale, _, unit = UNITS[reasons.unit]
    totals: dict[str, list[float]] = {}
    for block in reasons.blocks:
        gone = not block.keeps.blocks
        name = "whole blocks" if gone else PARTS.get(block.kind, KINDS[block.kind].label)
        if block.saved:
            totals.setdefault(name, [0, 0.0, 0.0])
            for place, number in enumerate((1, block.saved, block.price or 0.0)):
                totals[name][place] += number
    for name, gained in (("bits and groups of weights", reasons.integers), ("words of the head", reasons.words)):
        if gained is not None:
            totals[name] = [gained.count, gained.saved, gained.price]
    rows = [
        [name, f"{count:,.0f}", short(saved / scale), short(price), short(price / saved * scale if saved > 0 else None)]
        for name, (count, saved, price) in sorted(totals.items(), key=lambda item: -item[1][1])
    ]
    return "What each kind gave and cost", ["kind", "count", f"{unit} saved", "nats", f"per {unit}"], rows


def layer_table(reasons: Reasons) -> tuple[str, list[str], list[list[str]]]:
    """Title, headings, and a row of cells per layer; what has no price has a dash."""
    scale, name, unit = UNITS[reasons.unit]
    columns = [COLUMNS[field] for field in _fields(reasons)]
    headings = ["layer", *columns, f"{unit} saved"]
    title = "What each layer lost"
    priced = any(block.price is not None for block in reasons.blocks)
    if priced:
        title = f"Why each layer lost what it lost: prices in nats and in nats per {name}"
        headings += ["nats", f"per {unit}", "next step", f"per {unit} then"]
    return title, headings, [_row(layer, _fields(reasons), scale, priced) for layer in _layers(reasons)]


def _fields(reasons: Reasons) -> list[str]:
    """Return the sizes to show: those of attention and FFN always, those of rare blocks if some layer had one."""
    had = {block.kind for block in reasons.blocks}
    absent = [field for kind in RARE if kind.name not in had for field in kind.sizes]
    return [field for field in COLUMNS if field not in absent]


def _row(layer: _Layer, fields: list[str], scale: float, priced: bool) -> list[str]:
    sizes = {field: block for block in layer.blocks for field in KINDS[block.kind].sizes}

    def kept(field: str) -> str:
        return f"{getattr(sizes[field].keeps, field)}/{getattr(sizes[field].had, field)}" if field in sizes else "-"

    row = [str(layer.index), *map(kept, fields), short(layer.saved / scale)]
    if priced:
        step = layer.next
        paid = layer.price if layer.saved > 0 else None
        row += [
            short(layer.price),
            short(None if paid is None else paid / layer.saved * scale),
            to_words(*step) if step else "none on offer",
            short(step[1].per_unit * scale if step else None),
        ]
    return row


def to_words(block: Reason, move: Move) -> str:
    if block.kind != ATTENTION.name:
        kind = KINDS[block.kind]
        name, (field,) = kind.label.removeprefix("the "), kind.sizes
        left = getattr(move.to, field)
        return f"{name} to {left}" if left else f"no {name}"
    if not move.to.query_heads:
        return "no attention"
    groups = f", {move.to.kv_heads} KV" if move.to.kv_heads != block.keeps.kv_heads else ""
    return f"{move.to.query_heads} heads{groups}"


def next_step(reasons: Reasons) -> str:
    """Say which step would be taken next and which taken one was the dearest; empty without prices."""
    left, dearest = reasons.cheapest_left, reasons.dearest_step
    if left is None or left.next is None:
        priced = any(block.price is not None for block in reasons.blocks)
        return "Nothing smaller is on offer." if priced else ""
    scale, name, _ = UNITS[reasons.unit]
    text = (
        f"Next would go {_block(left)}, to {to_words(left, left.next).removeprefix('FFN to ')}, "
        f"at {short(left.next.per_unit * scale)} nats per {name}"
    )
    if dearest is None or dearest.last is None:
        return f"{text}."
    return f"{text}; the dearest step taken, {_block(dearest)}, cost {short(dearest.last.per_unit * scale)}."


def _block(block: Reason) -> str:
    return f"{KINDS[block.kind].label} of layer {block.layer}"


def _layers(reasons: Reasons) -> list[_Layer]:
    blocks: dict[int, list[Reason]] = {}
    for block in reasons.blocks:
        blocks.setdefault(block.layer, []).append(block)
    return [_Layer(index, blocks[index]) for index in sorted(blocks)]


def short(value: float | None) -> str:
    """Three digits, without an exponent where that is readable."""
    if value is None:
        return "-"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value == 0 or abs(value) >= 1e-4 else f"{value:.0e}"
