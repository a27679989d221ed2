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
from importlib import import_module
from pathlib import Path

import numpy as np

from bench.measure.cores import drift, level, pin, probe_clock
from bench.measure.gpu import GpuWatch, open_nvml
from bench.measure.host_state import counters, snapshot
from bench.measure.memory import peak_rss, reset_peak, resident, resident_split
from bench.measure.result import Sample
from bench.runtimes.decoders import make_decoder
from export.engine.facts import PeerFacts
from export.engine.onnxruntime import Decoder, Ids, Logits
from saap.base.cgroup import available
from saap.base.child import job_and_tell

Clock = Callable[[], float]
Live = Callable[[str, float], None]  # (phase, tokens per second)

LIVE_EVERY_S = 0.5
WINDOW = 8  # steps of each of the two windows that are compared
STEADY = 0.03  # relative difference of their medians
MOST_WARM_UP = 64


@dataclass(frozen=True)
class Pass:
    """Seconds of one pass, and the tokens it produced: the first from prefill, then one per decode step."""

    prefill_s: float | None
    ttft_s: float | None
    token_s: list[float]
    tokens: list[int]
    window: tuple[float, float]  # of decode, on the clock


def timed_pass(
    decoder: Decoder, prompt: Ids, steps: int, clock: Clock, context: Ids | None = None, live: Live | None = None
) -> Pass:
    """Reset, put ``context`` in, prefill ``prompt`` [n], then exactly ``steps`` greedy steps past any end of text.

    Without a prompt the first token comes from the context, and neither prefill nor first token is timed. ``live`` is
    told the rate between steps, outside of what is timed.
    """
    choose = chooser(decoder)
    decoder.reset()
    if context is not None and len(context):
        logits = decoder.prefill(context)
    start = clock()
    if len(prompt):
        logits = decoder.prefill(prompt)
    filled = clock()
    tokens, now = [choose(logits)], clock()
    ttft = now - start
    window_start, told, token_s = now, now, []
    for _ in range(steps):
        tokens.append(choose(decoder.step(tokens[-1])))
        before, now = now, clock()
        token_s.append(now - before)
        if live is not None and now - told > LIVE_EVERY_S:
            live("decode", len(token_s) / sum(token_s))
            told = now = clock()
    timed = bool(len(prompt))
    return Pass(filled - start if timed else None, ttft if timed else None, token_s, tokens, (window_start, now))


def warm_up(
    decoder: Decoder, prompt: Ids, steps: int | None, clock: Clock, context: Ids | None = None, most: int = MOST_WARM_UP
) -> tuple[list[float], bool | None]:
    """Make the kernels' buffers exist and let clocks rise: a prefill of the measured length, then decode steps.

    Args:
        steps: of the whole pass, prefill included, exactly; None: until the median of the last 8 steps is within 3 %
            of that of the 8 before.
        most: decode steps at most, for which the cache has room.

    Returns:
        seconds of prefill and steps, kept but never counted; and whether they became steady, None where too few steps
        were allowed to tell.
    """
    if steps is not None and steps < 1:
        return [], None
    choose = chooser(decoder)
    decoder.reset()
    start = clock()
    for ids in (context, prompt):
        if ids is not None and len(ids):
            logits = decoder.prefill(ids)
    token = choose(logits)
    times, now = [clock() - start], clock()
    for _ in range(min(most, MOST_WARM_UP) if steps is None else min(most, steps - 1)):
        token = choose(decoder.step(token))
        before, now = now, clock()
        times.append(now - before)
        if steps is None and is_steady(times[1:]):
            break
    return times, is_steady(times[1:]) if steps is None and most >= 2 * WINDOW else None


def is_steady(times: list[float]) -> bool:
    """Whether the last eight steps took as long as the eight before them."""
    if len(times) < 2 * WINDOW:
        return False
    last, before = np.median(times[-WINDOW:]), np.median(times[-2 * WINDOW : -WINDOW])
    return bool(abs(last - before) <= STEADY * before)


def chooser(decoder: Decoder) -> Callable[[Logits], int]:
    """A runtime that samples in its own code hands out tokens (``draw``), never logits."""
    draw = getattr(decoder, "draw", None)
    return (lambda _: draw()) if draw else (lambda logits: int(np.argmax(logits)))


NOT_LINUX = "this kernel does not tell"


@dataclass(frozen=True)
class Job:
    """What one worker does. ``context`` is fed untimed before ``prompt``."""

    path: str
    prompt: list[int]
    n_gen: int
    warmup: int | None
    threads: int
    cpus: list[int]
    order: int
    context: list[int] = field(default_factory=list)
    provider: str = "cpu"
    runtime: str | None = None  # module of a peer; None: a bundle in ONNX Runtime
    choice: str | None = None  # of the runtime's choices; None: its default
    only_load: bool = False  # time the load and end
    spawned_at: float | None = None  # time.monotonic of the parent
    available_before: int | None = None  # MemAvailable before this process
    root: str = "/"  # of /proc and /sys

    @property
    def positions(self) -> int:
        return len(self.context) + len(self.prompt) + self.n_gen


@dataclass(frozen=True)
class Measured:
    """What a worker says last; ``window`` is decode's (start, end) on time.monotonic."""

    sample: Sample
    window: tuple[float, float]
    facts: PeerFacts


@dataclass(frozen=True)
class ColdLoad:
    """What a worker says that only loads; ``read_bytes`` came from storage."""

    load_s: float
    read_bytes: int | None


Load = Callable[[Job], Decoder]
Facts = Callable[[Decoder], PeerFacts]


def sample(job: Job, load: Load, live: Live | None = None) -> tuple[Sample, tuple[float, float], Decoder]:
    """Load, warm up, measure once; clocks, memory and the host's counters are read between the parts.

    Returns:
        The sample, the window of decode on time.monotonic, and the decoder.
    """
    linux = sys.platform.startswith("linux")  # whose monotonic clock all processes share
    startup_s = time.monotonic() - job.spawned_at if job.spawned_at is not None and linux else None
    pin(job.cpus)
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    base, clock, root = resident(), time.monotonic, Path(job.root)
    gpu = GpuWatch(root, open_nvml()) if job.provider != "cpu" else None
    begin = clock()
    decoder = load(job)
    load_s = clock() - begin
    if live is not None:
        live("warm-up", 0.0)
    peak_load, apart = peak_rss(), reset_peak()
    prompt, context = np.asarray(job.prompt, np.int64), np.asarray(job.context, np.int64)
    warmup_s, steady = warm_up(decoder, prompt, job.warmup, clock, context, job.n_gen)
    probes, before = probe_clock(), snapshot(job.cpus, root)
    done = timed_pass(decoder, prompt, job.n_gen, clock, context, live)
    clocks = gpu.clocks() if gpu else {}  # first: they fall within moments
    happened = {**counters(before, snapshot(job.cpus, root), len(job.cpus)), **clocks}
    happened["clock_drift"], happened["clock_limit"] = drift(probes, probe_clock())
    happened["clock_s"] = level(probes)
    gpu_bytes, no_gpu = gpu.memory() if gpu else (None, "the CPU computed")
    split, left = resident_split(), available(root)
    taken = Sample(
        started_at=started,
        order=job.order,
        load_s=load_s,
        warmup_s=warmup_s,
        prefill_s=done.prefill_s,
        ttft_s=done.ttft_s,
        token_s=done.token_s,
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
    return replace(taken, unknown=_unknown(taken, no_gpu)), done.window, decoder


def _unknown(taken: Sample, no_gpu: str | None) -> dict[str, str]:
    """Why memory and counters are null."""
    unknown = {name: NOT_LINUX for name in _MEMORY if getattr(taken, name) is None}
    unknown |= {f"counters.{k}": f"{NOT_LINUX}, or it was too short" for k, v in taken.counters.items() if v is None}
    return unknown if no_gpu is None else {**unknown, "gpu_bytes": no_gpu}


_MEMORY = ("peak_load_bytes", "peak_decode_bytes", "anonymous_bytes", "file_bytes", "pss_bytes", "available_drop_bytes")


def main() -> None:
    """Read the ``Job`` from stdin, write a ``Measured`` or a ``ColdLoad`` to stdout."""
    job, tell = job_and_tell(Job)
    load, facts = runtime_of(job)
    if job.only_load:
        tell(asdict(_loaded(job, load)))
        return
    taken, window, decoder = sample(job, load, lambda phase, rate: tell({"phase": phase, "rate": rate}))
    tell(asdict(Measured(taken, window, facts(decoder))))


def runtime_of(job: Job) -> tuple[Load, Facts]:
    """What loads the model and what tells its facts; packages are imported here, which is not loading a model."""
    if job.runtime is None:
        import onnxruntime  # noqa: F401

        return load_bundle, _bundle_facts
    peer = import_module(job.runtime)
    for package in peer.PACKAGES:
        import_module(package)
    made = {} if job.choice is None else {"choice": job.choice}
    return lambda job: peer.load(Path(job.path), job.threads, job.positions, **made), peer.facts


def _loaded(job: Job, load: Load) -> ColdLoad:
    pin(job.cpus)
    before, begin = snapshot(job.cpus).read_bytes, time.monotonic()
    load(job)
    load_s, after = time.monotonic() - begin, snapshot(job.cpus).read_bytes
    return ColdLoad(load_s, None if before is None or after is None else after - before)


def load_bundle(job: Job) -> Decoder:
    """The parent has checked the hashes once; doing it here would time the disk and the hash."""
    return make_decoder(job.path, job.threads, job.positions, job.provider)


def _bundle_facts(decoder: Decoder) -> PeerFacts:
    """Nothing: the parent has the manifest."""
    return PeerFacts()


if __name__ == "__main__":
    main()
