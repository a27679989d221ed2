"""llama-bench's JSON: results of llama.cpp's own bench read as ours, and ours written for tools that read those.

llama-bench times a prompt (pp), generated tokens (tg), or both in one sum (pg), each at a depth: tokens already in the
cache. A run of ours prefills and then decodes in one process, so it holds a pp entry at its own depth and a tg entry
whose depth counts the prompt too. Fields by tools/llama-bench/llama-bench.cpp of ggml-org/llama.cpp; what one side does
not know is left out on the other, never made up.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import PurePath, PureWindowsPath
from typing import Any

from bench.result import INVALID, OK, Measurement, ModelFacts, Result, Sample
from bench.stats import summarize
from bench.store import ResultError
from devices.whole_files import parse_json

# Fields of a model or its result; every other one is a setting, and tells entries of one model apart.
_FACTS = {
    "build_commit", "build_number", "cpu_info", "gpu_info", "backends", "model_filename", "model_type", "model_size",
    "model_n_params", "n_prompt", "n_gen", "n_depth", "n_threads", "test_time", "avg_ns", "stddev_ns", "avg_ts",
    "stddev_ts", "samples_ns", "samples_ts",
}  # fmt: skip
_UNTOLD = {"memory": "llama-bench does not measure it", "token_s": "llama-bench tells sums only"}


def to_llama_bench(result: Result, combined: bool = False) -> list[dict[str, Any]]:
    """The entries of all measurements that are not INVALID, a status that llama-bench has no field for.

    Args:
        combined: one entry per measurement, prompt and generation in one sum, instead of one each.
    """
    entries = []
    for m in result.measurements:
        if m.status == INVALID or not m.samples:
            continue
        prefill = [s.prefill_s or 0.0 for s in m.samples]
        decode = [s.decoding_s for s in m.samples]
        if combined:
            sums = [p + d for p, d in zip(prefill, decode, strict=True)]
            entries.append(_entry(result, m, m.n_prompt, m.n_gen, m.n_depth, sums))
            continue
        if m.n_prompt:
            entries.append(_entry(result, m, m.n_prompt, 0, m.n_depth, prefill))
        if m.n_gen:
            entries.append(_entry(result, m, 0, m.n_gen, m.n_depth + m.n_prompt, decode))
    return entries


def is_llama_bench(text: str) -> bool:
    """Whether a document is llama-bench's rather than one of ours: a list, or lines with one entry each."""
    text = text.lstrip()
    if text.startswith("["):
        return True
    try:
        first = parse_json(text.partition("\n")[0])
    except ValueError:
        return False
    return isinstance(first, dict) and "samples_ns" in first


def from_llama_bench(text: str, source: str = "the llama-bench result") -> Result:
    """Read what ``llama-bench -o json`` or ``-o jsonl`` printed.

    One measurement per entry: tg gives decode times (sums, no single steps), pp prefill times. A pg entry cannot be
    taken apart; ``settings["skipped"]`` names it. The device has no fingerprint, so the result compares with no other.

    Raises:
        ResultError: damaged, or nothing but pg entries.
    """
    entries = _parse(text, source)
    names = _names(entries)
    measurements, skipped = [], []
    for index, (entry, name) in enumerate(zip(entries, names, strict=True)):
        try:
            n_prompt, n_gen = _count(entry, "n_prompt"), _count(entry, "n_gen")
            if n_prompt and n_gen:
                skipped.append(f"{name}: pp{n_prompt}+tg{n_gen} in one sum")
            else:
                measurements.append(_measurement(entry, name, n_prompt, n_gen))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            what = f"no {error.args[0]}" if isinstance(error, KeyError) else error
            raise ResultError(
                f"{source}, entry {index + 1}: {what}; write it again with `llama-bench -o json`"
            ) from None
    if not measurements:
        raise ResultError(f"{source} holds no prompt or generation on its own: run llama-bench with -p and -n, not -pg")
    return _result(entries, measurements, skipped)


def _entry(
    result: Result, m: Measurement, n_prompt: int, n_gen: int, n_depth: int, seconds: Sequence[float]
) -> dict[str, Any]:
    nanoseconds = [round(1e9 * value) for value in seconds]
    rates = [(n_prompt + n_gen) / value for value in seconds]
    time, rate = summarize(nanoseconds), summarize(rates)
    assert time is not None and rate is not None
    known = {
        "cpu_info": result.device.get("cpu_model"),
        "backends": m.provider.upper(),
        "model_filename": m.spec,
        "model_size": m.model.model_bytes,
        "model_n_params": m.model.parameters,
    }
    return {key: value for key, value in known.items() if value is not None} | {
        "n_threads": m.n_threads,
        "n_prompt": n_prompt,
        "n_gen": n_gen,
        "n_depth": n_depth,
        "test_time": m.samples[0].started_at,
        "avg_ns": round(time.mean),
        "stddev_ns": round(time.stddev or 0),  # llama-bench writes 0 for a single repetition
        "avg_ts": rate.mean,
        "stddev_ts": rate.stddev or 0.0,
        "samples_ns": nanoseconds,
        "samples_ts": rates,
    }


def _parse(text: str, source: str) -> list[dict[str, Any]]:
    try:
        raw = (
            parse_json(text)
            if text.lstrip().startswith("[")
            else [parse_json(x) for x in text.splitlines() if x.strip()]
        )
    except ValueError:
        raise ResultError(f"{source} is truncated or not JSON: run `llama-bench -o json` again") from None
    if not isinstance(raw, list) or not raw or not all(isinstance(entry, dict) for entry in raw):
        raise ResultError(
            f"{source} is not a bench result, nor a list of llama-bench entries: run `llama-bench -o json` again"
        )
    return raw


def _names(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """The file's name, and those settings that differ between the entries of the document."""
    settings = sorted({key for entry in entries for key in entry if key not in _FACTS})
    varied = [key for key in settings if len({json.dumps(entry.get(key), sort_keys=True) for entry in entries}) > 1]
    return [
        ", ".join([_stem(entry.get("model_filename")), *(f"{key} {entry.get(key)}" for key in varied)])
        for entry in entries
    ]


def _stem(filename: Any) -> str:
    if not isinstance(filename, str) or not filename:
        return "unnamed model"
    path: PurePath = PureWindowsPath(filename)  # takes both separators
    return path.stem if path.suffix == ".gguf" else path.name


def _measurement(entry: Mapping[str, Any], name: str, n_prompt: int, n_gen: int) -> Measurement:
    if not n_prompt and not n_gen:
        raise ValueError("neither n_prompt nor n_gen")
    seconds = _seconds(entry["samples_ns"])
    started = datetime.fromisoformat(entry["test_time"].replace("Z", "+00:00")).isoformat()
    backends = str(entry.get("backends", "CPU"))
    return Measurement(
        name=name,
        spec=str(entry.get("model_filename", name)),
        kind="llama.cpp",
        bundle_hash=None,
        model=ModelFacts(parameters=_known(entry, "model_n_params"), model_bytes=_known(entry, "model_size")),
        n_prompt=n_prompt,
        n_gen=n_gen,
        n_depth=_count(entry, "n_depth") if "n_depth" in entry else 0,
        n_threads=_count(entry, "n_threads"),
        affinity=[],
        samples=[_sample(value, order, started, decode=bool(n_gen)) for order, value in enumerate(seconds)],
        status=OK,
        unknown=dict(_UNTOLD),
        provider="cpu" if set(backends.split(",")) <= {"CPU", "BLAS"} else backends.lower(),
    )


def _sample(seconds: float, order: int, started: str, decode: bool) -> Sample:
    return Sample(
        started_at=started,
        order=order,
        load_s=None,
        warmup_s=[],
        prefill_s=None if decode else seconds,
        ttft_s=None,
        token_s=[],
        peak_load_bytes=None,
        peak_decode_bytes=None,
        anonymous_bytes=None,
        file_bytes=None,
        decode_s=seconds if decode else None,
    )


def _seconds(nanoseconds: Any) -> list[float]:
    usable = isinstance(nanoseconds, list) and all(
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
        for value in nanoseconds
    )
    if not usable or not nanoseconds:
        raise ValueError("samples_ns must be positive numbers")
    return [value / 1e9 for value in nanoseconds]


def _count(entry: Mapping[str, Any], key: str) -> int:
    value = entry[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{key} must be a count, not {value!r}")
    return value


def _known(entry: Mapping[str, Any], key: str) -> int | None:
    return _count(entry, key) or None if entry.get(key) is not None else None


def _result(entries: Sequence[Mapping[str, Any]], measurements: list[Measurement], skipped: list[str]) -> Result:
    first = entries[0]
    build = " ".join(str(first[key]) for key in ("build_number", "build_commit") if first.get(key))
    return Result(
        device={
            "fingerprint": None,
            "cpu_model": first.get("cpu_info") or None,
            "gpu_model": first.get("gpu_info") or None,
        },
        measurements=measurements,
        bandwidth=[],
        command=["llama-bench"],
        versions={"llama.cpp": build} if build else {},
        created=min(m.samples[0].started_at for m in measurements),
        settings={"source": "llama-bench"} | ({"skipped": skipped} if skipped else {}),
    )
