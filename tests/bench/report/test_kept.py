"""The picture of what a plan kept, in the page that it stands in."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest
from support.report_page import RUN, text_of

from bench.report import report

PLAN = RUN["plan"]


def page(tmp_path, plan):
    return report([], tmp_path / "report.html", run={"plan": plan}).read_text()


def drawn(tmp_path, plan):
    """The picture of what was kept, and the words on it."""
    text = page(tmp_path, plan)
    (drawing,) = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    return drawing, "|".join(ElementTree.fromstring(drawing).itertext()), text_of(text)


def test_what_was_kept_layer_by_structure(tmp_path):
    drawing, words, text = drawn(tmp_path, PLAN)
    for told in ["query heads", "KV groups", "FFN width", "33 %", "66 %", "all kept", "all gone"]:  # 6, 2 and 2016 left
        assert told in words, told
    # Squared shares 2/3, 2/3, 2/3 and 31/48; what is gone has no fill.
    opacities = [float(o) for o in re.findall(r'style="fill: var\(--s2\); opacity: ([\d.]+)"', drawing)]
    shares = [6 / 9, 2 / 3, 1024 / 1536, 992 / 1536, 0.75, 0.5, 0.25]  # the last three are the key's
    assert sorted(opacities) == pytest.approx(sorted(0.06 + 0.94 * share**2 for share in shares), abs=1e-6)
    assert "price" not in words and "predicted" not in text


def priced(price):
    return [{"layer": layer, "kind": kind, "price": price} for layer in (0, 1) for kind in ("attention", "ffn")]


def test_prices_of_the_layers_are_drawn_below(tmp_path):
    reasons = {"unit": "weights", "dearest_taken": 5e-8, "cheapest_left": 6e-8, "blocks": priced(0.25)}
    drawing, words, text = drawn(tmp_path, {**PLAN, "reasons": reasons})
    assert "price, nats" in words and "attention" in words
    assert drawing.count("fill: var(--s6)") == drawing.count("fill: var(--s3)") == 3  # two layers and the key
    assert (
        "The dearest step taken cost 0.0500 nats per million weights, the cheapest one left would cost 0.0600." in text
    )
    assert 'aria-label="What is kept: query heads 33 %, KV groups 33 %, FFN width 66 %"' in page(tmp_path, PLAN)


@pytest.mark.parametrize(
    "reasons",
    [
        None,
        {"unit": "weights", "dearest_taken": None, "cheapest_left": None, "blocks": priced(None)},  # a baseline
        {"unit": "<b>", "dearest_taken": 1.0, "blocks": [{"layer": 9, "kind": "ffn", "price": 1.0}]},
        {"unit": [], "dearest_taken": 1.0, "blocks": [{"layer": 0, "kind": [], "price": 1.0}, 7]},
    ],
)
def test_a_plan_without_prices_is_drawn_without_them(tmp_path, reasons):
    _, words, text = drawn(tmp_path, {**PLAN, "reasons": reasons})
    assert "FFN width" in words and "price" not in words
    assert "dearest" not in text


@pytest.mark.parametrize("dense", [None, [{"query_heads": 9}], [{}, {}], [{"query_heads": 0, "ffn": "x"}] * 2])
def test_what_the_dense_model_had_is_not_guessed(tmp_path, dense):
    assert "<svg" not in page(tmp_path, {**PLAN, "dense_layers": dense})
