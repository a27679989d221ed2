"""Which settings of SAAP prune best? One thing changed at a time, judged on text that no score, price or refit saw.

    python -m studies.ablation.study run                     # all rows; finished cells are not made again
    python -m studies.ablation.study cell method=saap score=vector-token steps=1 compensate=none --seeds 0 --ratios 0.2
    python -m studies.ablation.study cell method=saap compensate=refit heads=true --where pays
    python -m studies.ablation.study table [--write]

`held` are the 40 rows that come after the calibration rows, `other` 80 chunks of the head of WikiText-2 *train*. The
test is not looked at here: these cells chose the defaults.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from studies.common import METHODS, add_write_option, markdown, parser_of, show_tables
from studies.pruning.cells import SEEDS, Row, Variant, rows_of, value_of

HERE = Path(__file__).resolve().parent
CELLS = HERE / "cells"
MODEL, RATIOS = "smollm2-135m", (0.2, 0.5)
BASE: Variant = {"method": "saap", "compensate": "none", "score": "vector-token", "steps": 1, "layer_power": 0}


def ablation_variants() -> list[Variant]:
    """One thing at a time, without compensation and in one step; then compensation and steps."""
    changes: list[Variant] = [
        {"score": s} for s in ("vector-token", "fused-token", "fused", "vector", "element", "token")
    ]
    changes += [
        {"c": 1.0}, {"slices": "output"}, {"sigma": "layer"}, {"stability": -0.5}, {"stability": 0.5}, {"heads": False},
        {"score": "fused", "exact": True}, {"keep": "blocks"}, {"steps": 2}, {"compensate": "bias"},
        {"compensate": "refit"}, {"compensate": "refit", "steps": 2}, {"compensate": "refit", "steps": 4},
        {"layer_power": 1}, {"layer_power": 2}, {"compensate": "refit", "steps": 4, "layer_power": 1},
    ]  # fmt: skip
    return [{**BASE, **change} for change in changes]


def make(where: Path, variants: list[Variant], ratios: Sequence[float], seeds: Sequence[int]) -> None:
    """The cells that are missing."""
    from saap.models.resolve import resolve
    from studies.pruning.measure import Texts, remember_rankings, run_cell

    model_dir = Path(resolve(MODEL))
    texts = Texts(model_dir)
    remember_rankings()
    for seed in seeds:
        judged = {"held": texts.held(seed), "other": texts.other()}
        for variant in variants:
            ids = texts.of({**variant, "seed": seed})
            for ratio in ratios:
                run_cell(where, {**variant, "ratio": ratio, "seed": seed}, model_dir, ids, judged)


def tables() -> dict[str, str]:
    """The tables of the README."""
    rows = rows_of(CELLS)
    single = [row for row in rows if BASE.keys() <= row.variant.keys() and is_single(row.variant)]
    rest = [row for row in rows if row not in single]
    return {"one-step": one_step(single), "compensated": pairs(rest), "attention": pairs(rows_of(CELLS / "pays"))}


def is_single(variant: Variant) -> bool:
    """SAAP in one step, nothing compensated."""
    return all(variant[key] == BASE[key] for key in ("method", "compensate", "steps"))


def one_step(rows: list[Row]) -> str:
    """NLL on held rows by what is changed, the mean over the seeds that were measured beside the base's on them."""
    settings: dict[str, dict[float, Row]] = {}
    for row in rows:
        changed = {k: v for k, v in row.variant.items() if k != "ratio" and BASE.get(k) != v}
        settings.setdefault(words(changed) or "**the base: vector and token score**", {})[row.variant["ratio"]] = row
    base = next(columns for name, columns in settings.items() if name.startswith("**"))
    lines = []
    for name, columns in settings.items():
        found = [beside(columns.get(ratio), base[ratio]) for ratio in RATIOS]
        lines.append((not name.startswith("**"), found[0] or "9", [name, *found]))
    return markdown(["changed", "20 %", "50 %"], [line for *_, line in sorted(lines)])


def beside(row: Row | None, base: Row) -> str:
    """The mean over three seeds; of fewer, which they are and what the base has on the same."""
    if row is None:
        return ""
    seeds = [seed for seed in SEEDS if seed in row.cells]
    mean = row.mean("held", seeds)
    if len(seeds) == len(SEEDS):
        return f"{mean:.3f}"
    return f"{mean:.3f} (seed {', '.join(map(str, seeds))}; base {base.mean('held', seeds):.3f})"


def pairs(rows: list[Row]) -> str:
    """Settings, seed and NLL on held rows and on other text."""
    lines: list[tuple[Any, ...]] = []
    for row in rows:
        for seed, cell in sorted(row.cells.items()):
            nll = [f"{cell['nll'][text]:.3f}" if text in cell["nll"] else "" for text in ("held", "other")]
            variant = {k: v for k, v in row.variant.items() if k not in ("ratio", "method")}
            name = f"{METHODS[row.variant['method']]}, {words(variant) or 'default'}"
            lines.append((row.variant["ratio"], nll[0], [f"{row.variant['ratio']:.0%}", name, seed, *nll]))
    return markdown(["ratio", "settings", "seed", "held", "WikiText-2 *train*"], [line for *_, line in sorted(lines)])


def words(variant: Variant) -> str:
    """Settings as they are typed."""
    return ", ".join(f"`{key}={value}`" for key, value in sorted(variant.items()))


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = parser_of(__doc__)
    parser.add_argument("what", choices=["run", "cell", "table"])
    parser.add_argument("settings", nargs="*", help="cell: key=value")
    parser.add_argument("--ratios", default="0.2,0.5")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--where", default=".", help="folder of the cells: pays for those about attention")
    add_write_option(parser)
    given = parser.parse_args(arguments)
    if given.what == "table":
        return show_tables(HERE, tables(), given.write)
    settings = {key: value_of(value) for key, value in (pair.split("=", 1) for pair in given.settings)}
    variants = [settings] if given.what == "cell" else ablation_variants()
    ratios = [float(ratio) for ratio in given.ratios.split(",")]
    make(CELLS / given.where, variants, ratios, [int(seed) for seed in given.seeds.split(",")])


if __name__ == "__main__":
    main()
