"""The measuring process of a remote run: ``python -m bench.remote.job FOLDER`` on the board.

``FOLDER/job.json`` holds what to do; lines of JSON on standard output say how far it is, and ``FOLDER/result.json`` is
what :func:`bench.measure.run.measure`, :func:`bench.costs.measure.measure_costs` or
:func:`bench.remote.facts.probe_facts` returned there, so that a number means what a local one means.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Literal

import msgspec

from bench.costs.measure import measure_costs, write_costs
from bench.costs.options import CostsOptions
from bench.measure.options import BenchOptions
from bench.measure.result import write_result
from bench.measure.run import measure
from bench.remote.facts import probe_facts
from saap.base.files import write_text

EVERY_S = 1.0  # between two lines: a board is not kept busy by telling


class Job(msgspec.Struct):
    """``job.json``: the folder below ``bundles`` of each spec, and how to measure."""

    kind: Literal["bench", "costs", "probe"]
    specs: list[str]
    options: dict[str, object]
    names: list[str] | None = None


def main(folder: Path) -> int:
    """Measure; the exit code, 2 where the request cannot be measured there."""
    signal.signal(signal.SIGTERM, _end)
    job = msgspec.convert(json.loads((folder / "job.json").read_text(encoding="utf-8")), Job)
    specs, out = [str(folder / "bundles" / place) for place in job.specs], folder / "result.json"
    last = 0.0

    def progress(label: str, done: float, total: float) -> None:
        nonlocal last
        if done >= total or time.monotonic() - last >= EVERY_S:
            last = time.monotonic()
            _tell({"label": label, "done": done, "total": total})

    try:
        if job.kind == "bench":
            options = msgspec.convert(job.options, BenchOptions)
            write_result(out, measure(specs, options, names=job.names, progress=progress))
        elif job.kind == "probe":
            write_text(out, json.dumps(asdict(probe_facts(bool(job.options["bandwidth"])))))
        else:
            asked = msgspec.convert(job.options, CostsOptions)
            write_costs(out, measure_costs([Path(stack) for stack in specs], asked, progress=progress))
    except Exception as error:
        if getattr(error, "exit_code", None) is None:
            raise
        _tell({"refused": str(error).replace(f"{folder}/bundles/", "")})
        return 2
    return 0


def _tell(document: dict[str, object]) -> None:
    print(json.dumps(document), flush=True)


def _end(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)  # by an exception, so that a worker that runs is ended too


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
