"""The headline of a report: which two measurements are set against each other, and the cards that say so."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from bench.judge.comparison import decisive_values, metric_of
from bench.judge.quality import perplexity_ratio
from bench.judge.wording import TIMES, UNKNOWN, as_dict, as_float, as_list, megabytes, number, percent, plain, threads
from bench.measure.result import INVALID, Measurement, Result
from bench.measure.statistics import bootstrap_ratio
from bench.report.tables import Row, table_rows


@dataclass(frozen=True)
class Entry:
    """A measurement with the result that it belongs to and the name under which the page shows it."""

    result: Result
    measurement: Measurement
    row: Row
    name: str


@dataclass(frozen=True)
class Card:
    """A headline number: the candidate's value, and how it stands to the baseline's."""

    title: str
    value: str
    unit: str
    rows: list[tuple[str, str]]  # name and value of baseline and candidate
    ratio: str | None = None  # candidate / baseline
    refused: str | None = None  # why there is no ratio, or why the value is not to be believed
    gain: bool = False  # the ratio is of something that was to change
    note: str = ""
    worse: bool = False  # the candidate is worse than the baseline


def entries_of(results: Sequence[Result]) -> list[Entry]:
    """All measurements in order; the test and the thread count join the name where they vary."""
    tests, widths = ({getattr(m, name) for r in results for m in r.measurements} for name in ("test", "n_threads"))

    def name(m: Measurement) -> str:
        return ", ".join([m.name, *([m.test] * (len(tests) > 1)), *([threads(m.n_threads)] * (len(widths) > 1))])

    return [
        Entry(result, m, row, name(m))
        for result in results
        for m, row in zip(result.measurements, table_rows(result), strict=True)
    ]


def _quality_of(entry: Entry, quality: Sequence[Mapping[str, object]]) -> Mapping[str, object]:
    """Find the row of the measured model, by the name (path) that `saap eval` gave; empty where that is not clear.

    `saap bench` names the last part of a path, so the paths themselves come first; last parts count where they are one
    model's.
    """
    rows = {plain(row.get("name")): row for row in quality}
    spec, name = plain(entry.measurement.spec), plain(entry.measurement.name)
    short = [each for each in rows if PurePath(each).name == PurePath(spec).name == name]
    names = (spec, spec.partition(":")[2], name, *(short if len(short) == 1 else ()))
    return next((rows[each] for each in names if each in rows), {})


def pair_of(entries: Sequence[Entry]) -> tuple[Entry, Entry] | None:
    """Baseline and candidate: two bundles of one result with equal settings.

    The baseline is the one whose name says dense, else the first; the candidate is the first other one. A lone
    measurement is its own baseline.
    """

    measured = [entry for entry in entries if entry.measurement.samples]
    bundles = [entry for entry in measured if entry.measurement.kind == "onnx"]
    # One spec twice is there for the noise floor.
    pool = bundles if len({entry.measurement.spec for entry in bundles}) > 1 else measured
    for baseline in sorted(pool, key=lambda entry: "dense" not in entry.measurement.name.lower()):
        for candidate in pool:
            other = candidate.measurement.spec != baseline.measurement.spec
            if other and _settings(candidate) == _settings(baseline):
                return baseline, candidate
    return (pool[0], pool[0]) if pool else None


def beside(pair: tuple[Entry, Entry] | None, entries: Sequence[Entry]) -> list[tuple[Entry, Entry]]:
    """Pair the candidate, in each of its engines, with what a user would otherwise take: another runtime's own."""
    if pair is None or pair[1].measurement.kind != "onnx":
        return []
    mine, others = pair[1].measurement.bundle_hash, list[Entry]()
    for entry in entries:
        m = entry.measurement
        # Of a peer with settings of its own, the first row is the one that is fastest in decode.
        known = m.spec in {other.measurement.spec for other in others}
        if m.kind != "onnx" and m.samples and _settings(entry) == _settings(pair[1]) and not known:
            others.append(entry)
    by_us = [pair[1], *(entry for entry in others if mine and entry.measurement.bundle_hash == mine)]
    return [(other, each) for other in others if other not in by_us for each in by_us]


def _settings(entry: Entry) -> tuple[object, ...]:
    return id(entry.result), *entry.measurement.key[1:]


def cards_of(pair: tuple[Entry, Entry] | None, quality: Sequence[Mapping[str, object]]) -> list[Card]:
    cards = []
    if pair:
        refused = _refused(*pair)
        sizes = [entry.measurement.model.model_bytes for entry in pair]
        peaks = [entry.measurement.peak("peak_decode_bytes") for entry in pair]
        cards = [
            _bytes_card(pair, "Size", sizes, "weights and graph on disk"),
            _speed_card(*pair, refused),
            _bytes_card(pair, "Memory", peaks, "peak of the process while decoding", refused),
        ]
    quality_card = _quality_card(pair, quality)
    return [*cards, quality_card] if quality_card else cards


def _bytes_card(
    pair: tuple[Entry, Entry], title: str, sizes: Sequence[int | None], note: str, refused: str | None = None
) -> Card:
    (old, new), (before, after) = pair, sizes
    ratio = _ratio(before, after) if old is not new and not refused else None
    rows = _rows(old, megabytes(before), new, megabytes(after))
    return Card(
        title, megabytes(after), "MB", rows, ratio, refused, True, note, bool(ratio) and is_worse(before, after)
    )


def _speed_card(old: Entry, new: Entry, refused: str | None) -> Card:
    metric = metric_of(new.measurement)
    before, after = number(old.row[f"{metric}_ts"]), number(new.row[f"{metric}_ts"])
    note = f"{metric}, median of {len(new.measurement.samples)}, {threads(new.measurement.n_threads)}"
    ratio = None
    if (speed := _speed_of(old, new, refused)) is not None:
        middle, low, high = speed
        ratio = f"{middle:.2f}{TIMES}"
        bounded = math.isfinite(high)
        note += f"; 95 % interval {low:.2f}{UNKNOWN}{high:.2f}" if bounded else "; one repetition, spread unknown"
    worse = speed is not None and speed[2] < 1
    return Card("Speed", after, "tok/s", _rows(old, before, new, after), ratio, refused, True, note, worse)


def _speed_of(old: Entry, new: Entry, refused: str | None) -> tuple[float, float, float] | None:
    """Return how many times as fast the candidate is, with the 95 % interval; as `saap bench` says it of the pair.

    Turns in bursts stand beside what is INVALID.
    """
    if old is new:
        return None
    if turns := old.result.ratio(new.measurement, old.measurement, metric_of(new.measurement)):
        return turns.ratio, turns.low, turns.high
    if refused:
        return None
    return bootstrap_ratio(*decisive_values(new.measurement, old.measurement), paired=True)


def bought(pair: tuple[Entry, Entry] | None, quality: Sequence[Mapping[str, object]]) -> str | None:
    """Say in one sentence what the candidate gains over the baseline, and what it costs; None without two of them."""
    if pair is None or pair[0] is pair[1]:
        return None
    old, new = pair
    speed = _speed_of(old, new, _refused(old, new))
    worse = " (worse)" if speed and speed[2] < 1 else ""
    gains = [f"{speed[0]:.2f}x as fast{worse} with {threads(new.measurement.n_threads)}"] if speed else []
    before, after = (entry.measurement.model.model_bytes for entry in pair)
    if before and after:
        gains.append(f"{abs(1 - after / before):.0%} {'smaller' if after <= before else 'larger'}")
    rows = [_quality_of(entry, quality) for entry in pair]
    costs = None
    for key, what, digits in (("perplexity", "perplexity", 1), ("kl", "KL to dense", 3)):
        values = [as_float(row.get(key)) for row in rows]
        if costs is None and None not in values:
            worse = " (worse)" if is_worse(*values) else ""
            costs = f"{what} {number(values[1], digits)} instead of {number(values[0], digits)}{worse}"
            costs += _ratio_of_windows(*rows) if key == "perplexity" else ""
    summary = "; ".join(filter(None, (" and ".join(gains), costs)))
    return f"{new.measurement.name} against {old.measurement.name}: {summary}" if summary else None


def _ratio_of_windows(old: Mapping[str, object], new: Mapping[str, object]) -> str:
    """Say how many times the perplexity is the other one; nothing where the windows were not kept."""
    before, after = ([as_float(value) or 0.0 for value in as_list(row.get("window_nll"))] for row in (old, new))
    nll = as_float(old.get("nll"))
    if not nll or len(before) != len(after) or len(before) < 2:
        return ""
    ratio, low, high = perplexity_ratio(before, after, predictions=sum(before) / nll)
    return f", {ratio:.2f}{TIMES} (95 % interval {low:.2f}{UNKNOWN}{high:.2f})"


def bought_by(result: Result, quality: Mapping[str, object]) -> str | None:
    """:func:`bought` of one bench, with a document of ``saap eval``."""
    return bought(pair_of(entries_of([result])), [as_dict(row) for row in as_list(quality.get("rows"))])


def _quality_card(pair: tuple[Entry, Entry] | None, rows: Sequence[Mapping[str, object]]) -> Card | None:
    if not rows:
        return None
    known = [row for entry in pair or () if (row := _quality_of(entry, rows))]
    old, new = (known[0], known[-1]) if known else (rows[0], rows[-1])
    top1 = as_float(new.get("top1"))
    note = "" if top1 is None else f"{percent(top1)} same top token as the dense model"
    before, after = as_float(old.get("perplexity")), as_float(new.get("perplexity"))
    if after is not None:
        shown = [new] if old is new else [old, new]
        values = [(plain(row.get("name")), number(row.get("perplexity"))) for row in shown]
        ratio = _ratio(before, after) if old is not new else None
        return Card("Quality", number(after), "perplexity", values, ratio, note=note, worse=is_worse(before, after))
    if (kl := as_float(new.get("kl"))) is not None:
        return Card("Quality", number(kl, 3), "nats", [(plain(new.get("name")), "KL to dense")], note=note)
    return None


def _rows(old: Entry, before: str, new: Entry, after: str) -> list[tuple[str, str]]:
    return [(new.name, after)] if old is new else [(old.name, before), (new.name, after)]


def _ratio(before: float | None, after: float | None) -> str | None:
    return f"{after / before:.2f}{TIMES}" if before and after else None


def is_worse(before: float | None, after: float | None) -> bool:
    """Whether a size, a perplexity or a loss grew by 2 % or more, the smallest change that counts by default."""
    return before is not None and after is not None and after > 1.02 * before


def _refused(old: Entry, new: Entry) -> str | None:
    invalid = list(dict.fromkeys(entry.name for entry in (old, new) if entry.measurement.status == INVALID))
    return f"no ratio: {' and '.join(invalid)} INVALID" if invalid else None
