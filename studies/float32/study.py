"""Float32 products by oneDNN against MKL (saap.system.precision), as ratios of alternating runs.

    python -m studies.float32.study products     # a minute: products of several sizes, with the error of each way
    python -m studies.float32.study prune        # `saap prune` of SmolLM2 on 16 sequences, in processes of its own

Threads are those of OMP_NUM_THREADS. On a processor where saap leaves products to MKL both ways are the same.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from saap.system.precision import fast_float32
from studies.common import parser_of

SIZES = ((256, 576, 1536), (256, 1536, 576), (256, 576, 49152), (128, 4096, 11008), (1280, 4096, 11008))
ROUNDS = 8
LEFT = "import saap.system.precision as p; p._mkl_is_slow = lambda _: False; "  # to MKL
MAIN = "import sys; from saap.cli.main import main; sys.argv[0] = 'saap'; main()"


def products() -> None:
    """Median GFLOP/s of both ways, and the largest error relative to the largest number."""
    print("| rows x inputs x outputs | MKL, GFLOP/s | oneDNN, GFLOP/s | ratio | error, MKL | error, oneDNN |")
    print("|---|---|---|---|---|---|")
    for rows, inputs, outputs in SIZES:
        x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
        expected = x.double() @ weight.double().t()
        seconds: tuple[list[float], list[float]] = ([], [])
        errors = [0.0, 0.0]
        for _ in range(ROUNDS + 1):
            for way, switch in enumerate((nullcontext, fast_float32)):
                with switch():
                    began = time.perf_counter()
                    found = torch.nn.functional.linear(x, weight)
                    seconds[way].append(time.perf_counter() - began)
                errors[way] = ((found - expected).abs().max() / expected.abs().max()).item()
        rates = [2e-9 * rows * inputs * outputs / statistics.median(each[1:]) for each in seconds]
        told = f"{rates[0]:.0f} | {rates[1]:.0f} | {rates[1] / rates[0]:.2f} | {errors[0]:.1e} | {errors[1]:.1e}"
        print(f"| {rows} x {inputs} x {outputs} | {told} |", flush=True)


def prune(model: str, pairs: int) -> None:
    """Seconds of the whole command both ways in turn, each with an empty cache of scores."""
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        from saap.models.resolve import resolve

        source = resolve(model)
        for pair in range(pairs):
            taken = []
            for way in (LEFT, ""):
                place = Path(folder) / f"{pair}-{len(taken)}"
                command = [sys.executable, "-c", way + MAIN, "prune", str(source), "-o", str(place / "slim"),
                           "--ratio", "0.1", "--sequences", "16"]  # fmt: skip
                began = time.monotonic()
                run = subprocess.run(
                    command, check=False, capture_output=True, text=True,
                    env={**os.environ, "XDG_CACHE_HOME": str(place)},
                )  # fmt: skip
                if run.returncode:
                    raise SystemExit(run.stderr[-600:])
                taken.append(time.monotonic() - began)
            ratios.append(taken[0] / taken[1])
            print(f"MKL {taken[0]:.1f} s, oneDNN {taken[1]:.1f} s: {ratios[-1]:.2f}x", flush=True)
    print(f"median of {pairs} pairs: {statistics.median(ratios):.2f}x")


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = parser_of(__doc__)
    parser.add_argument("what", choices=["products", "prune"])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--pairs", type=int, default=3)
    given = parser.parse_args(arguments)
    if given.what == "products":
        products()
    else:
        prune(given.model, given.pairs)


if __name__ == "__main__":
    main()
