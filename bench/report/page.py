"""One self-contained page out of results: numbers first, then plots, quality, texts, and where it all comes from.

The page loads nothing, runs no script, and treats every name and text as text. An INVALID measurement is shown with
its reasons and never enters a ratio.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.judge.planned import integers_alone, planned_speed
from bench.judge.quality import is_quality, read_quality
from bench.judge.wording import (
    amounts,
    as_dict,
    as_float,
    as_list,
    command_line,
    date,
    facts,
    megabytes,
    millions,
    number,
    percent,
    plain,
    threads,
)
from bench.measure.result import Result, read_result
from bench.report.headline import Entry, beside, bought, cards_of, entries_of, pair_of
from bench.report.plots import Figure, decode_rates
from bench.report.quality import Row, sections_of
from bench.report.tables import detail_table, peer_notes
from saap.base.files import parse_json, write_text
from saap.base.quality import QUALITY

STRUCTURES = {
    "query_heads": "query heads", "kv_heads": "KV groups", "ffn": "FFN width", "conv": "conv channels",
    "delta": "delta heads",
}  # fmt: skip
MOST_DRAWN = 24  # measurements in a plot: more rows than one looks at, and minutes of drawing for a thousand


def report(
    results: Sequence[str | Path],
    out: str | Path,
    *,
    run: Mapping[str, object] | None = None,
    history: str | Path | None = None,
) -> Path:
    """Write the page, by rename.

    Args:
        results: documents of ``saap bench --json`` and of ``saap eval --json``; without any the page holds what
            ``run`` tells.
        out: the HTML file.
        run: what ``saap run`` recorded: ``model``, ``steps``, ``plan``, ``quality``, ``parity``, ``texts``,
            ``versions``; every key may be missing.
        history: a folder of results over time (:mod:`bench.report.history`).

    Returns:
        The path of the page.

    Raises:
        ResultError: a result, or a document of the history, cannot be read.
        QualityError: a document of ``saap eval`` cannot be read.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from bench.report.history import series

    out, of_eval = Path(out), {path for path in results if is_quality(path)}
    qualities = [as_dict(parse_json(QUALITY.text(read_quality(path)))) for path in results if path in of_eval]
    documents = [read_result(path) for path in results if path not in of_eval]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    for filter_ in (number, millions, command_line, date, facts, megabytes, plain, percent, threads):
        environment.filters[filter_.__name__] = filter_
    page = environment.get_template("report.html.jinja").render(
        _context(documents, run or {}, qualities), history=[] if history is None else series(Path(history))
    )
    write_text(out, page, errors="replace")  # JSON may hold half a surrogate pair, which no file can
    return out


def _context(results: Sequence[Result], run: Mapping[str, object], qualities: Sequence[Row]) -> Row:
    entries = entries_of(results)
    names = list(dict.fromkeys(entry.measurement.name for entry in entries))
    sections = sections_of(results, run, qualities)
    pair, measured = pair_of(entries), next((section.rows for section in sections if section.measured), [])
    return {
        "title": plain(run.get("model") or " · ".join(names[:3]) or "saap report"),
        "results": results,
        "entries": entries,
        "cards": cards_of(pair, measured),
        "bought": bought(pair, measured),
        "alone": list(filter(None, map(integers_alone, results))),
        "beside": list(filter(None, (bought(each, measured) for each in beside(pair, entries)))),
        "notes": [note for result in results for note in peer_notes(result)],
        "made_for": plain(run.get("device_told") or ""),
        "speeds": _speeds(entries),
        "plan": _plan(run, results),
        "qualities": sections,
        "parity": {name: as_dict(values) for name, values in as_dict(run.get("parity")).items()},
        "silence": plain(run.get("silence") or ""),
        "texts": [
            {"prompt": text.get("prompt"), "outputs": as_dict(text.get("outputs"))}
            for text in map(as_dict, as_list(run.get("texts")))
        ],
        "steps": [
            {"name": step.get("name"), "command": command_line(step.get("command")), "seconds": step.get("seconds")}
            for step in map(as_dict, as_list(run.get("steps")))
        ],
        "versions": {**{k: v for r in results for k, v in r.versions.items()}, **as_dict(run.get("versions"))},
        "unknown": _unknown(entries),
        "details": [detail_table(result) for result in results],
        "several_tests": len({entry.measurement.test for entry in entries}) > 1,
        "several_devices": len({_device_name(result) for result in results}) > 1,
        "device_name": _device_name,
    }


def _speeds(entries: Sequence[Entry]) -> Figure | None:
    known = [entry for entry in entries if entry.measurement.samples]
    if not known:
        return None
    shown = known[:MOST_DRAWN]
    more = f" The first {len(shown)} of {len(known)} are drawn, the tables hold all." if len(known) > len(shown) else ""
    ceilings = [entry.result.ceiling_ts(entry.measurement) for entry in shown]
    rates = "; ".join(f"{entry.name} {number(entry.row['decode_ts'])} tok/s" for entry in shown)
    return Figure(
        "Decode speed",
        "A dot per repetition in the order measured, a bar at the median; hollow dots are INVALID. "
        f"The dashed line is what the probed memory bandwidth allows.{more}",
        f"Decode speed, medians: {rates}",
        decode_rates([entry.measurement for entry in shown], ceilings, [entry.name for entry in shown]),
    )


def _plan(run: Mapping[str, object], results: Sequence[Result]) -> Row:
    plan = as_dict(run.get("plan"))
    sizes: Row = {key: amounts(plan[key]) for key in ("asked", "planned", "achieved") if key in plan}
    speed = next(filter(None, (planned_speed(plan, result) for result in results)), None)
    return sizes | {key: text for key, text in (("speed", speed), ("kept", kept_shares(plan))) if text}


def kept_shares(plan: Mapping[str, object]) -> str | None:
    """Say which share of each structure is left over all layers; None without a record of the dense model's sizes."""
    layers, dense = ([as_dict(layer) for layer in as_list(plan.get(key))] for key in ("layers", "dense_layers"))
    if len(layers) != len(dense):
        return None
    shares = []
    for key, title in STRUCTURES.items():
        left, whole = (sum(as_float(layer.get(key)) or 0.0 for layer in side) for side in (layers, dense))
        if whole > 0:
            shares.append(f"{title} {percent(left / whole)}")
    return ", ".join(shares) or None


def _unknown(entries: Sequence[Entry]) -> dict[str, str]:
    reasons: dict[str, str] = {}
    for entry in entries:
        measurement = entry.measurement
        parts = [measurement.unknown, measurement.model.unknown, *(sample.unknown for sample in measurement.samples)]
        for unknown in (*parts, *(bandwidth.unknown for bandwidth in entry.result.bandwidth)):
            for field, reason in unknown.items():
                reasons.setdefault(field, reason)
    return reasons


def _device_name(result: Result) -> str:
    return plain(result.device.get("board") or result.device.get("cpu_model") or "unknown device")
