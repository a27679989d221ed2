"""The tables of a result: medians over repetitions, for people and machines."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec

from bench.judge.wording import as_dict, as_float, as_list, number
from bench.measure.pilots import Pilot, sentence
from bench.measure.result import Measurement, Result
from bench.measure.statistics import percentile, summarize
from bench.power.sensors import NO_SENSOR

_MARKS = re.compile(r"([\\`*_\[\]~$])")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;"}

# What llama.cpp's system line calls the features that decide which of its kernels run.
IN_LLAMA_CPP = {
    "avx2": "AVX2", "fma": "FMA", "f16c": "F16C", "avx_vnni": "AVX_VNNI", "avx512_vnni": "AVX512_VNNI",
    "amx_int8": "AMX_INT8", "dotprod": "DOTPROD", "i8mm": "MATMUL_INT8", "sve": "SVE",
}  # fmt: skip

# Which columns go first where a screen is narrow.
LEAST = (
    "available drop MB", "PSS MB", "files MB", "private MB", "warm-up steps", "cold load ms", "p90 ms", "read GB/s",
    "peak load MB", "decode IQR", "% of ceiling", "first token ms", "KV MB", "model MB",
)  # fmt: skip

Row = dict[str, str | int | float | list[str] | None]
Column = tuple[str, Callable[[Row], str]]


class Table(NamedTuple):
    """Text of a table; unknown is '-'."""

    header: list[str]
    rows: list[list[str]]


def table_rows(result: Result) -> list[Row]:
    """One row per measurement in base units; medians over repetitions, peaks as maxima, None where unknown."""
    return [_row(result, m) for m in result.measurements]


def main_table(result: Result) -> Table:
    """Return the main numbers; the test stands in it where there are several, energy where a sensor was read."""
    rows = table_rows(result)
    columns = [
        _name,
        *_test(rows),
        _threads,
        _number("prefill tok/s", "prefill_ts"),
        _number("decode tok/s", "decode_ts"),
        ("decode IQR", _quartiles),
        *_where_known(rows, _number("ms/ char", "character_s", 1e3, 2), "character_s"),
        _number("first token ms", "ttft_s", 1e3),
        _number("peak load MB", "peak_load_bytes", 1e-6),
        _number("peak decode MB", "peak_decode_bytes", 1e-6),
        _number("% of ceiling", "ceiling_fraction", 100, 0),
        *_where_known(rows, ("J/ token", _joules), "joules_per_token"),
        ("status", lambda row: str(row["status"])),
    ]
    return _table(rows, columns)


def detail_table(result: Result) -> Table:
    """Return loads, percentiles of single steps, bandwidth, and where the memory is."""
    rows = table_rows(result)
    columns = [
        _name,
        *_test(rows),
        _threads,
        _number("warm-up steps", "warmup_steps", 1.0, 0),
        _number("load ms", "load_s", 1e3, 0),
        _number("cold load ms", "cold_load_s", 1e3, 0),
        _number("token p50 ms", "step_p50_s", 1e3, 2),
        _number("p90 ms", "step_p90_s", 1e3, 2),
        _number("p99 ms", "step_p99_s", 1e3, 2),
        _number("read GB/s", "achieved_bytes_per_s", 1e-9),
        _number("private MB", "anonymous_bytes", 1e-6),
        _number("files MB", "file_bytes", 1e-6),
        _number("PSS MB", "pss_bytes", 1e-6),
        _number("available drop MB", "available_drop_bytes", 1e-6),
        *_where_known(rows, _number("GPU MB", "gpu_bytes", 1e-6), "gpu_bytes"),
        _number("KV MB", "kv_bytes", 1e-6),
        _number("model MB", "model_bytes", 1e-6),
    ]
    return _table(rows, columns)


def energy_notes(result: Result) -> list[str]:
    """Name the energy's sensor and what it covers; or why there is none, where a sensor could not be used."""
    power = as_dict(result.settings.get("power"))
    reasons = [str(reason) for reason in as_list(power.get("reasons"))]
    if power.get("source") is None:
        return [f"no energy: {reason}" for reason in reasons if reason != NO_SENSOR]
    samples = [s for m in result.measurements for s in m.samples]
    note = f"energy: {power['source']}, {power['scope']}: {power['covers']}"
    if not any(s.energy for s in samples):
        why = next((s.unknown["energy"] for s in samples if "energy" in s.unknown), "nothing was measured")
        return [f"no energy of {power['source']}: {why}"]
    idle = _median([s.energy.idle_w for s in samples if s.energy])
    estimate = "an estimate, " if power.get("estimate") else ""
    at_rest = "idle power unknown" if idle is None else f"idle {idle:.2f} W included"
    return [f"{note} ({estimate}{at_rest})", *(f"passed over: {reason}" for reason in reasons)]


def peer_notes(result: Result) -> list[str]:
    """Say which characters and which of its own settings each peer was measured with, and what it was built without."""
    pilots = [sentence(msgspec.convert(each, Pilot)) for each in as_list(result.settings.get("pilots"))]
    return [*spelling_notes(result), *pilots, *filter(None, [built_without(result)])]


def spelling_notes(result: Result) -> list[str]:
    """Name the text of the times per character, where models write it in different numbers of tokens."""
    known = {m.name: m.model.spelling for m in result.measurements if m.model.spelling and m.character_s}
    if len({each.characters_per_token for each in known.values()}) < 2:
        return []
    each = ", ".join(f"{name} {spelling.characters_per_token:.2f}" for name, spelling in known.items())
    texts = " and ".join(dict.fromkeys(spelling.text for spelling in known.values()))
    return [f"ms per character are of {texts}; characters per token: {each}"]


def built_without(result: Result) -> str | None:
    """Name what llama.cpp's own system line lacks of what this CPU has; None: nothing, or there is no such line."""
    line, has = result.versions.get("llama.cpp system"), as_list(result.device.get("isa"))
    missing = [name for feature, name in IN_LLAMA_CPP.items() if line and feature in has and f"{name} = 1" not in line]
    if not missing:
        return None
    return (
        f"llama.cpp was built without {', '.join(missing)}, which this CPU has, and is slower for it: build it here "
        f"(pip install --no-binary llama-cpp-python llama-cpp-python); it says: {line}"
    )


def markdown(table: Table) -> str:
    """Write a table of GitHub's Markdown, in which every cell is plain text."""
    lines = [table.header, ["---"] * len(table.header), *([markdown_cell(c) for c in row] for row in table.rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def markdown_cell(text: str) -> str:
    """Text that stays text in a table of GitHub's Markdown: no markup, no column, no line of its own."""
    text = "".join(character if character.isprintable() else "?" for character in text)
    return re.sub(r"[&<>|]", lambda mark: _ENTITIES[mark[0]], _MARKS.sub(r"\\\1", text))


def _row(result: Result, m: Measurement) -> Row:
    decode, ceiling, needed = m.decode, result.ceiling_ts(m), m.bytes_per_token
    row: Row = {
        "name": m.name,
        "test": m.test,
        "n_prompt": m.n_prompt,
        "n_gen": m.n_gen,
        "n_depth": m.n_depth,
        "n_threads": m.n_threads,
        "provider": m.provider,
        "repetitions": len(m.samples),
        "prefill_ts": _median(m.prefill_ts),
        "decode_ts": decode.median if decode else None,
        "decode_q1": decode.q1 if decode else None,
        "decode_q3": decode.q3 if decode else None,
        "character_s": _median(m.character_s),
        **{f"step_p{percent}_s": percentile(m.steps_s, percent) for percent in (50, 90, 99)},
        "ttft_s": _median([s.ttft_s for s in m.samples]),
        "warmup_steps": _median([len(s.warmup_s) for s in m.samples]),
        "load_s": _median([s.load_s for s in m.samples]),
        "cold_load_s": m.cold_load_s,
    }
    for name in ("peak_load", "peak_decode", "anonymous", "file", "pss", "available_drop", "gpu"):
        row[f"{name}_bytes"] = m.peak(f"{name}_bytes")
    return row | {
        "kv_bytes": m.kv_bytes,
        "model_bytes": m.model.model_bytes,
        "bytes_per_token": needed,
        "achieved_bytes_per_s": decode.median * needed if decode and needed is not None else None,
        "ceiling_ts": ceiling,
        "ceiling_fraction": decode.median / ceiling if decode and ceiling else None,
        "joules_per_token": _median(m.joules_per_token),
        "energy_scope": next((s.energy.scope for s in m.samples if s.energy), None),
        "energy_estimate": next((s.energy.estimate for s in m.samples if s.energy), None),
        "status": m.status,
        "reasons": m.reasons,
    }


def _median(values: Sequence[float | None]) -> float | None:
    summary = summarize([value for value in values if value is not None])
    return summary.median if summary else None


_name: Column = ("name", lambda row: str(row["name"]))
_threads: Column = ("threads", lambda row: str(row["n_threads"]))


def _test(rows: Sequence[Row]) -> list[Column]:
    return [("test", lambda row: str(row["test"]))] if len({row["test"] for row in rows}) > 1 else []


def _where_known(rows: Sequence[Row], column: Column, key: str) -> list[Column]:
    return [column] if any(row[key] is not None for row in rows) else []


def _number(header: str, key: str, scale: float = 1.0, digits: int = 1) -> Column:
    return header, lambda row: "-" if (value := as_float(row[key])) is None else f"{value * scale:.{digits}f}"


def _joules(row: Row) -> str:
    _, joules = _number("", "joules_per_token", digits=3)
    return ("~" if row["energy_estimate"] and row["joules_per_token"] is not None else "") + joules(row)


def _quartiles(row: Row) -> str:
    return "-" if row["decode_q1"] is None else f"{number(row['decode_q1'])}-{number(row['decode_q3'])}"


def _table(rows: Sequence[Row], columns: Sequence[Column]) -> Table:
    return Table([header for header, _ in columns], [[cell(row) for _, cell in columns] for row in rows])
