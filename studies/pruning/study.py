"""What pruning costs in nats, before any tuning: SAAP and nine baselines on WikiText-2 raw test.

    python -m studies.pruning.study run                      # all rows at 40 chunks, which screens them
    python -m studies.pruning.study run --chunks 160 --methods saap,flap method=flap compensate=bias
    python -m studies.pruning.study spread                   # SAAP and LLM-Pruner at seeds 0 to 9
    python -m studies.pruning.study twice                    # prune twice with one seed, hash all files
    python -m studies.pruning.study table [--write]

A cell is what `saap prune` writes with these settings, loaded and evaluated. Finished cells are not made again.
"""

from __future__ import annotations

import hashlib
import math
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from studies.common import METHODS, add_write_option, bar_table, markdown, parser_of, provenance, show_tables
from studies.pruning.bars import MANY_SEEDS, all_bars
from studies.pruning.cells import SCREEN, SEEDS, SEQUENCES, STRONGEST_FIRST, Row, Variant, rows_of, slug, value_of

if TYPE_CHECKING:
    import torch

    from saap.prune.options import PruneOptions
    from studies.pruning.measure import Texts

HERE = Path(__file__).resolve().parent
CELLS = HERE / "cells"
MODEL, RATIO, RATIOS = "smollm2-135m", 0.2, (0.2, 0.5)
STRUCTURES = {None: "heads, KV groups, FFN", False: "FFN", True: "KV groups, FFN"}
TEXTS = {None: "ours", "alike": "ours", "published": "as published", "wikitext": "WikiText-2 *train*"}


def table_variants() -> list[Variant]:
    """SAAP as it is by default, and every baseline as published and alike, FFN alone and with KV groups.

    Alike is our text, tokens and layers. Compensation: none, the refit, and a bias where a paper has one. What a score
    and a search do by themselves is read off the rows without compensation.
    """
    rows: list[Variant] = [{"method": "saap", "compensate": c} for c in ("refit", "none", "bias")]
    rows.append({**rows[0], "text": "wikitext"})  # against FLAP as published, which is calibrated on that
    rows.append({**rows[0], "sequences": 2 * SEQUENCES})  # a quarter of the tokens that FLAP as published takes
    for method in STRONGEST_FIRST:
        own = "bias" if method == "flap" else "none"
        kinds = ("bias", "refit", "none") if method in ("flap", "wanda_sp") else ("refit", "none")
        for heads in (False,) if method == "shortgpt" else (False, True):
            cell = {"method": method, "heads": heads}
            rows += [{**cell, "text": "alike", "compensate": compensation} for compensation in kinds]
            rows.append({**cell, "text": "published", "compensate": own})
    return rows


def make_table(variants: list[Variant], ratios: Sequence[float], seeds: Sequence[int], chunks: int) -> None:
    """The cells of the table that are missing."""
    from saap.models.resolve import resolve
    from studies.pruning.measure import Texts, remember_rankings, run_cell

    model_dir = Path(resolve(MODEL))
    texts = Texts(model_dir)
    remember_rankings()
    judged = {f"test{n}": texts.test(n) for n in sorted({SCREEN, chunks})}
    for seed in seeds:
        for variant in variants:
            ids = texts.of({**variant, "seed": seed})
            for ratio in ratios:
                run_cell(CELLS / "table", {**variant, "ratio": ratio, "seed": seed}, model_dir, ids, judged)


def spread_variants(methods: Sequence[str]) -> list[Variant]:
    """SAAP with and without its refit, and forms of LLM-Pruner, FFN only, on our text and with all layers allowed."""
    rows: list[Variant] = [{"method": "saap", "compensate": kind} for kind in ("refit", "none")]
    rows += [
        {"method": method, "heads": False, "text": "alike", "compensate": kind}
        for kind in ("none", "refit")
        for method in methods
    ]
    return [{**row, "ratio": RATIO} for row in rows]


def spread(where: Path, model_dir: Path, texts: Texts, methods: Sequence[str], seeds: Sequence[int]) -> None:
    """A cell for every seed that the table does not have."""
    from studies.pruning.measure import run_cell

    judged = {f"test{SCREEN}": texts.test(SCREEN)}
    for seed in seeds:
        for variant in spread_variants(methods):
            cell = {**variant, "seed": seed}
            if not (where / "table" / f"{slug(cell)}.json").is_file():
                run_cell(where / "seeds", cell, model_dir, texts.alike(seed), judged)


def twice(model_dir: Path, ids: torch.Tensor, options: PruneOptions) -> list[dict[str, str]]:
    """sha256 of every file of two slim directories, made with nothing kept from one to the other."""
    from saap.prune.pruning import prune

    found = []
    cache = os.environ.get("SAAP_CACHE")
    try:
        for _ in range(2):
            with tempfile.TemporaryDirectory() as folder:
                os.environ["SAAP_CACHE"] = str(Path(folder) / "cache")
                slim = Path(folder) / "slim"
                prune(model_dir, options, output=slim, calibration=ids)
                found.append({p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(slim.iterdir())})
    finally:
        os.environ.pop("SAAP_CACHE")
        if cache is not None:
            os.environ["SAAP_CACHE"] = cache
    return found


def tables() -> dict[str, str]:
    """The tables of the README."""
    rows = rows_of(CELLS / "table")
    confirmed = [row for row in rows if any("test160" in cell["nll"] for cell in row.cells.values())]
    return {
        "test160": nll_table(confirmed, "test160"),
        "screening": nll_table([row for row in rows if 0 in row.cells], "test40", (0,)),
        "bars": bar_table(bar for bar in all_bars(CELLS) if bar.reached is not None),
    }


def nll_table(rows: list[Row], text: str, seeds: Sequence[int] = SEEDS) -> str:
    """A row for each setting, a column for each ratio, the best mean first."""
    settings: dict[str, dict[float, Row]] = {}
    for row in rows:
        settings.setdefault(str(row), {})[row.variant["ratio"]] = row
    lines = []
    for by_ratio in settings.values():
        found = [known_of(by_ratio.get(ratio), text, seeds) for ratio in RATIOS]
        order = [statistics.fmean(values.values()) if values else math.inf for values in found]
        variant = next(iter(by_ratio.values())).variant
        lines.append((order, [*described(variant), *(nll_of(values, seeds) for values in found)]))
    heads = ["method", "what it prunes", "calibration text", "compensation", "20 %", "50 %"]
    return markdown(heads, [line for _, line in sorted(lines)])


def described(variant: Variant) -> list[str]:
    """Method, structures, text and compensation in words."""
    method, sequences = variant["method"], variant.get("sequences")
    text = TEXTS[variant.get("text")] + (f", {sequences} sequences" if sequences else "")
    structures = "whole layers" if method == "shortgpt" else STRUCTURES[variant.get("heads")]
    name = f"**{METHODS[method]}**" if method == "saap" else METHODS[method]
    return [name, structures, text, variant["compensate"]]


def known_of(row: Row | None, text: str, seeds: Sequence[int]) -> dict[int, float]:
    """NLL by seed, of the seeds that were measured."""
    cells = row.cells if row else {}
    return {seed: cells[seed]["nll"][text] for seed in seeds if seed in cells and text in cells[seed]["nll"]}


def nll_of(values: dict[int, float], seeds: Sequence[int]) -> str:
    """The mean, and in brackets what it is of: each seed's value, or which seeds there are."""
    if not values:
        return ""
    mean, each = f"{statistics.fmean(values.values()):.3f}", ", ".join(f"{value:.3f}" for value in values.values())
    if list(values) == list(seeds):
        return mean if len(seeds) == 1 else f"{mean} ({each})"
    return f"{mean} (seed {', '.join(map(str, values))})"


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = parser_of(__doc__)
    parser.add_argument("what", choices=["run", "spread", "twice", "table"])
    parser.add_argument("settings", nargs="*", help="run: only rows with these key=value")
    parser.add_argument("--ratios", default="0.2,0.5")
    parser.add_argument("--seeds", help="default: 0,1,2; of spread 0 to 9")
    parser.add_argument("--chunks", type=int, default=SCREEN, help="of the test, beside the first 40")
    parser.add_argument("--methods", help="only these, as saap,flap; of spread: forms of LLM-Pruner")
    add_write_option(parser)
    given = parser.parse_args(arguments)
    if given.what == "table":
        return show_tables(HERE, tables(), given.write)
    default = MANY_SEEDS if given.what == "spread" else SEEDS
    seeds = [int(seed) for seed in given.seeds.split(",")] if given.seeds else list(default)
    methods = given.methods.split(",") if given.methods else None
    if given.what == "run":
        settings = {key: value_of(value) for key, value in (pair.split("=", 1) for pair in given.settings)}
        variants = [v for v in table_variants() if settings.items() <= v.items()]
        variants = [v for v in variants if methods is None or v["method"] in methods]
        return make_table(variants, [float(ratio) for ratio in given.ratios.split(",")], seeds, given.chunks)
    from saap.base.writing import write_json
    from saap.models.resolve import resolve
    from studies.pruning.measure import Texts, options_of, remember_rankings

    model_dir = Path(resolve(MODEL))
    texts = Texts(model_dir)
    if given.what == "spread":
        remember_rankings()
        return spread(CELLS, model_dir, texts, methods or ["param_second"], seeds)
    variant: Variant = {"method": "saap", "ratio": RATIO, "seed": seeds[0]}
    files = twice(model_dir, texts.alike(seeds[0]), options_of(variant))
    write_json(CELLS / "twice.json", {"variant": variant, "files": files, **provenance()})


if __name__ == "__main__":
    main()
