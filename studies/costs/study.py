"""Does a sum of layer costs predict a whole model? Predicted against measured speed-ups of random uneven models.

    saap devices costs smollm2-135m -t 1 -o out/cost.json
    python -m studies.costs.study run out/cost.json smollm2-135m out/costs-check --threads 1 --rounds 12
    python -m studies.costs.study table [--write]

Writes the model of the table and six models whose layers have random sizes (weights are random integers, since time
does not depend on them), measures them interleaved with the bench at 128 + 128 tokens, and compares.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from studies.common import add_write_option, markdown, parser_of, provenance, show_tables

HERE = Path(__file__).resolve().parent
CELL = HERE / "cells" / "costs.json"
# (layers, share without attention, share without FFN, narrowest FFN)
KINDS = [(30, 0.05, 0.0, 768), (30, 0.1, 0.1, 640), (28, 0.2, 0.05, 512), (24, 0.0, 0.0, 1024), (20, 0.1, 0.1, 640)]
KINDS += [(12, 0.0, 0.0, 64)]


def random_models(full, block: int) -> list[tuple]:
    """Layer sizes of each model, the same every time."""
    from saap.models.shape import LayerSizes

    draw = random.Random(7)
    models = []
    for count, no_attention, no_ffn, narrowest in KINDS:
        layers = []
        for _ in range(count):
            groups = draw.randint(1, full.kv_heads)
            heads = groups * draw.randint(1, full.query_heads // full.kv_heads)
            attention = (0, 0) if draw.random() < no_attention else (heads, groups)
            width = 0 if draw.random() < no_ffn else draw.randrange(narrowest, full.ffn + 1, 2 * block)
            if attention[0] or width:
                layers.append(LayerSizes(*attention, width))
        models.append(tuple(layers))
    return models


def run(costs: Path, name: str, work: Path, threads: int, rounds: int) -> None:
    """Write the models, measure them, and compare."""
    from bench.measure import BenchOptions, measure
    from bench.measure.statistics import bootstrap_ratio, typical
    from export.graph.probe_model import read_probe_model
    from export.graph.probe_stacks import ProbeStack, write_probe_stacks
    from saap.models.resolve import resolve
    from saap.prune.search.layer_costs import read_costs

    model = read_probe_model(resolve(name))
    full, precision = model.shape.layers[0], model.precision
    models = [tuple(model.shape.layers), *random_models(full, precision.block)]
    work.mkdir(parents=True, exist_ok=True)
    bundles = write_probe_stacks(model, work, list(map(ProbeStack, models)))
    table = read_costs(costs, model.shape, bits=precision.bits, group_size=precision.block, threads=threads)
    result = measure([str(path) for path in bundles], BenchOptions(threads=threads, repetitions=rounds, cold=False))
    dense, *others = result.measurements
    rows = []
    for m, layers in zip(others, models[1:], strict=True):
        times = [[typical(s.token_s) for s in side.samples] for side in (m, dense)]
        measured, low, high = bootstrap_ratio(*times, paired=True)
        predicted = table.total_ms(models[0]) / table.total_ms(layers)
        row = {"layers": len(layers), "predicted": predicted, "measured": measured, "low": low, "high": high}
        rows.append({**row, "error": predicted / measured - 1})
    CELL.parent.mkdir(exist_ok=True)
    about = {"threads": threads, "rounds": rounds, **provenance(), "rows": rows}
    CELL.write_text(json.dumps(about, indent=1) + "\n")


def tables() -> dict[str, str]:
    """The table of the README."""
    lines = [
        [
            f"{row['predicted']:.3f}",
            f"{row['measured']:.3f} ({row['low']:.3f} to {row['high']:.3f})",
            f"{row['error']:+.1%}",
        ]
        for row in json.loads(CELL.read_text())["rows"]
    ]
    return {"costs": markdown(["predicted speed-up", "measured (95 %)", "error"], lines)}


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = parser_of(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("run")
    check.add_argument("costs", type=Path)
    check.add_argument("model")
    check.add_argument("work", type=Path)
    check.add_argument("--threads", type=int, default=1)
    check.add_argument("--rounds", type=int, default=12)
    add_write_option(commands.add_parser("table"))
    args = parser.parse_args(arguments)
    if args.command == "table":
        return show_tables(HERE, tables(), args.write)
    run(args.costs, args.model, args.work, args.threads, args.rounds)


if __name__ == "__main__":
    main()
