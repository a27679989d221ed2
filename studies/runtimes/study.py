"""The fastest engine of a bundle, by kind of CPU, against llama.cpp at its best.

    saap bench dense-int4 SLIM SLIM@llama.cpp llama.cpp:dense-Q4_0.gguf -t 1,2 -r 6 --ratio-time 60 --json result.json
    python -m studies.runtimes.study keep result.json    # into cells/ and results/
    python -m studies.runtimes.study table --write

A cell says where a result of `saap bench` was made.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePath

from bench.measure.result import RESULT, Measurement, Result, read_result
from studies.common import Cell, add_write_option, cpu_of, markdown, parser_of, provenance, read_cells, show_tables

FOLDER = Path(__file__).parent


def rows_of(cell: Cell) -> Iterator[list[str]]:
    """A row for each model and number of threads; ratios are against the fastest row of llama.cpp's own files."""
    result, place = result_of(cell), cpu_of(cell["machine"])
    for threads in sorted({m.n_threads for m in result.measurements}):
        these = [m for m in result.measurements if m.n_threads == threads]
        for m in these:
            speeds = [against(result, m, rival(these, what), what) for what in ("decode", "prefill")]
            pure = against(result, m, rival(these, "decode", pure=True), "decode")
            peak = m.peak("peak_decode_bytes")
            yield [
                place, str(threads), m.name, f"{m.decode.median:.0f}" if m.decode else "-", speeds[0], pure,
                f"{middle(m.prefill_ts):.0f}", speeds[1], "-" if peak is None else f"{peak / 1e6:.0f}",
            ]  # fmt: skip


def result_of(cell: Cell) -> Result:
    return read_result(FOLDER / "results" / cell["result"])


def without_folders(result: Result) -> Result:
    """Shorten paths to their last parts, so that no folder of the machine is published."""
    measurements = [replace(m, spec=PurePath(m.spec).name) for m in result.measurements]
    return replace(result, measurements=measurements, command=[PurePath(word).name for word in result.command])


def middle(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def rival(these: Sequence[Measurement], what: str, *, pure: bool = False) -> Measurement | None:
    """The row of llama.cpp's own file, with an 8-bit head or pure, that is fastest in this."""
    own = [m for m in these if m.kind == "llama.cpp" and m.bundle_hash is None and m.samples]
    own = [m for m in own if ("pure" in m.name) == pure]
    return max(own, key=lambda m: middle(m.decode_ts if what == "decode" else m.prefill_ts), default=None)


def against(result: Result, mine: Measurement, other: Measurement | None, what: str) -> str:
    """Return the ratio of speeds by turns; empty for the rival itself."""
    if other is None or mine is other:
        return ""
    ratio = result.ratio(mine, other, what)
    return "-" if ratio is None else f"{ratio.ratio:.2f}x ({ratio.low:.2f} to {ratio.high:.2f})"


def tables() -> dict[str, str]:
    """The tables of README.md."""
    cells = [cell for cell in read_cells(FOLDER / "cells") if "result" in cell]
    heads = ["CPU", "threads", "model", "decode tok/s", "of Q4_0", "of pure", "prefill tok/s", "of Q4_0", "peak MB"]
    return {"speed": markdown(heads, [row for cell in cells for row in rows_of(cell)])}


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = parser_of(__doc__)
    parser.add_argument("do", choices=["keep", "table"])
    parser.add_argument("result", nargs="?", type=Path, help="of saap bench")
    add_write_option(parser)
    args = parser.parse_args(arguments)
    if args.do == "keep":
        if args.result is None:
            parser.error("give RESULT")
        name = time.strftime("%Y%m%d-%H%M%S")
        result = without_folders(read_result(args.result))
        place = FOLDER / "results" / f"{name}.json"
        place.write_text(RESULT.text(result, indent=None) + "\n", encoding="utf-8")
        cell = {**provenance(), "result": place.name, "bench": result.command}
        (FOLDER / "cells" / f"{name}.json").write_text(json.dumps(cell, indent=1) + "\n", encoding="utf-8")
    show_tables(FOLDER, tables(), args.write)


if __name__ == "__main__":
    main()
