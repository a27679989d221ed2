"""The process that measures one repetition: ``python -m bench.measure.worker``, config as JSON on stdin, JSON lines
out.

A fresh process each time, so that nothing of an earlier repetition (allocator, page tables, clocks) is inherited: load,
warm up, untimed context, one prefill, then greedy steps, each timed until the next token is known. The last line is the
answer; those before it tell the rate of the moment.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

from bench.measure.cores import drift, level, probe_clock
from bench.measure.gpu import GpuWatch, open_nvml
from bench.measure.host_state import counters, snapshot
from bench.measure.memory import peak_rss, reset_peak, resident, resident_split
from bench.measure.result import ModelFacts, Sample
from export.engine.protocol import Engine, Ids
from export.engine.worker import Clock, Job, warm_up
from saap.base.cgroup import available
from saap.base.child import job_and_tell

Live = Callable[[str, float], None]  # (phase, tokens per second)

LIVE_EVERY_S = 0.5


@dataclass(frozen=True)
class Pass:
    """Seconds of one pass, and the tokens it produced: the first from prefill, then one per decode step."""

    prefill_s: float | None
    ttft_s: float | None
    token_s: list[float]
    tokens: list[int]
    window: tuple[float, float]  # of decode, on the clock


def timed_pass(
    engine: Engine, prompt: Ids, steps: int, clock: Clock, context: Ids | None = None, live: Live | None = None
) -> Pass:
    """Reset, put ``context`` in, prefill ``prompt`` [n], then exactly ``steps`` greedy steps past any end of text.

    Without a prompt the first token comes from the context, and neither prefill nor first token is timed. ``live`` is
    told the rate between steps, outside of what is timed.
    """
    engine.rewind(0)
    if context is not None and len(context):
        logits = engine.prefill(context)
    start = clock()
    if len(prompt):
        logits = engine.prefill(prompt)
    filled = clock()
    tokens, now = [engine.next_token(logits)], clock()
    ttft = now - start
    window_start, shown, token_s = now, now, []
    for _ in range(steps):
        tokens.append(engine.next_token(engine.step(tokens[-1])))
        before, now = now, clock()
        token_s.append(now - before)
        if live is not None and now - shown > LIVE_EVERY_S:
            live("decode", len(token_s) / sum(token_s))
            shown = now = clock()
    timed = bool(len(prompt))
    return Pass(filled - start if timed else None, ttft if timed else None, token_s, tokens, (window_start, now))


NOT_LINUX = "this kernel does not tell"


@dataclass(frozen=True)
class Repetition(Job):
    """The measurement of one worker."""

    order: int = 0
    only_load: bool = False  # time the load and end
    spawned_at: float | None = None  # time.monotonic of the parent
    available_before: int | None = None  # MemAvailable before this process
    root: str = "/"  # of /proc and /sys


@dataclass(frozen=True)
class Measured:
    """The last line of a worker; ``window`` is decode's (start, end) on time.monotonic."""

    sample: Sample
    window: tuple[float, float]
    versions: dict[str, str] = field(default_factory=dict)
    model: ModelFacts | None = None  # None where a manifest has the sizes


@dataclass(frozen=True)
class ColdLoad:
    """The answer of a worker that only loads; ``read_bytes`` came from storage."""

    load_s: float
    read_bytes: int | None


def sample(job: Repetition, live: Live | None = None) -> Measured:
    """Load, warm up, measure once; memory and the host's counters are read between the parts."""
    linux = sys.platform.startswith("linux")  # whose monotonic clock all processes share
    startup_s = time.monotonic() - job.spawned_at if job.spawned_at is not None and linux else None
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    base, clock, root = resident(), time.monotonic, Path(job.root)
    gpu = GpuWatch(root, open_nvml()) if job.options.provider != "cpu" else None
    begin = clock()
    engine = job.open()
    load_s = clock() - begin
    if live is not None:
        live("warm-up", 0.0)
    peak_load, apart = peak_rss(), reset_peak()
    prompt, context = np.asarray(job.prompt, np.int64), np.asarray(job.context, np.int64)
    warmup_s, steady = warm_up(engine, prompt, job.warmup, clock, context, job.n_gen)
    probes, before = probe_clock(), snapshot(job.cpus, root)
    timed = timed_pass(engine, prompt, job.n_gen, clock, context, live)
    happened = counters(before, snapshot(job.cpus, root), len(job.cpus))
    happened["clock_drift"], happened["clock_limit"] = drift(probes, probe_clock())
    happened["clock_s"] = level(probes)
    gpu_bytes, no_gpu = gpu.memory() if gpu else (None, "the CPU computed")
    split, left = resident_split(), available(root)
    result = Sample(
        started_at=started,
        order=job.order,
        load_s=load_s,
        warmup_s=warmup_s,
        prefill_s=timed.prefill_s,
        ttft_s=timed.ttft_s,
        token_s=timed.token_s,
        peak_load_bytes=peak_load,
        peak_decode_bytes=peak_rss() if apart else None,
        anonymous_bytes=split.anonymous,
        file_bytes=split.file,
        counters=happened,
        startup_s=startup_s,
        base_bytes=base,
        pss_bytes=split.pss,
        available_drop_bytes=None if job.available_before is None or left is None else job.available_before - left,
        gpu_bytes=gpu_bytes,
        steady=steady,
    )
    unknown = {name: NOT_LINUX for name in _MEMORY if getattr(result, name) is None}
    unknown |= {f"counters.{k}": f"{NOT_LINUX}, or it was too short" for k, v in happened.items() if v is None}
    unknown |= {"gpu_bytes": no_gpu} if no_gpu else {}
    return Measured(replace(result, unknown=unknown), timed.window, engine.versions(), engine.facts())


_MEMORY = ("peak_load_bytes", "peak_decode_bytes", "anonymous_bytes", "file_bytes", "pss_bytes", "available_drop_bytes")


def main() -> None:
    """Read the ``Repetition`` from stdin, write a ``Measured`` or a ``ColdLoad`` to stdout."""
    job, tell = job_and_tell(Repetition)
    job.prepare()
    tell(
        asdict(_loaded(job) if job.only_load else sample(job, lambda phase, rate: tell({"phase": phase, "rate": rate})))
    )


def _loaded(job: Repetition) -> ColdLoad:
    before, begin = snapshot(job.cpus).read_bytes, time.monotonic()
    job.open()
    load_s, after = time.monotonic() - begin, snapshot(job.cpus).read_bytes
    return ColdLoad(load_s, None if before is None or after is None else after - before)


if __name__ == "__main__":
    main()
