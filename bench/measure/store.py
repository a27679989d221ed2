"""Results on disk: written beside their place and renamed, checked when they are read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.measure.dataclass_types import built, check_types
from bench.measure.result import INVALID, OK, SCHEMA, WARN, Bandwidth, Energy, Measurement, ModelFacts, Result, Sample
from devices.common.errors import UserError
from devices.common.files import parse_json, with_checksum, without_checksum, write_text

READABLE = (1, SCHEMA)  # schema 1 lacks fields that have defaults now


class ResultError(UserError):
    """A result file that cannot be used; the message names the file and what to do."""


def write_result(path: str | Path, result: Result) -> None:
    """Write the document beside ``path`` and rename it into place."""
    write_text(Path(path), result_text(result, indent=1) + "\n")


def result_text(result: Result, indent: int | None = None) -> str:
    """The document as JSON with its checksum; one line without ``indent``."""
    return json.dumps(with_checksum(asdict(result)), indent=indent, allow_nan=False)


def read_result(path: str | Path) -> Result:
    """Read a document written by ``write_result``.

    Raises:
        ResultError: no such file, truncated, of another schema, or with values that no run can have.
    """
    path = Path(path)
    try:
        raw = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultError(f"cannot read result {path}: {error.strerror}; make one with `saap bench --json`") from None
    except ValueError:
        raise ResultError(f"{path} is truncated or not JSON: run `saap bench --json` again") from None
    if not isinstance(raw, dict) or "measurements" not in raw:
        raise ResultError(f"{path} is not a bench result: make one with `saap bench --json`")
    if raw.get("schema") not in READABLE:
        raise ResultError(
            f"{path} has result schema {raw.get('schema')!r}, this saap reads {SCHEMA}: run the bench again"
        )
    try:
        return result_from_dict(raw)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ResultError(f"{path} is damaged ({error}): run `saap bench --json` again") from None


def result_from_dict(raw: Mapping[str, Any]) -> Result:
    """The dataclasses from parsed JSON; TypeError, KeyError or ValueError where it does not fit."""
    fields = without_checksum(raw) | {"schema": SCHEMA}
    fields["measurements"] = [_measurement(m) for m in raw["measurements"]]
    fields["bandwidth"] = [built(Bandwidth, b) for b in raw["bandwidth"]]
    for bandwidth in fields["bandwidth"]:
        _positive("bandwidth samples", bandwidth.samples)
    return built(Result, fields)


def _measurement(raw: Mapping[str, Any]) -> Measurement:
    samples = [sample_from_dict(s) for s in raw["samples"]]
    for sample in samples:
        _check(sample, raw["n_prompt"], raw["n_gen"])
        check_types(sample)
    if raw["status"] not in (OK, WARN, INVALID):
        raise ValueError(f"status {raw['status']!r}")
    return built(Measurement, {**raw, "samples": samples, "model": built(ModelFacts, raw["model"])})


def sample_from_dict(raw: Mapping[str, Any]) -> Sample:
    """A Sample as JSON has it, whose values are not checked."""
    energy = raw.get("energy")
    return Sample(**{**raw, "energy": built(Energy, energy) if energy is not None else None})


def _check(sample: Sample, n_prompt: int, n_gen: int) -> None:
    for name in ("load_s", "prefill_s", "ttft_s", "decode_s"):
        if (value := getattr(sample, name)) is not None:
            _positive(name, [value])
    if n_prompt and sample.prefill_s is None:
        raise ValueError(f"no prefill time for n_prompt {n_prompt}")
    if n_gen and sample.decode_s is None and len(sample.token_s) != n_gen:
        raise ValueError(f"{len(sample.token_s)} token times for n_gen {n_gen}")
    if sample.token_s:
        _positive("token_s", sample.token_s)


def _positive(name: str, values: Sequence[float]) -> None:
    usable = all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) and v > 0 for v in values)
    if not values or not usable:
        raise ValueError(f"{name} must be positive numbers")
