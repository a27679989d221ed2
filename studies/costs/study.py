"""Does a sum of layer costs predict a whole model? Predicted against measured speed-ups of random uneven models.

    saap devices probe --costs smollm2-135m -t 1 -o out/cost.json
    python -m studies.costs.study out/cost.json smollm2-135m out/costs-check --threads 1 --rounds 12

Writes the model of the table and six models whose layers have random sizes (weights are random integers, since time
does not depend on them), measures them interleaved with the bench at 128 + 128 tokens, and compares.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

HERE = Path(__file__).resolve().parent
# (layers, share without attention, share without FFN, narrowest FFN)
KINDS = [(30, 0.05, 0.0, 768), (30, 0.1, 0.1, 640), (28, 0.2, 0.05, 512), (24, 0.0, 0.0, 1024), (20, 0.1, 0.1, 640)]
KINDS += [(12, 0.0, 0.0, 64)]


def random_models(full, block: int) -> list[tuple]:
    """Layer sizes of each model, the same every time."""
    from saap.models.structures import LayerSizes

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("costs", type=Path)
    parser.add_argument("model")
    parser.add_argument("work", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", type=Path, default=HERE / "cells" / "costs.json")
    given = parser.parse_args()
    from bench.judge.statistics import bootstrap_ratio, typical
    from bench.measure.plan import Plan
    from bench.measure.run import bench
    from export.graph.probe_model import read_probe_model
    from export.graph.probe_stacks import write_probe_stacks
    from saap.models.resolve import resolve
    from saap.prune.search.layer_costs import read_costs

    model = read_probe_model(resolve(given.model))
    full = model.shape.layers[0]
    models = [tuple(model.shape.layers), *random_models(full, model.precision.block)]
    given.work.mkdir(parents=True, exist_ok=True)
    bundles = write_probe_stacks(model, given.work, models)
    table = read_costs(
        given.costs, model.shape, bits=model.precision.bits, block=model.precision.block, threads=given.threads
    )
    plan = Plan(threads=given.threads, repetitions=given.rounds, cold=False)
    result = bench([str(path) for path in bundles], plan)
    dense, *others = result.measurements
    rows = []
    for m, layers in zip(others, models[1:], strict=True):
        times = [[typical(s.token_s) for s in side.samples] for side in (m, dense)]
        measured, low, high = bootstrap_ratio(*times, paired=True)
        predicted = table.total_ms(models[0]) / table.total_ms(layers)
        error = predicted / measured - 1
        rows.append({"predicted": predicted, "measured": measured, "low": low, "high": high, "error": error})
        spread = f"{measured:.3f}x ({low:.3f} to {high:.3f})"
        print(f"{len(layers)} layers: predicted {predicted:.3f}x, measured {spread}, {error:+.1%}")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps({"threads": given.threads, "rounds": given.rounds, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
