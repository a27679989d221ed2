"""Speed-ups of the demo: the pruned bundle against the dense one, and the dense one against transformers.

    make demo
    python -m studies.demo.study run out/demo MODEL_DIR           # on an idle machine; two results into cells/
    python -m studies.demo.study run out/demo MODEL_DIR --pairs 4
    python -m studies.demo.study table

Needs the directory of a finished `saap run`, and the dense model's directory for the transformers peer.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from bench.measure.result import read_result
from studies.common import decode_over, markdown, parser_of, show_tables

HERE = Path(__file__).resolve().parent
CELLS = HERE / "cells"
PAIRS = {"pruned": ("dense-int4", "slim-int4"), "transformers": ("transformers", "dense-int4")}  # (slow, fast)


def run(folder: str, dense: str, pairs: int) -> None:
    """Both comparisons, interleaved."""
    from bench.measure import BenchOptions, measure
    from bench.measure.result import write_result

    specs = [f"{folder}/dense-int4", f"{folder}/slim-int4"]
    plan = BenchOptions(threads=1, repetitions=pairs, cold=False)
    CELLS.mkdir(exist_ok=True)
    write_result(CELLS / "pruned.json", measure(specs, plan, names=list(PAIRS["pruned"])))
    plan = BenchOptions(threads=2, repetitions=5, cold=False)
    result = measure([specs[0], f"torch:{dense}"], plan, names=["dense-int4", "transformers"])
    write_result(CELLS / "transformers.json", result)


def tables() -> dict[str, str]:
    """Speed-ups, rates and peaks of the results that are there."""
    lines = []
    for name, (slow, fast) in PAIRS.items():
        if (CELLS / f"{name}.json").is_file():
            result = read_result(CELLS / f"{name}.json")
            for m in result.measurements:
                over = decode_over(result, slow, fast) if m.name == fast else "1"
                peak = max(sample.peak_decode_bytes or 0 for sample in m.samples) / 1e6
                rate = statistics.median(m.decode_ts)
                lines.append([m.name, m.n_threads, f"{rate:.1f}", over, f"{peak:.0f}", m.status])
    return {"demo": markdown(["", "threads", "decode tok/s", "x (95 %)", "peak MB", ""], lines)}


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = parser_of(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    measure = commands.add_parser("run")
    measure.add_argument("folder")
    measure.add_argument("dense")
    measure.add_argument("--pairs", type=int, default=12)
    commands.add_parser("table")
    args = parser.parse_args(arguments)
    if args.command == "table":
        return show_tables(HERE, tables())
    run(args.folder, args.dense, args.pairs)


if __name__ == "__main__":
    main()
