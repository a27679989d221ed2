"""The process that times a few stacks against each other: ``python -m bench.costs.worker``, JSON in, one JSON line out.

Several decoders live side by side and take turns of some steps each, forwards and backwards, so that whatever slows
the machine for a second slows all of them. The first step of a turn finds the caches as another stack left them and
is thrown away. Where the kernel tells how long the main thread waited for its core, that is kept beside each step: on
a busy machine it is most of the noise, and no cost of the operators.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from bench.measure.cores import pin
from export.engine.llama_cpp import LlamaCppDecoder
from export.engine.onnxruntime import Logits, OrtDecoder
from export.engine.table import FILES, ONNXRUNTIME
from saap.base.child import job_and_tell

# Steps of a turn that count, and steps before them. Short, for a clock that moves within a tenth of a second.
TURN, SKIPPED = 3, 1
LEAST_TURNS = 4
SCHEDSTAT = Path("/proc/thread-self/schedstat")  # its second number is the time in the run queue

Step = tuple[int, int]  # nanoseconds of a decode step, and of those spent waiting for a core


@dataclass(frozen=True)
class CostsJob:
    """One worker's task; ``seconds`` is how long the turns may take together."""

    paths: list[str]
    threads: int
    cpus: list[int]
    depth: int
    seconds: float
    engine: str = ONNXRUNTIME
    choice: str | None = None  # of the engine's own settings


class Placed(Protocol):
    """A decoder that can be told how much of its cache is filled."""

    def place(self, length: int) -> None:
        """So many positions are in use."""

    def step(self, token_id: int) -> Logits:
        """Append one token."""


class PlacedDecoder(OrtDecoder):
    """A bundle whose cache counts as filled without a prefill: attention takes its time over zeros too."""

    def place(self, length: int) -> None:
        self.length = length
        if self._sliding:
            self._sliding.skip(length)


class PlacedLlamaCpp(LlamaCppDecoder):
    """A file in llama.cpp whose cache is filled once, and cut back for each turn."""

    _filled = 0

    def place(self, length: int) -> None:
        if self._filled < length:
            self.reset()
            self.prefill(np.zeros(length, np.int64))
            self._filled = length
        self.rewind(length)


def take_turns(
    decoders: Sequence[Placed],
    depth: int,
    seconds: float,
    clock: Callable[[], int] = time.perf_counter_ns,
    waited: Callable[[], int] = lambda: 0,
) -> list[list[list[Step]]]:
    """Every step that counts: [decoder][turn][step].

    Args:
        depth: positions in use before the first step of a turn that counts.
        seconds: no turn begins after so many, but each decoder has at least a few.
        clock: nanoseconds.
        waited: nanoseconds that this thread has waited for its core so far.
    """
    steps: list[list[list[Step]]] = [[] for _ in decoders]
    end = clock() + round(seconds * 1e9)
    turn = 0
    while turn < LEAST_TURNS or clock() < end:
        order = list(range(len(decoders)))
        for index in reversed(order) if turn % 2 else order:
            steps[index].append(_turn(decoders[index], depth, clock, waited))
        turn += 1
    return steps


def _turn(decoder: Placed, depth: int, clock: Callable[[], int], waited: Callable[[], int]) -> list[Step]:
    decoder.place(depth - SKIPPED)
    token, steps = 0, []
    for _ in range(SKIPPED + TURN):
        start, before = clock(), waited()  # so that no wait is counted that the time does not hold
        token = int(np.argmax(decoder.step(token)))
        after, end = waited(), clock()
        steps.append((end - start, after - before))
    return steps[SKIPPED:]


@contextlib.contextmanager
def waiting_clock(path: Path = SCHEDSTAT) -> Iterator[Callable[[], int]]:
    """Nanoseconds that the calling thread was ready to run and did not; always 0 where the kernel does not tell."""
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:
        yield lambda: 0
        return
    try:
        yield lambda: int(os.pread(file, 128, 0).split()[1])
    finally:
        os.close(file)


def _loaded(bundle: Path, job: CostsJob) -> Placed:
    positions = job.depth + TURN
    if job.engine == ONNXRUNTIME:
        return PlacedDecoder(bundle, job.threads, positions, verify=False)
    return PlacedLlamaCpp(bundle / FILES[job.engine], job.threads, positions, job.choice, huge_pages=True)


def main() -> None:
    """Read a ``CostsJob`` from stdin, write the nanoseconds of every step to stdout."""
    job, tell = job_and_tell(CostsJob)
    pin(job.cpus)
    decoders = [_loaded(Path(path), job) for path in job.paths]
    take_turns(decoders, job.depth, 0)  # warm-up
    with waiting_clock() as waited:
        steps = np.array(take_turns(decoders, job.depth, job.seconds, waited=waited))
    tell({"samples_ns": steps[..., 0].tolist(), "waited_ns": steps[..., 1].tolist()})


if __name__ == "__main__":
    main()
