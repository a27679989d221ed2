from dataclasses import replace

import numpy as np
import pytest
import torch
from support.search_cases import SHAPE, library, milliseconds, weights

from saap.base.costs import FormCost
from saap.models.record import read_record
from saap.models.shape import LayerSizes
from saap.models.slim_quant import MatrixForm
from saap.prune.options import PruneOptions
from saap.prune.plan import LayerPlan, Move, PrunePlan, Reason, Reasons, whole_layer
from saap.prune.pruning import prune
from saap.prune.search.explain import kinds_table, layer_table, next_step, reasons_of, short, sizes_lost, summary
from saap.prune.search.milp import Block, Option, search, solve
from saap.prune.search.model_cost import StepTime

IDS = torch.randint(320, (8, 16), generator=torch.Generator().manual_seed(3))
FFN = Block(
    1,
    "ffn",
    tuple(
        Option(LayerPlan((), (), tuple(range(width))), price, cost)
        for width, price, cost in ((32, 9.0, 10.0), (64, 2.5, 20.0), (96, 1.0, 30.0), (128, 0.0, 40.0), (0, 10.0, 0.0))
    ),
)


def test_what_a_block_lost_and_what_would_go_next():
    (reason,) = reasons_of([FFN], [FFN.options[1]], "weights").blocks
    assert (reason.layer, reason.kind) == (1, "ffn")
    assert (reason.had, reason.keeps) == (LayerSizes(0, 0, 128), LayerSizes(0, 0, 64))
    assert (reason.whole, reason.saved, reason.price) == (40, 20, 2.5)
    # From 96 to 64 was dearer than from 128: 1.5 nats for 10, not 2.5 for 20.
    assert reason.last == Move(LayerSizes(0, 0, 64), 1.5, 10) and reason.last.per_unit == 0.15
    # All of it is cheaper per unit than the next width: 7.5 for 20, not 6.5 for 10.
    assert reason.next == Move(LayerSizes(0, 0, 0), 7.5, 20) and reason.next.per_unit == 0.375


def test_the_ends_have_no_further_step():
    whole, gone = (reasons_of([FFN], [FFN.options[i]], "weights").blocks[0] for i in (3, 4))
    assert whole.last is None and whole.saved == whole.price == 0 and whole.next.per_unit == 0.1
    assert gone.next is None and gone.saved == 40 and gone.last == Move(LayerSizes(0, 0, 0), 7.5, 20)
    only = Block(0, "ffn", (FFN.options[3],))
    (kept,) = reasons_of([only], [only.options[0]], "weights").blocks
    assert kept.last is kept.next is None


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("steps", [2, 3])
def test_the_dearest_step_taken_is_below_the_cheapest_left(seed, steps):
    """Equal steps of rising price: the search takes the cheapest ones, so the two enclose the shadow price."""
    random = np.random.default_rng(seed)
    rises = np.sort(random.random((4, 3)), axis=1)
    modules = [
        Block(i, "ffn", tuple(
            Option(LayerPlan((), (), tuple(range(4 - n))), float(rise[:n].sum()), float(4 - n)) for n in range(4)
        ))
        for i, rise in enumerate(rises)
    ]  # fmt: skip
    modules.append(Block(0, "attention", (Option(LayerPlan((0,), (0,), ()), 0.0, 0.0),)))
    found = reasons_of(modules, solve(modules, weights(16.0 - steps)).options, "weights")
    order = np.sort(rises.ravel())
    assert found.dearest_step.last.per_unit == pytest.approx(order[steps - 1])
    assert found.cheapest_left.next.per_unit == pytest.approx(order[steps])


@pytest.mark.parametrize("budget", [weights(0.6 * SHAPE.layer_weights), milliseconds(3.2)], ids=["weights", "ms"])
def test_savings_and_prices_add_up_to_the_plan_s(budget):
    searched = search(library(1), budget)
    chosen = searched.chosen
    found = reasons_of(searched.blocks, chosen, budget.unit)
    slim = budget.fixed + sum(option.cost for option in chosen)
    assert sum(block.saved for block in found.blocks) == pytest.approx(budget.total(SHAPE) - slim)
    assert sum(block.price for block in found.blocks) == pytest.approx(sum(option.price for option in chosen))
    assert all(block.next is None or block.next.saved > 0 for block in found.blocks)


def test_a_baseline_has_sizes_and_no_prices():
    budget = weights(0.6 * SHAPE.layer_weights)
    plan = PrunePlan((LayerPlan((), (), ()), replace(whole_layer(SHAPE.layers[1]), ffn=tuple(range(64)))))
    found = sizes_lost(plan, budget)
    assert [(b.layer, b.kind, b.price, b.next) for b in found.blocks] == [
        (0, "attention", None, None), (0, "ffn", None, None), (1, "attention", None, None), (1, "ffn", None, None)
    ]  # fmt: skip
    assert [block.keeps for block in found.blocks] == [
        LayerSizes(0, 0, 0), LayerSizes(0, 0, 0), LayerSizes(6, 3, 0), LayerSizes(0, 0, 64)
    ]  # fmt: skip
    assert sum(b.saved for b in found.blocks) == budget.total(SHAPE) - budget.total(plan.kept_shape(SHAPE))
    assert found.record()["dearest_taken"] is found.record()["cheapest_left"] is None
    assert len(layer_table(found)[1]) == 5 and not next_step(found)


def block(layer, kind, had, keeps, whole, saved, price=None, **steps):
    sizes = [LayerSizes(0, 0, n) if kind == "ffn" else LayerSizes(n, n // 2, 0) for n in (had, keeps)]
    return Reason(layer, kind, *sizes, whole, saved, price, **steps)


def test_the_record_of_a_slim_model_has_the_reasons(tiny_model, tmp_path):
    options = PruneOptions(ratio=0.4, compensate="none")
    plan = prune(tiny_model(), options, output=tmp_path / "slim", calibration=IDS).plan
    record = read_record(tmp_path / "slim")["plan"]
    blocks = record["reasons"]["blocks"]
    assert sum(b["price"] for b in blocks) == pytest.approx(record["price_nats"]) and record["price_nats"] > 0
    gone = sum(b["saved"] for b in blocks)
    assert gone / sum(b["whole"] for b in blocks) == pytest.approx(record["achieved"]["ratio"])
    for reason in plan.reasons.blocks:
        keep = plan.layers[reason.layer].sizes
        kept = LayerSizes(0, 0, keep.ffn) if reason.kind == "ffn" else replace(keep, ffn=0)
        assert reason.keeps == kept
        assert reason.had == (LayerSizes(0, 0, 128) if reason.kind == "ffn" else LayerSizes(6, 3, 0))
    assert record["reasons"]["dearest_taken"] == plan.reasons.dearest_step.last.per_unit


def reasons():
    """Three layers: cut where it is cheap, whole where it is dear, whole as asked."""
    dear = Move(LayerSizes(0, 0, 96), 0.5, 1e6)
    taken, left = Move(LayerSizes(0, 0, 64), 0.03, 1e6), Move(LayerSizes(0, 0, 32), 0.07, 1e6)
    heads = Move(LayerSizes(4, 2, 0), 0.4, 1e6)
    return Reasons("weights", (
        block(0, "attention", 4, 4, 2e6, 0.0, 0.0),
        block(0, "ffn", 128, 128, 4e6, 0.0, 0.0),
        block(1, "attention", 8, 8, 2e6, 0.0, 0.0, next=heads),
        block(1, "ffn", 128, 64, 4e6, 2e6, 0.04, last=taken, next=left),
        block(2, "attention", 8, 8, 2e6, 0.0, 0.0, next=heads),
        block(2, "ffn", 128, 128, 4e6, 0.0, 0.0, next=dear),
    ))  # fmt: skip


def test_a_row_per_layer():
    title, headings, rows = layer_table(reasons())
    assert title.endswith("nats per million weights")
    assert headings[4:] == ["M saved", "nats", "per M", "next step", "per M then"]
    assert rows == [
        ["0", "4/4", "2/2", "128/128", "0", "0", "-", "none on offer", "-"],
        ["1", "8/8", "4/4", "64/128", "2", "0.04", "0.02", "FFN to 32", "0.07"],
        ["2", "8/8", "4/4", "128/128", "0", "0", "-", "4 heads, 2 KV", "0.4"],
    ]


def test_three_sentences_sum_it_up():
    saved, layers, step = summary(reasons())
    assert saved == "The plan saves 2 million weights (FFN channels 2) for a predicted loss of 0.04 nats per token."
    assert layers == "Layer 1 lost the largest share, 33%; 2 of 3 layers lost nothing."
    assert step == next_step(reasons())
    assert " 2,000,000 milliseconds (" in summary(replace(reasons(), unit="ms"))[0]


def test_the_next_step_and_the_dearest_one_taken():
    assert next_step(reasons()) == (
        "Next would go the FFN of layer 1, to 32, at 0.07 nats per million weights; "
        "the dearest step taken, the FFN of layer 1, cost 0.03."
    )


@pytest.mark.parametrize(
    ("unit", "saved", "heading", "name"),
    [
        ("bytes", "2", "MB saved", "MB"),
        ("ms", "2,000,000", "ms saved", "millisecond"),
        ("parameters", "2", "M saved", "million parameters"),
    ],
)
def test_the_unit_is_that_of_the_requirement(unit, saved, heading, name):
    title, headings, rows = layer_table(replace(reasons(), unit=unit))
    assert (rows[1][4], headings[4]) == (saved, heading)
    assert title.endswith(f"nats per {name}")
    assert f"nats per {name}" in next_step(replace(reasons(), unit=unit))


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0.0, "0"), (0.081732, "0.0817"), (12345.6, "12,346"), (0.00012, "0.00012"), (3.2e-6, "3e-06")],
)
def test_numbers_are_short(value, text):
    assert short(value) == text


def test_each_kind_with_what_it_gave_and_cost():
    found = library(0)
    budget = weights(0.35 * SHAPE.layer_weights)
    chosen = search(found, budget)
    reasons = reasons_of(chosen.blocks, chosen.chosen, "weights")
    title, headings, rows = kinds_table(reasons)
    assert (title, headings) == ("What each kind gave and cost", ["kind", "count", "M saved", "nats", "per M"])
    known = {"whole blocks", "FFN channels", "query heads and KV groups"}
    assert rows and {row[0] for row in rows} <= known
    saved = SHAPE.layer_weights - chosen.plan.kept_shape(SHAPE).layer_weights
    assert sum(float(row[2]) for row in rows) == pytest.approx(saved / 1e6, rel=5e-3)
    assert sum(float(row[3]) for row in rows) == pytest.approx(chosen.plan.price, rel=5e-3)


def test_integers_are_a_kind_of_their_own():
    budget = milliseconds(3.0)
    table = replace(budget.table, forms=(FormCost(8, 32, 0.5, 0.5, 0.5),))  # twice as fast, and closer
    wide = (MatrixForm(8, 32),)
    budget = replace(budget, table=table, measure=StepTime(table), forms=wide, vocabulary=wide)
    chosen = search(library(0), budget)
    reasons = replace(reasons_of(chosen.blocks, chosen.chosen, "ms"), integers=chosen.integers)
    _, _, rows = kinds_table(reasons)
    (row,) = [row for row in rows if row[0] == "bits and groups of weights"]
    slim = chosen.plan.kept_shape(SHAPE)
    saved = budget.total(slim) - budget.total_in(chosen.plan.forms, slim, chosen.plan.kept_layers)
    assert chosen.integers.saved == pytest.approx(saved) and float(row[2]) == pytest.approx(saved, rel=5e-3)
    assert sum(float(row[2]) for row in rows) == pytest.approx(
        budget.total(SHAPE) - budget.total_in(chosen.plan.forms, slim, chosen.plan.kept_layers), rel=5e-3
    )
