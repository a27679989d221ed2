"""One JSON document per bench run: what was measured, where, how, raw samples, and whether it may be believed.

Base units (seconds, bytes, tokens per second). Unknown is null, never 0, and ``unknown`` beside it says why. Only raw
samples are stored; medians and spreads are computed on reading (``bench.stats``). Field names follow llama-bench where
they mean the same: ``n_prompt, n_gen, n_threads``, and the properties ``avg_ts, stddev_ts``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.stats import Summary, summarize

SCHEMA = 1
OK, WARN, INVALID = "OK", "WARN", "INVALID"
CACHE_FACTOR = 2  # a model within this many last-level caches may run from cache


class ResultError(ValueError):
    """A result file that cannot be used; the message names the file and what to do."""

    exit_code = 2


@dataclass(frozen=True)
class Sample:
    """One repetition: a fresh process that loads, warms up, then prefills and decodes once.

    ``token_s`` holds the ``n_gen`` decode steps. The token that prefill yields feeds the first of them and is paid for
    in ``ttft_s`` (prompt given -> first token known), so decode rate = n_gen / sum(token_s) counts steps exactly.
    """

    started_at: str  # ISO 8601, UTC
    order: int  # position in the interleaved schedule, from 0
    load_s: float  # files to a session that is ready to run
    warmup_s: list[float]  # warm-up steps, first (prefill) included; never part of a statistic
    prefill_s: float
    ttft_s: float
    token_s: list[float]
    peak_load_bytes: int | None  # VmHWM once loaded
    peak_decode_bytes: int | None  # VmHWM from there to the end of decode
    anonymous_bytes: int | None  # of the resident set at the end of decode
    file_bytes: int | None  # of the resident set at the end of decode
    counters: dict[str, float | None] = field(default_factory=dict)  # what bench.validity judges
    unknown: dict[str, str] = field(default_factory=dict)  # field -> why it is null


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of the measured model; None is unknown."""

    parameters: int | None = None
    model_bytes: int | None = None  # files on disk that hold weights and graph
    weight_bytes_per_token: int | None = None
    kv_bytes_per_token: int | None = None
    bits: int | None = None
    vocab_size: int | None = None
    unknown: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Bandwidth:
    """Read bandwidth with ``n_threads`` threads: every timed pass in bytes per second, of which the best counts."""

    n_threads: int
    buffer_bytes: int
    samples: list[float]
    last_level_cache_bytes: int | None = None
    unknown: dict[str, str] = field(default_factory=dict)

    @property
    def bytes_per_s(self) -> float | None:
        """Best pass: a ceiling must not be lowered by noise."""
        return max(self.samples) if self.samples else None


@dataclass(frozen=True)
class Measurement:
    """All repetitions of one spec at one thread count."""

    name: str
    spec: str
    kind: str  # onnx | torch
    bundle_hash: str | None
    model: ModelFacts
    n_prompt: int
    n_gen: int
    n_threads: int
    affinity: list[int]
    samples: list[Sample]
    status: str  # OK | WARN | INVALID
    reasons: list[str] = field(default_factory=list)
    unknown: dict[str, str] = field(default_factory=dict)

    @property
    def prefill_ts(self) -> list[float]:
        """Prompt tokens per second, one value per repetition."""
        return [self.n_prompt / s.prefill_s for s in self.samples]

    @property
    def decode_ts(self) -> list[float]:
        """Generated tokens per second, one value per repetition."""
        return [len(s.token_s) / sum(s.token_s) for s in self.samples]

    @property
    def token_s(self) -> list[float]:
        """Mean seconds per generated token, one value per repetition (the reciprocal of ``decode_ts``)."""
        return [sum(s.token_s) / len(s.token_s) for s in self.samples]

    @property
    def decode(self) -> Summary | None:
        """Centre and spread of ``decode_ts``."""
        return summarize(self.decode_ts)

    @property
    def avg_ts(self) -> float | None:
        """Mean decode rate (llama-bench's name)."""
        return self.decode.mean if self.decode else None

    @property
    def stddev_ts(self) -> float | None:
        """Standard deviation of the decode rate (llama-bench's name)."""
        return self.decode.stddev if self.decode else None

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes read per decode step: the weights once, and the cache at its mean length over the run."""
        weights, kv = self.model.weight_bytes_per_token, self.model.kv_bytes_per_token
        if weights is None or kv is None:
            return None
        return weights + kv * (self.n_prompt + (self.n_gen + 1) / 2)

    def peak(self, name: str) -> int | None:
        """Largest value of a Sample's memory field over the repetitions, e.g. ``peak_decode_bytes``."""
        values = [value for s in self.samples if (value := getattr(s, name)) is not None]
        return max(values) if values else None


@dataclass(frozen=True)
class Result:
    """A bench run. ``device`` is ``devices.probe.probe()`` as it was; ``quality`` is filled by the evaluation."""

    device: dict[str, Any]
    measurements: list[Measurement]
    bandwidth: list[Bandwidth]
    command: list[str]
    versions: dict[str, str]
    created: str  # ISO 8601, UTC
    settings: dict[str, Any] = field(default_factory=dict)  # seed, repetitions, warmup, timeout_s
    quality: dict[str, Any] | None = None
    schema: int = SCHEMA

    def bandwidth_bytes_per_s(self, n_threads: int) -> float | None:
        """Probed read bandwidth for that many threads, None where it was not probed."""
        return next((b.bytes_per_s for b in self.bandwidth if b.n_threads == n_threads), None)

    def ceiling_ts(self, measurement: Measurement) -> float | None:
        """Tokens per second at which memory would be read at full probed bandwidth.

        None when a part is unknown, or when a token reads so little that it may come from cache instead. A cache of
        unknown size counts as none.
        """
        probe = next((b for b in self.bandwidth if b.n_threads == measurement.n_threads), None)
        needed = measurement.bytes_per_token
        if probe is None or probe.bytes_per_s is None or needed is None:
            return None
        return probe.bytes_per_s / needed if needed > CACHE_FACTOR * (probe.last_level_cache_bytes or 0) else None


def write_result(path: str | Path, result: Result) -> None:
    """Write the document beside ``path`` and rename it into place."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(json.dumps(asdict(result), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)


def read_result(path: str | Path) -> Result:
    """Read a document written by ``write_result``.

    Raises:
        ResultError: no such file, truncated, of another schema, or with values that no run can have.
    """
    path = Path(path)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultError(f"cannot read result {path}: {error.strerror}; make one with `saap bench --json`") from None
    except ValueError:
        raise ResultError(f"{path} is truncated or not JSON: run `saap bench --json` again") from None
    if not isinstance(raw, dict) or "measurements" not in raw:
        raise ResultError(f"{path} is not a bench result: make one with `saap bench --json`")
    if raw.get("schema") != SCHEMA:
        raise ResultError(
            f"{path} has result schema {raw.get('schema')!r}, this saap reads {SCHEMA}: run the bench again"
        )
    try:
        return result_from_dict(raw)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ResultError(f"{path} is damaged ({error}): run `saap bench --json` again") from None


def result_from_dict(raw: Mapping[str, Any]) -> Result:
    """The dataclasses from parsed JSON; TypeError, KeyError or ValueError where it does not fit."""
    fields = dict(raw)
    fields["measurements"] = [_measurement(m) for m in raw["measurements"]]
    fields["bandwidth"] = [Bandwidth(**b) for b in raw["bandwidth"]]
    for bandwidth in fields["bandwidth"]:
        _positive("bandwidth samples", bandwidth.samples)
    return Result(**fields)


def _measurement(raw: Mapping[str, Any]) -> Measurement:
    samples = [Sample(**s) for s in raw["samples"]]
    for sample in samples:
        _positive("token_s", sample.token_s)
        _positive("load_s, prefill_s, ttft_s", [sample.load_s, sample.prefill_s, sample.ttft_s])
        if len(sample.token_s) != raw["n_gen"]:
            raise ValueError(f"{len(sample.token_s)} token times for n_gen {raw['n_gen']}")
    if raw["status"] not in (OK, WARN, INVALID):
        raise ValueError(f"status {raw['status']!r}")
    return Measurement(**{**raw, "samples": samples, "model": ModelFacts(**raw["model"])})


def _positive(name: str, values: list[float]) -> None:
    if not values or not all(isinstance(v, int | float) and math.isfinite(v) and v > 0 for v in values):
        raise ValueError(f"{name} must be positive numbers")


TABLE_HEADER = (
    "name", "threads", "prefill tok/s", "decode tok/s", "decode IQR", "first token ms",
    "peak load MB", "peak decode MB", "model MB", "% of ceiling", "status",
)  # fmt: skip


def table_rows(result: Result) -> list[dict[str, Any]]:
    """One row per measurement in base units; medians over repetitions, peaks as maxima, None where unknown."""
    rows = []
    for m in result.measurements:
        prefill, decode, ttft = summarize(m.prefill_ts), m.decode, summarize([s.ttft_s for s in m.samples])
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
