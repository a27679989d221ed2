"""Plans that are drawn, by their summed price and by the KL that they have: does a sum of prices order plans?"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from transformers import PreTrainedModel

from saap.base.writing import write_json
from saap.evaluate.evaluation import evaluate
from saap.evaluate.options import EvalOptions
from saap.prune.cut.refit import compensate
from saap.prune.options import AdaptiveOptions, Compensation, PruneOptions
from saap.prune.plan import PrunePlan
from saap.prune.pruning import prune
from saap.prune.search.budget import Budget
from saap.prune.search.milp import Found, Gap, Library, search
from saap.prune.trials import gone_of
from studies.common import Bar, Cell, markdown, provenance

RUNGS, EACH, RATIO, SPREAD = (0, 4, 8), 10, 0.25, 1.0
WINDOWS = 8  # of 256 tokens
REFIT = 24  # sequences, on which prices are fitted too; the product takes 128
EAGER = 0.2  # gaps at this share of their price, so that as many blocks go as may
BOUND = 0.8


def drawn(library: Library, seed: int) -> Library:
    """The library at other prices: each times exp(N(0, SPREAD²))."""
    draw = np.random.default_rng(seed)

    def times() -> float:
        return float(np.exp(draw.normal(0, SPREAD)))

    offers = {
        place: tuple((keep, price * factor) for keep, price in options)
        for place, options in library.offers.items()
        for factor in (times(),)
    }
    gaps = tuple(Gap(gap.blocks, EAGER * gap.price * times()) for gap in library.gaps)
    return replace(library, offers=offers, gaps=gaps)


def priced(library: Library, found: Found) -> float:
    """The price of a plan in a library that did not choose it."""
    total, order = 0.0, list(library.offers)
    runs = {gap.blocks: gap.price for gap in library.gaps}
    run: list[tuple[int, str]] = []
    for place, option in [*zip(order, found.chosen, strict=True), (None, None)]:
        if option is not None and place is not None and not option.keep.blocks:
            run.append(place)
            continue
        if run:
            total += runs[tuple(run)]
            run = []
        if option is not None and place is not None:
            total += dict(library.offers[place])[option.keep]
    return total


def measured(model: str, work: Path, texts: dict[str, str]) -> Cell:
    """Price and KL of every plan: all of one size, refitted, not tuned. What is in ``work`` is not made again."""
    work.mkdir(parents=True, exist_ok=True)
    found = []
    for rung in RUNGS:
        for seed in range(EACH):
            known = work / f"plan-{rung}-{seed}.json"
            if not known.is_file():
                write_json(known, one(model, rung, seed, texts, work / f"plan-{rung}-{seed}"))
            found.append(json.loads(known.read_text()))
            print(json.dumps(found[-1]), flush=True)
    return {"plans": found, "ratio": RATIO, "spread": SPREAD, **provenance()}


def one(model: str, rung: int, seed: int, texts: dict[str, str], out: Path) -> Cell:
    """A plan that is drawn, with at most so many blocks gone: its price in the true library, and its KL."""

    def choose(library: Library, budget: Budget, most_gone: int | None) -> Found:
        found = search(drawn(library, seed), budget, most_gone)
        return replace(found, plan=replace(found.plan, price=priced(library, found)))

    def refit(kind: Compensation, model: PreTrainedModel, plan: PrunePlan, ids: torch.Tensor, **how: Any) -> Any:
        return compensate(kind, model, plan, ids[:REFIT], **how)

    options = PruneOptions(ratio=RATIO, adaptive=AdaptiveOptions(most_gone=rung, attention=1.0))
    with patch("saap.prune.search.adaptive.search", choose), patch("saap.prune.pruning.compensate", refit):
        plan = prune(model, options, output=out).plan
    kl = {}
    for name, text in texts.items():
        quality = evaluate(out, EvalOptions(max_chunks=WINDOWS), reference=model, text=text or None)
        kl[name] = float(quality.rows[-1].kl or 0.0)
    return {"rung": rung, "gone": gone_of(plan), "price": plan.price, "kl": kl}


def table(cell: Cell) -> str:
    """What each rung of depth shows."""
    lines = []
    for rung in RUNGS:
        rows = [row for row in cell["plans"] if row["rung"] == rung]
        prices = [row["price"] for row in rows]
        told = [f"{min(prices):.2f} to {max(prices):.2f}"]
        for text in rows[0]["kl"]:
            found = [row["kl"][text] for row in rows]
            told += [f"{min(found):.2f} to {max(found):.2f}", f"{order(rows, text):.2f}"]
        lines.append([str(rung), str(len(rows)), *told])
    heads = [word for text in cell["plans"][0]["kl"] for word in (f"{text}: KL", "Spearman")]
    return markdown(["blocks gone", "plans", "summed prices", *heads], lines)


def order(rows: list[Cell], text: str) -> float:
    """Spearman's correlation of prices and KL."""
    from scipy.stats import spearmanr

    return float(spearmanr([row["price"] for row in rows], [row["kl"][text] for row in rows]).statistic)


def bar(cell: Cell) -> Bar:
    """Whether prices order the plans of every rung."""
    by_rung = [[row for row in cell["plans"] if row["rung"] == rung] for rung in RUNGS]
    found = {text: [order(rows, text) for rows in by_rung] for text in by_rung[0][0]["kl"]}
    told = "; ".join(f"{text} {', '.join(f'{value:.2f}' for value in values)}" for text, values in found.items())
    least = min(value for values in found.values() for value in values)
    name = "prices against measured KL of 30 drawn plans"
    return Bar(name, f"Spearman >= {BOUND} in each rung of depth", told, least >= BOUND)
