"""Does a price say what a removal costs? Prices against measured losses of random options of all types.

    python -m studies.prices.study run                    # 40 options, seed 0, into cells/prices.json
    python -m studies.prices.study run score=token        # the same options, priced by another score
    python -m studies.prices.study run corrections=1      # prices corrected by measured loss, as in the search
    python -m studies.prices.study table [--write]

Every module option (FFN widths, query heads of each KV group, KV groups, no attention, no FFN) is priced as `saap
prune --modules` prices it, on the calibration text of studies.pruning. The options are drawn from all types and depths
with a seed of their own, so that variants are judged by the same ones. Each is then measured on text that no score or
price has seen: alone, in the model that is whole otherwise, and in the model that the one-step plan of `ratio` cuts
otherwise, where a module counts from whole to the option.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from studies.common import Bar, add_write_option, bar_table, markdown, parser_of, provenance, show_tables
from studies.pruning.cells import Variant, slug, value_of

HERE = Path(__file__).resolve().parent
FILE = HERE / "cells" / "prices.json"
MODEL, ROWS, LIMIT = "smollm2-135m", 16, 0.8
DEFAULTS: Variant = {"ratio": 0.2, "seed": 0}
WORDS = {"alone": "alone, in the whole model", "planned": "on top of the plan"}  # where an option is measured


def run(variant: Variant, draw: int | None = None) -> None:
    """Price and measure, unless it was done.

    Args:
        variant: settings of SAAP, `ratio` of the plan, and `seed` of the texts.
        draw: seed of the options, if not the usual.
    """
    name = slug(variant) + (f"_draw={draw}" if draw is not None else "")
    known = json.loads(FILE.read_text()) if FILE.is_file() else {}
    if name in known:
        print(f"{name}: is in {FILE} already")
        return
    from saap.models.architectures import shape_of
    from saap.models.checkpoint import load_model, read_config
    from saap.models.resolve import resolve
    from saap.models.weight_files import weights_hash
    from saap.prune.search.budget import budget_for
    from saap.system.files import write_json
    from studies.prices.measure import DRAW, judged
    from studies.pruning.measure import Texts, options_of

    options = options_of(variant)
    options.check()
    model_dir = Path(resolve(MODEL))
    config, texts = read_config(model_dir), Texts(model_dir)
    began = time.monotonic()
    budget = budget_for(options, shape_of(config), config)
    calibration, held = texts.alike(variant["seed"]), texts.held(variant["seed"])[:ROWS]
    weights = weights_hash(model_dir)
    record = judged(
        load_model(model_dir), calibration, held, options, budget, weights, seed=DRAW if draw is None else draw
    )
    about = {"variant": variant, "seconds": round(time.monotonic() - began, 1), **provenance()}
    write_json(FILE, {**known, name: {**about, **record}})


def tables() -> dict[str, str]:
    """The tables of the README."""
    records = json.loads(FILE.read_text())
    bars = [bar for name in records for bar in price_bars(records, name)]
    return {"correlation": correlation_table(records), "types": type_table(records), "bars": bar_table(bars)}


def correlation_table(records: dict[str, Any]) -> str:
    """Rank correlations over all options, two rows per variant."""
    lines = []
    for name, record in records.items():
        for where in WORDS:
            c = record["correlation"][where]
            interval = f"{_number(c['rho'], 3)} ({_number(c['low'], 3)} to {_number(c['high'], 3)})"
            lines.append([f"`{name}`", WORDS[where], len(record["points"]), interval])
    return markdown(["settings", "measured", "options", "rank correlation (95 %)"], lines)


def type_table(records: dict[str, Any]) -> str:
    """Correlation, and measured loss over price, of each type of option."""
    lines = []
    for name, record in records.items():
        alone, planned = (record["correlation"][where]["types"] for where in WORDS)
        for kind in alone:
            found = [(_number(t[kind]["rho"]), _number(t[kind]["measured_over_price"])) for t in (alone, planned)]
            lines.append([f"`{name}`", kind, alone[kind]["options"], *(value for pair in found for value in pair)])
    kinds = ("rank correlation", "measured / price")
    heads = [f"{kind}, {where}" for where in ("alone", "on the plan") for kind in kinds]
    return markdown(["settings", "type", "options", *heads], lines)


def price_bars(records: dict[str, Any], name: str) -> list[Bar]:
    """Rank correlation of prices and measured losses: alone decides; on top of a plan is beside it."""
    check, bar = "price against measured loss", f"rank correlation >= {LIMIT}"
    if name not in records:
        return [Bar(check, bar, "no such record", None)]
    bars = []
    for where in WORDS:
        c = records[name]["correlation"][where]
        found = f"{c['rho']:.3f} ({c['low']:.3f} to {c['high']:.3f}), {len(records[name]['points'])} options"
        bars.append(Bar(f"{check}, {WORDS[where]}", bar, found, c["rho"] >= LIMIT))
    return bars


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = parser_of(__doc__)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("settings", nargs="*", help="run: key=value")
    parser.add_argument("--draw", type=int, help="seed of the options, if not the usual")
    add_write_option(parser)
    given = parser.parse_args(arguments)
    if given.what == "table":
        return show_tables(HERE, tables(), given.write)
    run({**DEFAULTS, **{key: value_of(value) for key, value in (s.split("=", 1) for s in given.settings)}}, given.draw)


if __name__ == "__main__":
    main()
