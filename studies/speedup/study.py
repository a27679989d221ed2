"""What pruning costs at equal measured speed: int4 bundles of every method, brought to the same decode speed-up.

    python -m studies.speedup.study costs          # the table of layer costs of this machine, at one thread
    python -m studies.speedup.study prune          # prune to the speed-ups by that table, and export; nothing is timed
    python -m studies.speedup.study quality        # perplexity of the bundles on WikiText-2 raw test
    python -m studies.speedup.study speed          # bundles against the dense one, interleaved; on an idle machine
    python -m studies.speedup.study all            # these in turn, until every row has its speed
    python -m studies.speedup.study table [--write]

A row is a method with its options at one speed-up; its first bundle asks for that speed-up by the table. Where the
measured one is more than 2 % off, the next asks for as much more or less, at most twice, and the bundle that is closest
counts. Finished cells, one JSON per bundle, are not made again. Bundles lie under out/ and may be removed: `prune
--chunks 160` makes those again that have no quality on so many chunks, on any machine. Only `costs`, `speed` and `all`
want the machine that the table was measured on, or `--elsewhere`; a speed says where it was measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from studies.common import METHODS, Bar, Cell, add_write_option, bar_table, markdown, parser_of, show_tables
from studies.pruning.cells import Variant, value_of
from studies.speedup.rows import CLOSE, HERE, PAIRS, SPEEDUPS, TRIES, Setup, closest, read_rows, row_variants

PLANNED = 0.05
HOSTS = {"host1": "the machine of the cost table", "host2": "another machine of its kind"}
TEXTS = ("test40", "test160")


def tables() -> dict[str, str]:
    """The tables of the README."""
    first = read_rows(Setup(Path(), None))
    return {**{host: rows_table(HERE / "cells" / host) for host in HOSTS}, "bars": bar_table(all_bars(first))}


def all_bars(rows: list[list[Cell]]) -> list[Bar]:
    """Every bar, of the rows of a machine."""
    return [*(speed_bar(rows, speedup, text) for speedup in SPEEDUPS for text in TEXTS), *planned_bars(rows)]


def rows_table(cells: Path) -> str:
    """A row for each speed-up, setting and attempt, its seeds side by side, the best quality first."""
    groups: dict[tuple[float, str, int], list[Cell]] = {}
    for row in read_rows(Setup(Path(), None, cells=cells)):
        for cell in row:
            key = (cell["variant"]["speedup"], words(cell["variant"]), cell["attempt"])
            groups.setdefault(key, []).append(cell)
    lines = []
    for (speedup, name, attempt), found in groups.items():
        found.sort(key=lambda cell: cell["variant"]["seed"])
        quality = [nll_of(found, text) for text in TEXTS]
        columns = [
            name + (", asked again" if attempt else ""),
            each(found, lambda cell: str(cell["variant"]["seed"])),
            each(found, lambda cell: f"{cell['planned']['speedup']:.3f}"),
            each(found, lambda cell: f"{cell['speed']['speedup']:.3f}" if cell.get("speed") else "-"),
            each(found, lambda cell: f"{cell['bundle']['parameters'] / 1e6:.1f}"),
        ]
        lines.append((speedup, quality[0] or quality[1], [f"{speedup}x", *columns, *quality]))
    heads = ["speed-up", "settings", "seeds", "planned", "measured", "M parameters", "NLL, 40 chunks", "160 chunks"]
    return markdown(heads, [line for *_, line in sorted(lines)])


def words(variant: Variant) -> str:
    """A row's method and options."""
    rest = {k: v for k, v in variant.items() if k not in ("speedup", "seed", "method", "text")}
    return ", ".join([METHODS[variant["method"]], *(f"`{k}={v}`" for k, v in sorted(rest.items()))])


def told(cell: Cell) -> str:
    """Which bundle it is."""
    variant = cell["variant"]
    return f"{words(variant)}, {variant['speedup']}x, seed {variant['seed']}, attempt {cell['attempt']}"


def each(cells: list[Cell], told: Callable[[Cell], str]) -> str:
    """One thing of every cell."""
    return ", ".join(map(told, cells))


def nll_of(cells: list[Cell], text: str) -> str:
    """The mean, and each seed's."""
    values = [cell["quality"][text] for cell in cells if text in cell["quality"]]
    if not values:
        return ""
    if len(values) == 1 == len(cells):
        return f"{values[0]:.3f}"
    return f"{statistics.fmean(values):.3f} ({', '.join(f'{value:.3f}' for value in values)})"


def speed_bar(rows: list[list[Cell]], speedup: float, text: str) -> Bar:
    """NLL of SAAP's int4 bundle against every baseline's that is as fast; means over SAAP's seeds."""
    check, bar = f"int4 bundles at {speedup}x measured, {text}", "perplexity below every baseline's"
    by_variant: dict[str, dict[int, float]] = {}
    slow = []
    for cells in rows:
        variant = cells[0]["variant"]
        judged = [cell for cell in cells if text in cell["quality"]]
        cell = closest(judged, speedup) if variant["speedup"] == speedup else None
        if cell is None:
            continue
        name = words(variant)
        by_variant.setdefault(name, {})[variant["seed"]] = cell["quality"][text]
        if abs(cell["speed"]["speedup"] / speedup - 1) > CLOSE:
            slow.append(f"{name}, seed {variant['seed']}, is {cell['speed']['speedup']:.3f}x")
    mine = by_variant.get("SAAP, `compensate=refit`")
    others = {n: v for n, v in by_variant.items() if not n.startswith("SAAP") and mine and v.keys() >= mine.keys()}
    if not mine or not others:
        return Bar(check, bar, f"{'baselines' if mine else 'SAAP'} not measured", None)
    means = {name: statistics.fmean(values[s] for s in mine) for name, values in others.items()}
    nll, rival = statistics.fmean(mine.values()), min(means, key=means.__getitem__)
    found = f"SAAP {nll:.4f}, best of {len(means)} baselines {means[rival]:.4f} ({rival}): {nll - means[rival]:+.4f}"
    return Bar(check, bar, "; ".join([found, *slow]), nll < means[rival])


def planned_bars(rows: list[list[Cell]]) -> list[Bar]:
    """The largest difference of planned and measured speed-ups: SAAP's decides, the baselines' is beside it."""
    bars = []
    for who, is_ours in (("SAAP", True), ("baselines", False)):
        cells = [c for row in rows for c in row if c.get("speed") and (c["variant"]["method"] == "saap") == is_ours]
        errors = {told(c): c["planned"]["speedup"] / c["speed"]["speedup"] - 1 for c in cells}
        worst = max(errors, key=lambda name: abs(errors[name]), default=None)
        found = f"{len(errors)} bundles, worst {errors[worst]:+.1%} ({worst})" if worst else "none timed"
        reached = abs(errors[worst]) <= PLANNED if worst else None
        bars.append(Bar(f"planned against measured speed-up, {who}", f"within {PLANNED:.0%}", found, reached))
    return bars


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = parser_of(__doc__)
    parser.add_argument("what", choices=["costs", "prune", "quality", "speed", "all", "table"])
    parser.add_argument("--methods", help="only these, as saap,flap")
    parser.add_argument("--speedups", default=",".join(map(str, SPEEDUPS)))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--published", action="store_true", help="baselines on their authors' text and layers too")
    parser.add_argument("--extra", nargs="*", default=[], help="key=value options of every row, such as heads=true")
    parser.add_argument("--without", nargs="*", default=[], help="no rows that have these options, such as modules")
    parser.add_argument("--chunks", type=int, default=40)
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--host", default="host1", help="folder of the cells; a machine has its own")
    parser.add_argument("--elsewhere", action="store_true", help="speed: on another machine than the table's, too")
    add_write_option(parser)
    given = parser.parse_args(arguments)
    if given.what == "table":
        return show_tables(HERE, tables(), given.write)
    from saap.models.resolve import resolve
    from studies.pruning.measure import Texts, remember_rankings
    from studies.speedup import measure

    model_dir = Path(resolve("smollm2-135m"))
    setup = Setup(
        model_dir, Texts(model_dir), cells=HERE / "cells" / given.host, chunks=given.chunks, pairs=given.pairs,
        elsewhere=given.elsewhere,
    )  # fmt: skip
    extra = {key: value_of(value) for key, value in (pair.split("=", 1) for pair in given.extra)}
    variants = [
        {**variant, **extra, "speedup": float(speedup), "seed": int(seed)}
        for seed in given.seeds.split(",")
        for speedup in given.speedups.split(",")
        for variant in row_variants(given.published)
        if given.methods is None or variant["method"] in given.methods.split(",")
        if not any(variant.get(option) for option in given.without)
    ]
    remember_rankings()
    if given.what in ("costs", "all"):
        measure.make_costs(setup)
    steps = {"prune": measure.prune_rows, "speed": measure.speed_rows, "quality": measure.quality_rows}
    for _ in range(TRIES if given.what == "all" else 1):
        for name, step in steps.items():
            if given.what == name or (given.what == "all" and name != "quality"):
                step(setup, variants)
    if given.what == "all":
        measure.quality_rows(setup, variants)


if __name__ == "__main__":
    main()
