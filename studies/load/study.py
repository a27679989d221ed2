"""Bench, compare and report under load: a history of 100,000 results, a page of 1,000.

    python -m studies.load.study                    # the table of SECURITY.md, "Load"
    python -m studies.load.study --history 10000 --page 100

Results are drawn: five models on two devices, twelve repetitions each with 3 % noise, and a step of 10 % in the middle.
They lie in a temporary folder (about 0.5 GB) that is removed at the end.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np

from bench.measure.result import OK, Bandwidth, Measurement, ModelFacts, Result, Sample, write_result
from bench.report.history import add
from studies.common import parser_of

START = datetime(2020, 1, 1, tzinfo=timezone.utc)
FACTS = ModelFacts(134_000_000, 83_000_000, 83_000_000, 23_040, 4, 49152)
MODELS, DEVICES, REPETITIONS, TOKENS = 5, 2, 12, 16


def drawn(index: int, of: int, draw: np.random.Generator) -> Result:
    """The index-th result of a history of ``of``."""
    scale = (1.0 + 0.1 * (index > of // 2)) * (1 + index % MODELS)
    samples = []
    for order, noise in enumerate(draw.normal(1.0, 0.03, (REPETITIONS, TOKENS))):
        token_s = [float(value) for value in 0.01 * scale * noise]
        memory = (10**8, 12 * 10**7, 6 * 10**7, 5 * 10**7)
        samples.append(Sample("2020-01-01T00:00:00+00:00", order, 0.5, [0.2], 0.1, 0.11, token_s, *memory))
    name = f"model-{index % MODELS}"
    m = Measurement(name, f"out/{name}", "onnx", "ab" * 32, FACTS, 128, TOKENS, 1, [0], samples, OK)
    device = {"fingerprint": f"{index // MODELS % DEVICES:016x}", "cpu_model": "a CPU", "board": None}
    created = (START + timedelta(minutes=10 * index)).isoformat()
    return Result(device, [m], [Bandwidth(1, 10**8, [1e10])], ["saap", "bench"], {"saap": "0.1.0"}, created)


def timed(label: str, command: Sequence[object]) -> None:
    """Run a command of saap, print its seconds and peak memory."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "saap.cli", *map(str, command)], check=True, stdout=subprocess.DEVNULL)
    seconds = time.monotonic() - began
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    shown = f"{peak / 1024:.0f}" if peak > before else f"at most {peak / 1024:.0f}"
    print(f"| {label} | {seconds:.1f} s | {shown} MB |", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = parser_of(__doc__)
    parser.add_argument("--history", type=int, default=100_000)
    parser.add_argument("--page", type=int, default=1000)
    given = parser.parse_args(arguments)
    draw = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(prefix="saap-load-") as place:
        folder, page = Path(place) / "history", Path(place) / "page.html"
        results = [Path(place) / f"{index}.json" for index in range(given.page)]
        for index, path in enumerate(results):
            write_result(path, drawn(index, given.page, draw))
        print("| what | time | peak |\n|---|---|---|", flush=True)
        timed("`compare` of two results", ["compare", results[0], results[MODELS * DEVICES]])
        timed(f"`report` of {given.page} results", ["report", *results, "-o", page])
        began = time.monotonic()
        for index in range(given.history):
            add(folder, drawn(index, given.history, draw))
        each = (time.monotonic() - began) / given.history
        print(f"| keeping {given.history} results, each | {1000 * each:.2f} ms | |", flush=True)
        timed(f"`report --history` of {given.history}", ["report", results[0], "--history", folder, "-o", page])
        last = replace(drawn(0, 1, draw), created=datetime.now(timezone.utc).isoformat())
        began = time.monotonic()
        add(folder, last)
        print(f"| keeping one more | {1000 * (time.monotonic() - began):.1f} ms | |", flush=True)


if __name__ == "__main__":
    main()
