"""Does a price say what a removal costs? Prices against measured losses of random options of all types.

    python -m studies.prices.study                        # 40 options, seed 0, into cells/prices.json
    python -m studies.prices.study --score token          # the same options, priced by another score
    python -m studies.prices.study --corrections 1        # prices corrected by measured loss, as in the search
    python -m studies.prices.study --show                 # what is there, as Markdown

Every module option (FFN widths, query heads of each KV group, KV groups, no attention, no FFN) is priced as `saap
prune --modules` prices it, on the calibration text of studies.pruning. The options are drawn from all types and depths
with a seed of their own, so that variants are judged by the same ones. Each is then measured on text that no score or
price has seen: alone, in the model that is whole otherwise, and in the model that the one-step plan of `--ratio` cuts
otherwise, where a module counts from whole to the option.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from saap import __version__, models
from saap.adaptive import cut_layers, prices_of
from saap.architectures import shape_of
from saap.budget import Budget
from saap.checkpoint import load_model, read_config
from saap.fusion import FUSIONS
from saap.json_files import write_json
from saap.pricing import correct_prices
from saap.prune_options import PruneOptions
from saap.search import Module, Option, Prices, modules_of, plan_from, solve
from saap.structures import LayerPlan, LayerSizes, ModelShape, PrunePlan, whole_layer
from saap.weight_files import weights_hash
from saap.working_point import WorkingPoint
from studies.pruning.study import Texts, Variant, options_of, slug

FILE = Path(__file__).resolve().parent / "cells" / "prices.json"
OPTIONS, DRAW, RATIO, ROWS, LIMIT = 40, 7, 0.2, 16, 0.8
PLACES = ("alone", "planned")  # where an option is measured


def kind_of(module: Module, option: Option, sizes: LayerSizes) -> str | None:
    """The type of an option; None where it leaves the module whole."""
    keep = option.keep.sizes
    if module.kind == "ffn":
        return None if keep.ffn == sizes.ffn else "FFN width" if keep.ffn else "no FFN"
    if not keep.query_heads:
        return "no attention"
    if keep.kv_heads < sizes.kv_heads:
        return "KV groups"
    return "query heads" if keep.query_heads < sizes.query_heads else None


def draw(modules: Sequence[Module], shape: ModelShape, count: int, seed: int) -> list[tuple[str, Module, Option]]:
    """Random options, as many of each type, and of each type as many from each part of the depth."""
    by_kind: dict[str, list[tuple[str, Module, Option]]] = {}
    for module in modules:
        for option in module.options:
            if kind := kind_of(module, option, shape.layers[module.layer]):
                by_kind.setdefault(kind, []).append((kind, module, option))
    random = np.random.default_rng(seed)
    drawn = []
    for place, kind in enumerate(sorted(by_kind)):
        found = by_kind[kind]  # in the order of the layers
        wanted = count // len(by_kind) + (place < count % len(by_kind))
        strata = np.array_split(np.arange(len(found)), min(wanted, len(found)))
        drawn += [found[int(random.choice(stratum))] for stratum in strata]
    return drawn


def with_module(layer: LayerPlan, kind: str, keep: LayerPlan) -> LayerPlan:
    """A layer with one of its modules as ``keep`` has it."""
    if kind == "ffn":
        return replace(layer, ffn=keep.ffn)
    return replace(layer, query_heads=keep.query_heads, kv_heads=keep.kv_heads)


def increases(
    model: PreTrainedModel,
    shape: ModelShape,
    plan: PrunePlan,
    drawn: Sequence[tuple[str, Module, Option]],
    ids: torch.Tensor,
) -> list[float]:
    """What each option adds to the loss where all other modules are as planned, nats per token.

    Counted from the module as a whole, also where the plan cuts it.
    """
    whole: dict[tuple[int, str], float] = {}
    found = []
    with WorkingPoint(model, shape, cut_layers(plan, shape), ids).entered() as here:
        for _, module, option in drawn:
            layer, kind = module.layer, module.kind
            now = plan.layers[layer]
            unpruned = with_module(now, kind, whole_layer(shape.layers[layer]))
            if (layer, kind) not in whole:
                whole[layer, kind] = here.loss if unpruned == now else here.loss_with(layer, unpruned)
            found.append(here.loss_with(layer, with_module(now, kind, option.keep)) - whole[layer, kind])
    return found


def one_step_plan(
    model: PreTrainedModel,
    shape: ModelShape,
    prices: Prices,
    priced: torch.Tensor,
    budget: Budget,
    options: PruneOptions,
) -> tuple[Prices, PrunePlan]:
    """The plan that meets the budget, and the prices after the corrections that were asked for.

    Whole modules go only where ``--modules`` was given, as in `saap prune`; their prices are corrected all the same.
    """
    nothing: list[float | None] = [None] * len(shape.layers)

    def searched(prices: Prices) -> tuple[list[Module], list[Option], PrunePlan]:
        allowed = prices if options.adaptive.modules else replace(prices, no_attention=nothing, no_ffn=nothing)
        modules = modules_of(shape, allowed, options.block, frozenset(), budget)
        chosen = solve(modules, budget)
        return modules, chosen, plan_from(modules, chosen, shape)

    modules, chosen, plan = searched(prices)
    for _ in range(options.adaptive.corrections):
        prices, _ = correct_prices(model, shape, prices, modules, chosen, plan, priced)
        modules, chosen, plan = searched(prices)
    return prices, plan


def spearman(prices: Sequence[float], losses: Sequence[float]) -> float | None:
    """Spearman's rank correlation; None where one side is constant."""
    (value,) = _spearman(np.asarray(prices)[None], np.asarray(losses)[None])
    return None if np.isnan(value) else float(value)


def rank_correlation(prices: Sequence[float], losses: Sequence[float], resamples: int = 2000) -> dict[str, Any]:
    """Spearman's rank correlation with a 95 % percentile bootstrap interval over the options."""
    picks = np.random.default_rng(0).integers(len(prices), size=(resamples, len(prices)))
    drawn = _spearman(np.asarray(prices)[picks], np.asarray(losses)[picks])
    drawn = drawn[~np.isnan(drawn)]
    low, high = np.percentile(drawn, [2.5, 97.5]).tolist() if len(drawn) else (None, None)
    return {"rho": spearman(prices, losses), "low": low, "high": high}


def _spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson's correlation of the ranks of each row, [rows, values]; NaN where a side is constant."""
    from scipy.stats import rankdata

    a, b = (rankdata(side, axis=1) for side in (x, y))  # ties share their mean rank
    a, b = (ranks - ranks.mean(1, keepdims=True) for ranks in (a, b))
    norm = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    return np.divide((a * b).sum(1), norm, out=np.full(len(x), np.nan), where=norm > 0)


def judged(
    model: PreTrainedModel, calibration: torch.Tensor, held: torch.Tensor, options: PruneOptions, budget: Budget,
    weights: str | None, count: int = OPTIONS, seed: int = DRAW,
) -> dict[str, Any]:  # fmt: skip
    """Price, draw, measure: all points and their correlations.

    Args:
        calibration: [sequences, tokens]; scores and prices, as `saap prune` splits it.
        held: [sequences, tokens] of other text, on which the losses are measured.
        weights: the hash under which scores are kept; None keeps none.
    """
    shape = shape_of(model.config)
    prices, priced = prices_of(model, shape, calibration, replace(options.adaptive, modules=True), weights=weights)
    prices, plan = one_step_plan(model, shape, prices, priced, budget, options)
    drawn = draw(modules_of(shape, prices, options.block, frozenset(), budget), shape, count, seed)
    dense = PrunePlan(tuple(whole_layer(sizes) for sizes in shape.layers))
    measured = [increases(model, shape, at, drawn, held) for at in (dense, plan)]
    points = [
        {"layer": module.layer, "type": kind, "keep": sizes_of(option.keep), "price": option.price, "alone": alone,
         "planned": planned, "plan_keeps": sizes_of(plan.layers[module.layer])}
        for (kind, module, option), alone, planned in zip(drawn, *measured, strict=True)
    ]  # fmt: skip
    return {"draw": seed, "rows": list(held.shape), "correlation": correlations(points), "points": points}


def correlations(points: list[dict[str, Any]]) -> dict[str, Any]:
    """Over all points, and over those of each type, where a measured loss over its price has a median too."""
    found: dict[str, Any] = {}
    for where in PLACES:
        found[where] = rank_correlation(*([p[name] for p in points] for name in ("price", where)))
        for kind in sorted({p["type"] for p in points}):
            some = [p for p in points if p["type"] == kind]
            ratios = [p[where] / p["price"] for p in some if p["price"] > 0]
            found[where].setdefault("types", {})[kind] = {
                "options": len(some),
                "rho": spearman([p["price"] for p in some], [p[where] for p in some]),
                "measured_over_price": statistics.median(ratios) if ratios else None,
            }
    return found


def sizes_of(keep: LayerPlan) -> list[int]:
    """Query heads, KV heads, FFN width."""
    return [len(keep.query_heads), len(keep.kv_heads), len(keep.ffn)]


def show(path: Path) -> None:
    """Correlations as Markdown, two rows per variant: all options, then each type by itself."""
    print("| settings | measured | options | rank correlation (95 %) | of each type: rho, measured / price |")
    print("|---|---|---|---|---|")
    for name, record in json.loads(path.read_text()).items():
        for where in PLACES:
            c = record["correlation"][where]
            kinds = [f"{k} {_number(of['rho'])}, {_number(of['measured_over_price'])}x" for k, of in c["types"].items()]
            interval = f"{_number(c['rho'], 3)} ({_number(c['low'], 3)} to {_number(c['high'], 3)})"
            print(f"| {name} | {where} | {len(record['points'])} | {interval} | {'; '.join(kinds)} |")


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def variant_of(given: argparse.Namespace) -> Variant:
    """What was asked for beyond the defaults, and ratio and seed."""
    names = ("score", "c", "slices", "sigma", "stability", "exact", "modules", "corrections")
    asked = {name: value for name in names if (value := getattr(given, name)) not in (None, False)}
    return {**asked, "ratio": given.ratio, "seed": given.seed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--score", choices=list(FUSIONS))
    parser.add_argument("--c", type=float)
    parser.add_argument("--slices", choices=["all", "output"])
    parser.add_argument("--sigma", choices=["type", "layer"])
    parser.add_argument("--stability", type=float)
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--modules", action="store_true", help="the plan may drop whole modules too")
    parser.add_argument("--corrections", type=int)
    parser.add_argument("--ratio", type=float, default=RATIO, help="of the plan")
    parser.add_argument("--seed", type=int, default=0, help="of the texts")
    parser.add_argument("--draw", type=int, default=DRAW, help="seed of the options")
    parser.add_argument("--options", type=int, default=OPTIONS)
    parser.add_argument("--out", type=Path, default=FILE)
    parser.add_argument("--show", action="store_true")
    given = parser.parse_args()
    if given.show:
        show(given.out)
        return
    variant = variant_of(given)
    name = slug(variant) + (f"_draw={given.draw}" if given.draw != DRAW else "")
    known = json.loads(given.out.read_text()) if given.out.is_file() else {}
    if name in known:
        print(f"{name}: is in {given.out} already")
        return
    options = options_of(variant)
    options.check()
    model_dir = Path(models.resolve("smollm2-135m"))
    config, texts = read_config(model_dir), Texts(model_dir)
    began = time.monotonic()
    budget = options.requirement.budget(shape_of(config), config)
    record = judged(
        load_model(model_dir), texts.alike(given.seed), texts.held(given.seed)[:ROWS], options, budget,
        weights_hash(model_dir), given.options, given.draw,
    )  # fmt: skip
    about = {"variant": variant, "saap": __version__, "seconds": round(time.monotonic() - began, 1)}
    write_json(given.out, {**known, name: {**about, "date": time.strftime("%Y-%m-%d"), **record}})
    show(given.out)


if __name__ == "__main__":
    main()
