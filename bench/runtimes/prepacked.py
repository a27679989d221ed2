"""The worker of ``prepacked:BUNDLE``: a bundle whose packed weights are mapped from the user's cache."""

from __future__ import annotations

from typing import Any

from bench.measure.worker import Job, serve
from bench.runtimes.onnxruntime import Decoder, OrtDecoder


def load(job: Job) -> Decoder:
    """The parent has made the cache and checked the hashes."""
    return OrtDecoder(job.path, job.threads, job.positions, verify=False, prepacked=True)


def facts(decoder: Decoder) -> dict[str, Any]:
    """Nothing: the parent has them from the manifest."""
    return {}


if __name__ == "__main__":
    import onnxruntime  # noqa: F401  before the clock starts: importing is not loading a model

    serve(load, facts)
