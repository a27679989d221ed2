"""The process that measures one repetition: ``python -m bench.worker``, config as JSON on stdin, one JSON line out.

A fresh process each time, so that nothing of an earlier repetition (allocator, page tables, clocks) is inherited.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any

import numpy as np

from bench.cores import pin
from bench.measure import measure, warm_up
from bench.memory import peak_rss, reset_peak, resident_split
from bench.result import Sample
from bench.runtime import Decoder, OrtDecoder
from bench.validity import counters, snapshot


@dataclass(frozen=True)
class Job:
    """What one worker does."""

    path: str
    prompt: list[int]
    n_gen: int
    warmup: int
    threads: int
    cpus: list[int]
    order: int


def sample(job: Job, load: Callable[[Job], Decoder]) -> tuple[Sample, Decoder]:
    """Load, warm up, measure once; memory is read between the parts."""
    pin(job.cpus)
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    clock = time.perf_counter
    begin = clock()
    decoder = load(job)
    load_s = clock() - begin
    unknown: dict[str, str] = {}
    peak_load = peak_rss()
    apart = reset_peak()
    prompt = np.asarray(job.prompt, np.int64)
    warmup_s = warm_up(decoder, prompt, job.warmup, clock)
    before = snapshot(job.cpus)
    done = measure(decoder, prompt, job.n_gen, clock)
    happened = counters(before, snapshot(job.cpus), len(job.cpus))
    peak_decode, split = (peak_rss() if apart else None), resident_split()
    if peak_load is None:
        unknown["peak_load_bytes"] = "this kernel has no VmHWM"
    if peak_decode is None:
        unknown["peak_decode_bytes"] = "this kernel does not let VmHWM be reset"
    if split is None:
        unknown["anonymous_bytes"] = unknown["file_bytes"] = "this kernel has no smaps_rollup"
    unknown.update({f"counters.{k}": "not told by this kernel, or too short" for k, v in happened.items() if v is None})
    taken = Sample(
        started_at=started,
        order=job.order,
        load_s=load_s,
        warmup_s=warmup_s,
        prefill_s=done.prefill_s,
        ttft_s=done.ttft_s,
        token_s=done.token_s,
        peak_load_bytes=peak_load,
        peak_decode_bytes=peak_decode,
        anonymous_bytes=split.anonymous if split else None,
        file_bytes=split.file if split else None,
        counters=happened,
        unknown=unknown,
    )
    return taken, decoder


def serve(load: Callable[[Job], Decoder], facts: Callable[[Decoder], dict[str, Any]]) -> None:
    """Read the job from stdin, write ``{"sample": ..., **facts}`` to stdout.

    What libraries print goes to stderr, so that the answer is the only line on stdout.
    """
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    job = Job(**json.load(sys.stdin))
    taken, decoder = sample(job, load)
    answer.write(json.dumps({"sample": asdict(taken), **facts(decoder)}) + "\n")
    answer.flush()


def _load(job: Job) -> Decoder:
    # The parent has checked the hashes once; doing it here would time the disk and the hash.
    return OrtDecoder(job.path, job.threads, len(job.prompt) + job.n_gen, verify=False)


def _facts(decoder: Decoder) -> dict[str, Any]:
    return {}  # the parent has them from the manifest


if __name__ == "__main__":
    import onnxruntime  # noqa: F401  before the clock starts: importing is not loading a model

    serve(_load, _facts)
