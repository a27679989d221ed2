"""Does a measurement beside two busy processes say so, and does a quiet one pass?

    python -m studies.bench.busy MODEL BUNDLE --trials 10

Each trial makes a quick table of costs, a bench and a baseline by the commands themselves, with the threads that they
take by default, once beside two processes that compute without end and once without them. The spread of a bare loop is
noted before the quiet one: where the machine itself is not quiet, the trial says so. It goes on where it stopped.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from studies.bench.study import OUT, append, records
from studies.common import cpu_of, markdown, parser_of, provenance

CELLS = OUT / "busy.jsonl"
QUIET_SPREAD = 0.03
SPIN = "while True: pass"
LENGTHS = ["-p", "64", "-n", "64"]


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    processes = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(count)]
    time.sleep(1)
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def loop_spread(loops: int = 60) -> float:
    """Quartile distance of the times of equal work, over their median; each some 20 ms."""
    times = []
    for _ in range(loops):
        begin = time.perf_counter()
        sum(range(1_000_000))
        times.append(time.perf_counter() - begin)
    low, middle, high = np.percentile(times, [25, 50, 75])
    return float((high - low) / middle)


def saap(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "saap", *map(str, words)], capture_output=True, text=True)


def costs(model: str, bundle: str, folder: Path) -> str:
    done = saap("devices", "costs", model, "--quick", "-o", folder / "cost.json")
    return json.loads((folder / "cost.json").read_text())["status"] if done.returncode == 0 else done.stderr[-300:]


def bench(model: str, bundle: str, folder: Path) -> str:
    saap("bench", bundle, *LENGTHS, "--no-cold", "-r", 5, "--json", folder / "bench.json")
    (measurement,) = json.loads((folder / "bench.json").read_text())["measurements"]
    return str(measurement["status"])


def baseline(model: str, bundle: str, folder: Path) -> str:
    done = saap("devices", "baseline", bundle, *LENGTHS, "-r", 5, "--sessions", 2, "--min-effect", 0.5,
                "--baselines", folder / "kept")  # fmt: skip
    if done.returncode == 0:
        return "OK"
    return "INVALID" if "INVALID" in done.stderr else done.stderr[-300:]


KINDS = {"table of costs": costs, "bench": bench, "baseline": baseline}


def run(model: str, bundle: str, trials: int, counts: Sequence[int]) -> None:
    origin = provenance()
    for name, measure in KINDS.items():
        for busy in counts:
            for _ in range(sum(r["kind"] == name and r["busy"] == busy for r in records(CELLS)), trials):
                spread = loop_spread()
                with neighbours(busy), tempfile.TemporaryDirectory() as folder:
                    began = time.monotonic()
                    status = measure(model, bundle, Path(folder))
                    seconds = round(time.monotonic() - began)
                record = {"kind": name, "busy": busy, "status": status, "seconds": seconds, "spread": round(spread, 4)}
                print(record, flush=True)
                append(CELLS, {**record, **origin})


def busy_table() -> str:
    lines = []
    for name in KINDS:
        cells = [r for r in records(CELLS) if r["kind"] == name]
        busy, quiet = ([r for r in cells if r["busy"] == count] for count in (2, 0))
        still = [r for r in quiet if r["spread"] < QUIET_SPREAD]
        good = sum(r["status"] in ("OK", "WARN") for r in still)
        fine = sum(r["status"] == "OK" for r in still)
        invalid = sum(r["status"] == "INVALID" for r in busy)
        lines.append([name, f"{invalid} of {len(busy)}", f"{fine} of {len(still)}", f"{good} of {len(still)}",
                      f"{np.median([r['seconds'] for r in cells]):.0f}"])  # fmt: skip
    cpus = ", ".join(sorted({cpu_of(r["machine"]) for r in records(CELLS)}))
    heads = ["measurement", "INVALID beside two busy processes", "OK where it is quiet", "OK or WARN there", "seconds"]
    return f"{markdown(heads, lines)}\n\nCPU: {cpus}."


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = parser_of(__doc__)
    parser.add_argument("model")
    parser.add_argument("bundle")
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--busy", type=int, nargs="+", default=[2, 0], help="busy processes beside it")
    args = parser.parse_args(arguments)
    run(args.model, args.bundle, args.trials, args.busy)


if __name__ == "__main__":
    main()
