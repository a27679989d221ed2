"""One JSON document per bench run: what was measured, where, how, raw samples, and whether it may be believed.

Base units (seconds, bytes, joules, tokens per second). Unknown is null, never 0, and ``unknown`` beside it says why.
Only raw samples are stored; medians and spreads are computed on reading (``bench.measure.statistics``). Field names
follow llama-bench where they mean the same: ``n_prompt, n_gen, n_depth, n_threads``. Schema 1 lacks fields that have
defaults now.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypedDict

import msgspec
import numpy as np
from msgspec import Meta

from bench.measure.options import Provider
from bench.measure.statistics import Ratio, Summary, middle, ratio_of_loads, summarize
from bench.power.sensors import Energy as Energy
from devices.probe.host import installed_version
from export.engine.facts import ModelFacts as ModelFacts
from export.engine.turns import LEAST_LOADS as LEAST_LOADS
from export.engine.turns import Load as Load
from saap.base.documents import Document, unknown_fields
from saap.base.errors import UserError

SCHEMA = 2
OK, WARN, INVALID = "OK", "WARN", "INVALID"
CACHE_FACTOR = 2  # a model within this many last-level caches may run from cache

Json = dict[str, Any]  # as it was read


def command_line() -> list[str]:
    """Return the command of this process as it was typed, without the program's folder, which can name a person."""
    return [*(Path(word).name for word in sys.argv[:1]), *sys.argv[1:]]  # a program that embeds Python may have none


def package_versions(*packages: str) -> dict[str, str]:
    """Versions of packages; by default of those that a measurement depends on.

    One that is not known here under its name is left out: a copied tree, or another build of ONNX Runtime.
    """
    names = packages or ("saap", "onnxruntime", "numpy")
    return {name: version for name in names if (version := installed_version(name))}


@dataclass(frozen=True)
class Sample:
    """One repetition: a fresh process that loads, warms up, then prefills and decodes once.

    ``token_s`` holds the ``n_gen`` decode steps. The token that prefill yields feeds the first of them and is paid for
    in ``ttft_s`` (prompt given -> first token known), so decode rate = n_gen / sum(token_s) counts steps exactly.
    """

    started_at: str  # ISO 8601, UTC
    order: int  # position in the interleaved schedule, from 0
    load_s: float | None  # files to a session that is ready to run; None in imported results
    warmup_s: list[float]  # warm-up steps, first (prefill) included; never part of a statistic
    prefill_s: float | None  # None without a prompt
    ttft_s: float | None
    token_s: list[float]
    peak_load_bytes: int | None  # VmHWM once loaded
    peak_decode_bytes: int | None  # VmHWM from there to the end of decode
    anonymous_bytes: int | None  # of the resident set at the end of decode
    file_bytes: int | None  # of the resident set at the end of decode
    counters: dict[str, float | None] = field(default_factory=dict)  # what bench.measure.validity judges
    unknown: dict[str, str] = field(default_factory=dict)  # field -> why it is null
    decode_s: float | None = None  # the whole decode, where its single tokens are not known (imported results)
    startup_s: float | None = None  # process started -> ready to load a model
    base_bytes: int | None = None  # resident set then
    pss_bytes: int | None = None  # proportional set size at the end of decode
    available_drop_bytes: int | None = None  # MemAvailable before the process, less that at the end of decode
    gpu_bytes: int | None = None  # of the process, or of the whole GPU where only that is told
    steady: bool | None = None  # whether warm-up steps had stopped changing when it ended
    energy: Energy | None = None

    @property
    def decoding_s(self) -> float:
        return self.decode_s if self.decode_s is not None else sum(self.token_s)


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
        return max(self.samples, default=None)


@dataclass(frozen=True)
class Measurement:
    """All repetitions of one spec with one setting."""

    name: str
    spec: str
    kind: str  # onnx | torch | llama.cpp | genai | optimum
    bundle_hash: str | None
    model: ModelFacts
    n_prompt: int  # tokens of the timed prefill; 0: none
    n_gen: int  # timed decode steps; 0: none
    n_threads: int
    affinity: list[int]
    samples: list[Sample]
    status: str  # OK | WARN | INVALID
    reasons: list[str] = field(default_factory=list)
    unknown: dict[str, str] = field(default_factory=dict)
    n_depth: int = 0  # tokens in the cache before the prompt, not timed
    provider: Provider = "cpu"  # of ONNX Runtime, as asked for
    cold_load_s: float | None = None  # load with the files dropped from the page cache first
    stderr: list[str] = field(default_factory=list)  # last lines of a worker that failed
    choice: str | None = None  # of the runtime's own, which a pilot found fastest; None: its default

    @property
    def key(self) -> tuple[str, int, int, int, int]:
        """The identity of a measurement: equal where the same thing was measured again."""
        return self.name, self.n_prompt, self.n_gen, self.n_depth, self.n_threads

    @property
    def test(self) -> str:
        """The setting in llama-bench's words, such as ``pp128+tg128@d1024``."""
        parts = [f"{kind}{count}" for kind, count in (("pp", self.n_prompt), ("tg", self.n_gen)) if count]
        return "+".join(parts) + (f"@d{self.n_depth}" if self.n_depth else "")

    @property
    def prefill_ts(self) -> list[float]:
        """One value per repetition."""
        return [self.n_prompt / s.prefill_s for s in self.samples if s.prefill_s]

    @property
    def decode_ts(self) -> list[float]:
        """One value per repetition."""
        return [self.n_gen / s.decoding_s for s in self.samples if self.n_gen]

    @property
    def token_s(self) -> list[float]:
        """Mean seconds per generated token, one value per repetition (the reciprocal of ``decode_ts``)."""
        return [s.decoding_s / self.n_gen for s in self.samples if self.n_gen]

    @property
    def character_s(self) -> list[float]:
        """Mean seconds per character of a text that the model says, one value per repetition; empty: unknown."""
        spelling = self.model.spelling
        return [each / spelling.characters_per_token for each in self.token_s] if spelling else []

    @property
    def steps_s(self) -> list[float]:
        """Seconds of every single decode step of all repetitions; empty where only sums are known."""
        return [t for s in self.samples for t in s.token_s]

    @property
    def decode(self) -> Summary | None:
        return summarize(self.decode_ts)

    @property
    def positions(self) -> int:
        """Positions of the cache at the end of the run."""
        return self.n_depth + self.n_prompt + self.n_gen

    @property
    def kv_bytes(self) -> int | None:
        per_token = self.model.kv_bytes_per_token
        return None if per_token is None else per_token * self.positions - self.model.sliding.saved(self.positions)

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes read per decode step: the weights once, and the cache at its mean length over the run."""
        weights, kv = self.model.weight_bytes_per_token, self.model.kv_bytes_per_token
        if weights is None or kv is None:
            return None
        mean = self.n_depth + self.n_prompt + (self.n_gen + 1) / 2
        return weights + kv * mean - self.model.sliding.saved(round(mean))

    @property
    def joules_per_token(self) -> list[float]:
        """Joules per generated token over the decode window, idle power included, where a sensor was read."""
        return [s.energy.decode_j / self.n_gen for s in self.samples if s.energy and self.n_gen]

    def peak(self, name: str) -> int | None:
        """Largest value of a Sample's memory field over the repetitions, e.g. ``peak_decode_bytes``."""
        return max((value for s in self.samples if (value := getattr(s, name)) is not None), default=None)


class Answered(TypedDict, total=False):
    """A model's answer to the text."""

    tokens: list[int]
    nll: float | None
    error: str | None


class Settings(TypedDict, total=False):
    """The known part of ``Result.settings``, which holds more."""

    seed: Annotated[int, Meta(ge=0)]
    repetitions: Annotated[int, Meta(ge=1)] | None
    text: list[int]
    answers: dict[str, Answered] | None
    on: str | None


@dataclass(frozen=True)
class Bursts:
    """Times of models that stay loaded and take turns in one setting (:mod:`bench.measure.bursts`)."""

    names: list[str]
    n_prompt: int
    n_gen: int
    n_depth: int
    n_threads: int
    loads: list[Load]
    failure: str | None = None  # why there are no loads, or no more

    def ratio(self, base: str, other: str, what: str) -> Ratio | None:
        """Time of ``other`` over that of ``base``, of ``decode`` or ``prefill``; None where too little is known."""
        a, b = self.names.index(base), self.names.index(other)
        values, later = [], []
        for load in self.loads:
            seconds = load.token_s if what == "decode" else load.prefill_s
            if seconds[a]:
                values.append(middle(np.log(seconds[b]) - np.log(seconds[a])))
                later.append(load.order.index(b) > load.order.index(a))
        known = len(values) >= LEAST_LOADS and 0 < sum(later) < len(later)
        return ratio_of_loads(values, later) if known else None


@dataclass(frozen=True)
class Result:
    """A bench run. ``device`` is ``devices.probe.host.probe()`` as it was; ``quality`` is what ``saap eval`` wrote."""

    device: Json
    measurements: list[Measurement]
    bandwidth: list[Bandwidth]
    command: list[str]
    versions: dict[str, str]
    created: str  # ISO 8601, UTC
    settings: Json = field(default_factory=dict)  # seed, repetitions, power sensor, ...
    quality: Json | None = None
    bursts: list[Bursts] = field(default_factory=list)  # of several models, by setting
    schema: int = SCHEMA

    def of(self, name: str) -> Iterator[Measurement]:
        return (m for m in self.measurements if m.name == name)

    def ratio(self, base: Measurement, other: Measurement, what: str) -> Ratio | None:
        """Time of ``other`` over that of ``base`` by turns in bursts; None where none were taken."""
        for bursts in self.bursts:
            setting = (bursts.n_prompt, bursts.n_gen, bursts.n_depth, bursts.n_threads)
            if setting == base.key[1:] == other.key[1:] and {base.name, other.name} <= {*bursts.names}:
                return bursts.ratio(base.name, other.name, what)
        return None

    def ceiling_ts(self, measurement: Measurement) -> float | None:
        """Tokens per second at which memory would be read at full probed bandwidth.

        None when a part is unknown, or when a token reads so little that it may come from cache instead. A cache of
        unknown size counts as none. A GPU has its own memory, which is not probed.
        """
        probe = next((b for b in self.bandwidth if b.n_threads == measurement.n_threads), None)
        needed = measurement.bytes_per_token
        if probe is None or probe.bytes_per_s is None or needed is None or measurement.provider != "cpu":
            return None
        return probe.bytes_per_s / needed if needed > CACHE_FACTOR * (probe.last_level_cache_bytes or 0) else None


class ResultError(UserError):
    """A result file that cannot be used; the message names the file and what to do."""


def write_result(path: str | Path, result: Result) -> None:
    RESULT.write(path, result)


def read_result(path: str | Path) -> Result:
    """Read a document written by ``write_result``.

    Raises:
        ResultError: no such file, truncated, of another schema, or with values that no run can have.
    """
    return RESULT.read(path)


def _as_today(raw: dict[str, object]) -> dict[str, object]:
    if unknown := unknown_fields(raw, Result):
        raise ValueError(f"unknown fields {', '.join(unknown)}")
    return raw | {"schema": SCHEMA}


def _check(result: Result) -> None:
    msgspec.convert(result.settings, Settings)
    for bandwidth in result.bandwidth:
        _positive("bandwidth samples", bandwidth.samples)
    for bursts in result.bursts:
        _check_bursts(bursts)
    for m in result.measurements:
        if m.status not in (OK, WARN, INVALID):
            raise ValueError(f"status {m.status!r}")
        for sample in m.samples:
            for name in ("load_s", "prefill_s", "ttft_s", "decode_s"):
                _positive(name, [getattr(sample, name)])
            if m.n_prompt and sample.prefill_s is None:
                raise ValueError(f"no prefill time for n_prompt {m.n_prompt}")
            if m.n_gen and sample.decode_s is None and len(sample.token_s) != m.n_gen:
                raise ValueError(f"{len(sample.token_s)} token times for n_gen {m.n_gen}")
            _positive("token_s", sample.token_s)


def _check_bursts(bursts: Bursts) -> None:
    count = len(bursts.names)
    for load in bursts.loads:
        if sorted(load.order) != list(range(count)):
            raise ValueError(f"a load in the order {load.order} of {count} models")
        for name, seconds in (("prefill_s", load.prefill_s), ("token_s", load.token_s)):
            if len(seconds) != count or len({len(values) for values in seconds}) > 1:
                raise ValueError(f"{name} of a load is not as many turns of {count} models each")
            for values in seconds:
                _positive(name, values)


def _positive(name: str, values: Sequence[float | None]) -> None:
    if not all(0 < value < math.inf for value in values if value is not None):
        raise ValueError(f"{name} must be positive numbers")


RESULT = Document(
    Result,
    "result",
    "make one with `saap bench --json`",
    version="schema",
    versions=(1, SCHEMA),
    upgrade=_as_today,
    check=_check,
    error=ResultError,
    mark="measurements",
)
