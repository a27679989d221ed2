"""The table of a result: medians over repetitions for people and machines."""

from __future__ import annotations

from typing import Any

from bench.result import Result
from bench.stats import summarize

TABLE_HEADER = (
    "name", "threads", "prefill tok/s", "decode tok/s", "decode IQR", "first token ms",
    "peak load MB", "peak decode MB", "model MB", "% of ceiling", "status",
)  # fmt: skip


def table_rows(result: Result) -> list[dict[str, Any]]:
    """One row per measurement in base units; medians over repetitions, peaks as maxima, None where unknown."""
    rows = []
    for m in result.measurements:
        prefill, decode, ttft = summarize(m.prefill_ts), m.decode, summarize([s.ttft_s for s in m.samples if s.ttft_s])
        ceiling = result.ceiling_ts(m)
        rows.append(
            {
                "name": m.name,
                "n_threads": m.n_threads,
                "prefill_ts": prefill.median if prefill else None,
                "decode_ts": decode.median if decode else None,
                "decode_q1": decode.q1 if decode else None,
                "decode_q3": decode.q3 if decode else None,
                "ttft_s": ttft.median if ttft else None,
                "peak_load_bytes": m.peak("peak_load_bytes"),
                "peak_decode_bytes": m.peak("peak_decode_bytes"),
                "model_bytes": m.model.model_bytes,
                "ceiling_ts": ceiling,
                "ceiling_fraction": decode.median / ceiling if decode and ceiling else None,
                "status": m.status,
                "reasons": m.reasons,
            }
        )
    return rows


def table_text(result: Result) -> list[list[str]]:
    """The rows as text in the order of ``TABLE_HEADER``; MB are 10^6 bytes, unknown is '-'."""

    def show(value: float | None, scale: float = 1.0, digits: int = 1) -> str:
        return "-" if value is None else f"{value * scale:.{digits}f}"

    return [
        [
            row["name"],
            str(row["n_threads"]),
            show(row["prefill_ts"]),
            show(row["decode_ts"]),
            "-" if row["decode_q1"] is None else f"{row['decode_q1']:.1f}-{row['decode_q3']:.1f}",
            show(row["ttft_s"], 1e3),
            show(row["peak_load_bytes"], 1e-6),
            show(row["peak_decode_bytes"], 1e-6),
            show(row["model_bytes"], 1e-6),
            show(row["ceiling_fraction"], 100, 0),
            row["status"],
        ]
        for row in table_rows(result)
    ]
