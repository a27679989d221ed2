"""Reasons of a plan: each block's price, its savings, and the price of the next step.

The search (:mod:`saap.prune.search.milp`) looks for the steps that cost the fewest nats per unit saved over the whole
model. Under
a Lagrange multiplier of the budget, its shadow price (Everett, Operations Research 11(3), 1963), every step that costs
less per unit is taken and none that costs more, so the dearest step taken and the cheapest one left enclose it. Options
come in whole pieces, so the two may overlap a little. A person gets a row per layer (:func:`layer_table`) and a few
:func:`sentences`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from saap.models.shape import ATTENTION, KINDS, RARE
from saap.prune.options import TAYLOR
from saap.prune.plan import Move, PrunePlan, Reason, Reasons
from saap.prune.search.budget import Budget
from saap.prune.search.milp import Block, Option

# The unit that prices are told in: how many of the budget's units it is, its name, its name in a heading.
UNITS = {
    "weights": (1e6, "million weights", "M"),
    "parameters": (1e6, "million parameters", "M"),
    "bytes": (1e6, "MB", "MB"),
    "ms": (1.0, "millisecond", "ms"),
}
# docs/baselines.md has more.
DECIDES = {
    "vector": "vector removes the rows and columns whose weights times gradient sum up to least",
    "param_mix": "param_mix removes the structures of which gradients of first and second order predict the least loss",
    "wanda_sp": "wanda_sp removes the structures of least weight times norm of input; every layer loses the same share",
    "flap": "flap removes the structures whose inputs fluctuate least, by one threshold for the whole model",
    "shortgpt": "shortgpt drops whole layers, those first that turn the hidden state least",
}
SAME_SHARE = "; every layer loses the same share, but for the first and last, which are kept"
COLUMNS = {
    "query_heads": "query heads", "kv_heads": "KV groups", "conv": "conv channels", "delta": "delta heads",
    "ffn": "FFN channels",
}  # fmt: skip
PARTS = {"attention": "query heads and KV groups", "ffn": "FFN channels"}  # of blocks that are narrower
MOST_NAMED = 3  # layers that lost most, by name
ALIKE = 0.005  # shares that are told as the same
CHEAPER = 0.95  # times the price elsewhere, and less, is called cheap


def reasons_of(searched: Sequence[Block], chosen: Sequence[Option], unit: str) -> Reasons:
    """Explain the chosen option of each block, at the prices of the search."""
    return Reasons(unit, tuple(_reason(block, option) for block, option in zip(searched, chosen, strict=True)))


def _reason(block: Block, chosen: Option) -> Reason:
    whole = block.whole
    quarter = block.nearest(0.75, (o for o in block.options if 0 < o.kept < whole.kept and o.cost < whole.cost))
    steps = [_move(o, chosen) for o in block.options if o.cost > chosen.cost] if chosen is not whole else []
    left = [_move(chosen, o) for o in block.options if o.cost < chosen.cost]
    return Reason(
        block.layer, block.kind, whole.keep.sizes, chosen.keep.sizes, whole.cost, whole.cost - chosen.cost,
        chosen.price,
        max(steps, key=lambda move: move.per_unit, default=None),
        min(left, key=lambda move: move.per_unit, default=None),
        _move(whole, quarter) if quarter else None,
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
        return self.saved / sum(block.whole for block in self.blocks)

    @property
    def whole(self) -> bool:
        return all(block.had == block.keeps for block in self.blocks)

    @property
    def dropped(self) -> bool:
        """Whether it went whole without a price."""
        return self.price is None and all(not block.keeps.blocks for block in self.blocks)

    @property
    def price(self) -> float | None:
        prices = [block.price for block in self.blocks if block.price is not None]
        return sum(prices) if len(prices) == len(self.blocks) else None

    @property
    def next(self) -> tuple[Reason, Move] | None:
        moves = [(block, block.next) for block in self.blocks if block.next]
        return min(moves, key=lambda pair: pair[1].per_unit, default=None)


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


def sentences(reasons: Reasons, method: str, kept: frozenset[int] = frozenset()) -> list[str]:
    """Say which layers lost most, which stayed whole (``kept``: by an option), what is next; how a baseline decides."""
    layers = _layers(reasons)
    text = []
    if method in DECIDES:
        text.append(f"{DECIDES[method]}{SAME_SHARE if method in TAYLOR else ''}. It has no prices.")
    gone = [layer for layer in layers if layer.dropped]
    if gone and len(gone) < len(layers) and method not in DECIDES:  # those of DECIDES have no prices at all
        went = _named([layer.index for layer in gone]).capitalize()
        change = "they change" if len(gone) > 1 else "it changes"
        text.append(f"{went} went whole, as asked: {change} least what passes through.")
        layers = [layer for layer in layers if layer not in gone]
    text += [_most(layers, reasons.unit), _whole(layers, reasons, kept), _next(reasons)]
    return [sentence for sentence in text if sentence]


def _most(layers: list[_Layer], unit: str) -> str:
    """Say which layers lost the largest share, at what price, and whether an equal cut is cheaper there."""
    scale, name, _ = UNITS[unit]
    order = sorted((layer for layer in layers if not layer.whole), key=lambda layer: -layer.share)
    if not order:
        return ""
    least = order[min(MOST_NAMED, len(order)) - 1].share - ALIKE
    most = [layer for layer in order if layer.share >= least]
    others = [layer for layer in layers if layer not in most]
    shares = list(dict.fromkeys(f"{share(layer.share for layer in most):.0%}" for share in (min, max)))
    what = {"ms": "time", "bytes": "bytes"}.get(unit, "weights")
    whose = "its" if len(most) == 1 else "their"
    text = f"Most went from {_named([layer.index for layer in most])}, {' to '.join(shares)} of {whose} {what}"
    price, saved = sum(layer.price or 0.0 for layer in most), sum(layer.saved for layer in most)
    if any(layer.price is None for layer in most) or saved <= 0:
        return f"{text}."
    text += f", at {short(price / saved * scale)} nats per {name}."
    here, there = _quarter(most), _quarter(others)
    if here is None or there is None or here > CHEAPER * there:
        return text
    return (
        f"{text} It is cheap there: losing a quarter costs {short(here * scale)}, in the others {short(there * scale)}."
    )


def _quarter(layers: list[_Layer]) -> float | None:
    """Nats per unit of losing a quarter of each block of these layers; None where there are no prices."""
    moves = [block.quarter for layer in layers for block in layer.blocks if block.quarter]
    return sum(move.price for move in moves) / sum(move.saved for move in moves) if moves else None


def _whole(layers: list[_Layer], reasons: Reasons, kept: frozenset[int]) -> str:
    whole = [layer for layer in layers if layer.whole]
    asked = [layer.index for layer in whole if layer.index in kept]
    rest = [layer for layer in whole if layer.index not in kept]
    parts = [f"{_named(asked).capitalize()} stayed whole as asked."] if asked else []
    if rest:
        text = f"{_named([layer.index for layer in rest]).capitalize()} stayed whole"
        steps = [layer.next[1].per_unit for layer in rest if layer.next]
        dearest = reasons.dearest_step
        if steps and dearest and dearest.last:
            scale, name, _ = UNITS[reasons.unit]
            text += (
                f": the first step there costs {short(min(steps) * scale)} nats per {name} or more, "
                f"the dearest step taken anywhere {short(dearest.last.per_unit * scale)}"
            )
        parts.append(f"{text}.")
    return " ".join(parts)


def _next(reasons: Reasons) -> str:
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


def _named(layers: Sequence[int]) -> str:
    """Layers in words; three or more in a row as a range: ``layers 0-2 and 29``."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    parts = [text for run in runs for text in ([f"{run[0]}-{run[-1]}"] if len(run) > 2 else map(str, run))]
    *others, last = parts
    return f"layer{'s' * (len(layers) > 1)} {', '.join(others)}{' and ' if others else ''}{last}"


def short(value: float | None) -> str:
    """Three digits, without an exponent where that is readable."""
    if value is None:
        return "-"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value == 0 or abs(value) >= 1e-4 else f"{value:.0e}"
