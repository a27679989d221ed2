"""The process that measures one repetition: ``python -m bench.measure.worker``, config as JSON on stdin, JSON lines
out.

A fresh process each time, so that nothing of an earlier repetition (allocator, page tables, clocks) is inherited. The
last line is the answer; those before it tell the rate of the moment.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from bench.measure.clock_probe import drift, level, probe_clock
from bench.measure.cores import pin
from bench.measure.gpu import GpuWatch
from bench.measure.host_state import counters, snapshot
from bench.measure.memory import available, peak_rss, reset_peak, resident, resident_split
from bench.measure.one_pass import Live, measure, warm_up
from bench.measure.result import Sample
from bench.runtimes.decoders import make_decoder, provider_facts
from bench.runtimes.onnxruntime import Decoder

NOT_LINUX = "this kernel does not tell"


@dataclass(frozen=True)
class Job:
    """What one worker does. ``context`` goes in untimed before ``prompt``."""

    path: str
    prompt: list[int]
    n_gen: int
    warmup: int | None
    threads: int
    cpus: list[int]
    order: int
    context: list[int] = field(default_factory=list)
    provider: str = "cpu"
    cuda_graph: bool = False
    only_load: bool = False  # time the load and end
    spawned_at: float | None = None  # time.monotonic of the parent, which is the same clock on Linux
    available_before: int | None = None  # MemAvailable before this process
    root: str = "/"  # of /proc and /sys

    @property
    def positions(self) -> int:
        """Positions of the cache."""
        return len(self.context) + len(self.prompt) + self.n_gen


Load = Callable[[Job], Decoder]


def sample(job: Job, load: Load, live: Live | None = None) -> tuple[dict[str, Any], Decoder]:
    """Load, warm up, measure once; clocks, memory and the host's counters are read between the parts.

    Returns:
        ``{"sample": ..., "window": (start, end) of decode on time.monotonic}``, and the decoder.
    """
    startup_s = time.monotonic() - job.spawned_at if job.spawned_at is not None and _linux() else None
    pin(job.cpus)
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    base, clock = resident(), time.monotonic
    gpu = GpuWatch(Path(job.root)) if job.provider != "cpu" else None
    begin = clock()
    decoder = load(job)
    load_s = clock() - begin
    if live is not None:
        live("warm-up", 0.0)
    peak_load, apart = peak_rss(), reset_peak()
    prompt, context = np.asarray(job.prompt, np.int64), np.asarray(job.context, np.int64)
    warmup_s, steady = warm_up(decoder, prompt, job.warmup, clock, context, job.n_gen)
    probes, before = probe_clock(), snapshot(job.cpus, Path(job.root))
    done = measure(decoder, prompt, job.n_gen, clock, context, live)
    clocks = gpu.clocks() if gpu else {}  # first: they fall within moments
    happened = {**counters(before, snapshot(job.cpus, Path(job.root)), len(job.cpus)), **clocks}
    happened["clock_drift"], happened["clock_limit"] = drift(probes, probe_clock())
    happened["clock_s"] = level(probes)
    if gpu:
        happened["provider_fallback"] = float(provider_facts(decoder).fallback)
    gpu_bytes, no_gpu = gpu.memory() if gpu else (None, "the CPU computed")
    taken = Sample(
        started_at=started,
        order=job.order,
        load_s=load_s,
        warmup_s=warmup_s,
        prefill_s=done.prefill_s,
        ttft_s=done.ttft_s,
        token_s=done.token_s,
        counters=happened,
        startup_s=startup_s,
        base_bytes=base,
        steady=steady,
        gpu_bytes=gpu_bytes,
        **_memory(job, peak_load, apart),
    )
    unknown = {**_unknown(taken), **({"gpu_bytes": no_gpu} if no_gpu else {})}
    return {"sample": {**asdict(taken), "unknown": unknown}, "window": done.window}, decoder


def _unknown(taken: Sample) -> dict[str, str]:
    """Why memory and counters are null."""
    counted = {f"counters.{k}": f"{NOT_LINUX}, or it was too short" for k, v in taken.counters.items() if v is None}
    return {name: NOT_LINUX for name in _MEMORY if getattr(taken, name) is None} | counted


_MEMORY = ("peak_load_bytes", "peak_decode_bytes", "anonymous_bytes", "file_bytes", "pss_bytes", "available_drop_bytes")


def _memory(job: Job, peak_load: int | None, apart: bool) -> dict[str, Any]:
    """The present memory, by the names of ``_MEMORY``; a peak that could not be reset is none of decode."""
    split, left = resident_split(), available(Path(job.root))
    drop = None if job.available_before is None or left is None else job.available_before - left
    return {
        "peak_load_bytes": peak_load,
        "peak_decode_bytes": peak_rss() if apart else None,
        "anonymous_bytes": split.anonymous if split else None,
        "file_bytes": split.file if split else None,
        "pss_bytes": split.pss if split else None,
        "available_drop_bytes": drop,
    }


def serve(load: Load, facts: Callable[[Decoder], dict[str, Any]]) -> None:
    """Read the job from stdin, write ``{"sample": ..., "window": ..., **facts}`` to stdout.

    What libraries print goes to stderr, so that stdout holds our lines only.
    """
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def tell(document: dict[str, Any]) -> None:
        answer.write(json.dumps(document) + "\n")
        answer.flush()

    job = Job(**json.load(sys.stdin))
    if job.only_load:
        tell(_loaded(job, load))
        return
    taken, decoder = sample(job, load, lambda phase, rate: tell({"phase": phase, "rate": rate}))
    tell({**taken, **facts(decoder)})


def _loaded(job: Job, load: Load) -> dict[str, Any]:
    """Seconds of a load, and what it read from storage."""
    pin(job.cpus)
    before, begin = snapshot(job.cpus), time.monotonic()
    load(job)
    load_s = time.monotonic() - begin
    after = snapshot(job.cpus)
    known = before.read_bytes is not None and after.read_bytes is not None
    return {"load_s": load_s, "read_bytes": after.read_bytes - before.read_bytes if known else None}  # type: ignore[operator]


def _linux() -> bool:
    return sys.platform.startswith("linux")


def _load(job: Job) -> Decoder:
    # The parent has checked the hashes once; doing it here would time the disk and the hash.
    return make_decoder(job.path, job.threads, job.positions, job.provider, job.cuda_graph)


def _facts(decoder: Decoder) -> dict[str, Any]:
    """Sizes are in the manifest, which the parent has; what a GPU's session really ran on is only known here."""
    facts = provider_facts(decoder)
    if facts.asked == "cpu":
        return {}
    on_cpu = f", on the CPU: {', '.join(facts.on_cpu)}" if facts.on_cpu else ""
    return {"versions": {"provider": f"{facts.active}, nodes {facts.nodes}{on_cpu}"}}


if __name__ == "__main__":
    import onnxruntime  # noqa: F401  before the clock starts: importing is not loading a model

    serve(_load, _facts)
