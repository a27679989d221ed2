"""What memory costs while a prompt is read and while a model is tuned: `saap` commands, watched from outside.

    python -m studies.memory.study prompt out/demo/dense-int4 out/demo/slim-int4     # after `make demo`
    python -m studies.memory.study tune SLIM --teacher smollm2-135m                  # one run; system time, page faults
    python -m studies.memory.study table

A cell is a JSON document in cells/. To compare two versions, run both and keep both cells (`--name`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench.measure.result import read_result
from bench.report.tables import table_rows
from studies.common import Cell, markdown, parser_of, provenance, read_cells, saap, show_tables

HERE = Path(__file__).resolve().parent
CELLS = HERE / "cells"
LENGTHS = (128, 512, 2000)  # of prompts


def prompt(bundles: list[str], lengths: Sequence[int] = LENGTHS, repetitions: int = 3) -> list[Cell]:
    """Peak and prefill of each bundle by the length of the prompt."""
    rows = []
    for length in lengths:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "result.json"
            words = ["bench", *bundles, "-p", str(length), "-n", "32", "-r", str(repetitions), "--no-cold", "-t", "1"]
            saap(*words, "--json", out)
            found = table_rows(read_result(out))
        kept = ("name", "n_prompt", "prefill_ts", "peak_decode_bytes", "anonymous_bytes", "status")
        rows += [{key: row[key] for key in kept} for row in found]
    return rows


def tune(slim: str, teacher: str, tokens: int = 8192) -> list[Cell]:
    """Seconds, page faults, seconds in the system and peak of one `saap tune`."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["tune", slim, "-o", f"{folder}/tuned", "--teacher", teacher, "--tokens", str(tokens)]
        began = time.monotonic()
        process = subprocess.Popen([sys.executable, "-m", "saap.cli", *words])
        _, status, used = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"saap {' '.join(words)} failed")
        seconds = time.monotonic() - began
    faults, system, peak = used.ru_minflt, used.ru_stime, 1024 * used.ru_maxrss
    return [{"seconds": seconds, "page_faults": faults, "system_s": system, "peak_bytes": peak, "tokens": tokens}]


def tables() -> dict[str, str]:
    """The cells that are there."""
    cells = read_cells(CELLS)
    found = {}
    for what in ("prompt", "tune"):
        rows = [{"cell": cell["name"], **row} for cell in cells if cell["what"] == what for row in cell["rows"]]
        if rows:
            found[what] = markdown(list(rows[0]), [list(row.values()) for row in rows])
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = parser_of(__doc__)
    commands = parser.add_subparsers(dest="what", required=True)
    prompts = commands.add_parser("prompt")
    prompts.add_argument("bundles", nargs="+")
    tuning = commands.add_parser("tune")
    tuning.add_argument("slim")
    tuning.add_argument("--teacher", required=True)
    for command in (prompts, tuning):
        command.add_argument("--name", default="now", help="of the cell")
    commands.add_parser("table")
    given = parser.parse_args(arguments)
    if given.what == "table":
        return show_tables(HERE, tables())
    rows = prompt(given.bundles) if given.what == "prompt" else tune(given.slim, given.teacher)
    cell = {"name": given.name, "what": given.what, "rows": rows, **provenance()}
    CELLS.mkdir(exist_ok=True)
    (CELLS / f"{given.what}-{given.name}.json").write_text(json.dumps(cell, indent=1) + "\n")


if __name__ == "__main__":
    main()
