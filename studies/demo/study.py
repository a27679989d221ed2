"""Measure the speed and memory bars on this machine and print them as rows of a table.

Usage: python -m studies.demo.study out/demo MODEL_DIR [repetitions]

Needs the directory of a finished `saap run`, and the dense model's directory for the transformers peer.
"""

from __future__ import annotations

import statistics
import sys

from bench.judge.comparison import compare_within
from bench.measure.plan import Plan
from bench.measure.run import bench


def speedup(result, base: str, other: str) -> str:
    (row,) = compare_within(result, base, other).rows
    if row.ratio is None:
        return f"not comparable ({row.reason})"
    return f"{1 / row.ratio:.2f}x (95 %: {1 / row.high:.2f} to {1 / row.low:.2f})"


def main(run: str, dense: str, repetitions: int = 12) -> None:
    specs, names = [f"{run}/dense-int4", f"{run}/slim-int4"], ["dense-int4", "slim-int4"]
    pairs = bench(specs, Plan(threads=1, repetitions=repetitions, cold=False), names=names)
    print(f"| 20 %-pruned against dense, int4, 1 thread, {repetitions} pairs | {speedup(pairs, *names)} |")
    peers = bench(
        [specs[0], f"torch:{dense}"], Plan(threads=2, repetitions=5, cold=False), names=["dense-int4", "transformers"]
    )
    print(
        f"| dense int4 against transformers fp32, 2 threads, 5 pairs | {speedup(peers, 'transformers', 'dense-int4')} |"
    )
    peak = max(sample.peak_decode_bytes for sample in peers.measurements[0].samples)
    print(f"| peak memory of the worker, dense int4, 2 threads | {peak / 1e6:.0f} MB |")
    for result in (pairs, peers):
        for m in result.measurements:
            rate = statistics.median(m.decode_ts)
            print(f"<!-- {m.name}, {m.n_threads} threads: {rate:.1f} tok/s, {m.status} {m.reasons} -->")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:4]))
