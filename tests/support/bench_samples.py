"""Results built by hand, for tests of what reads them, and workers that say at once that they measured."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pytest

from bench.measure.result import OK, Bandwidth, Measurement, ModelFacts, Result, Sample
from bench.measure.worker import ColdLoad, Measured

FACTS = ModelFacts(
    parameters=1000, model_bytes=3_000_000, weight_bytes_per_token=2_000_000, kv_bytes_per_token=1000, bits=4
)


def sample(token_s: Sequence[float], order: int = 0, **fields: Any) -> Sample:
    values: dict[str, Any] = {
        "started_at": "2025-01-01T00:00:00+00:00",
        "order": order,
        "load_s": 0.5,
        "warmup_s": [0.2, 0.1],
        "prefill_s": 0.02,
        "ttft_s": 0.021,
        "token_s": list(token_s),
        "peak_load_bytes": 100_000_000 + order,
        "peak_decode_bytes": 120_000_000,
        "anonymous_bytes": 60_000_000,
        "file_bytes": 50_000_000,
    }
    return Sample(**{**values, **fields})


def measurement(name: str, per_repetition: Sequence[float], n_gen: int = 4, **fields: Any) -> Measurement:
    """One whose repetition i takes ``per_repetition[i]`` seconds per token."""
    values: dict[str, Any] = {
        "name": name,
        "spec": f"out/{name}",
        "kind": "onnx",
        "bundle_hash": "ab" * 32,
        "model": FACTS,
        "n_prompt": 8,
        "n_gen": n_gen,
        "n_threads": 1,
        "affinity": [0],
        "samples": [sample([value] * n_gen, order) for order, value in enumerate(per_repetition)],
        "status": OK,
    }
    return Measurement(**{**values, **fields})


def result(*measurements: Measurement, fingerprint: str | None = "f" * 16, **fields: Any) -> Result:
    values: dict[str, Any] = {
        "device": {"fingerprint": fingerprint, "cpu_model": "test"},
        "measurements": list(measurements),
        "bandwidth": [Bandwidth(1, 256 << 20, [9e9, 1e10, 8e9], last_level_cache_bytes=500_000)],
        "command": ["saap", "bench"],
        "versions": {"onnxruntime": "1.23.0"},
        "created": "2025-01-01T00:00:00+00:00",
    }
    return Result(**{**values, **fields})


def instant_workers(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """No process is started to measure; the jobs that were given."""
    jobs: list[dict[str, Any]] = []

    def answer(module: str, job: dict[str, Any], *_: object) -> dict[str, object]:
        jobs.append(job)
        if job["only_load"]:
            return asdict(ColdLoad(1.0, 1 << 40))
        taken = sample([0.01 + 1e-6 * job["order"]] * job["n_gen"], job["order"])
        return asdict(Measured(taken, (0.0, 1.0)))

    monkeypatch.setattr("bench.measure.rounds.call", answer)
    return jobs
