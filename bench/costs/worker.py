"""The process that times a few stacks against each other: ``python -m bench.costs.worker``, JSON in, one JSON line out.

Several stacks live side by side and take turns of some steps each, forwards and backwards, so that whatever slows
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

from export.engine.onnxruntime import OnnxRuntimeEngine
from export.engine.protocol import Engine, EngineOptions, Logits
from export.engine.table import ONNXRUNTIME, row_of
from saap.base.child import job_and_tell
from saap.base.cores import pin

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


class Stack(Protocol):
    """A model whose cache can be filled up to a position."""

    def place(self, length: int) -> None:
        """Let a number of positions be in use."""

    def step(self, token_id: int) -> Logits:
        """Append one token."""


class UnfilledStack(OnnxRuntimeEngine):
    """A bundle whose cache counts as filled without a prefill: attention takes its time over zeros too."""

    def place(self, length: int) -> None:
        self.length = length
        if self._sliding:
            self._sliding.skip(length)


class FilledStack:
    """A model in another engine, whose cache is filled once and cut back for each turn."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._filled = engine, 0
        self.step = engine.step

    def place(self, length: int) -> None:
        if self._filled < length:
            self._engine.rewind(0)
            self._engine.prefill(np.zeros(length, np.int64))
            self._filled = length
        self._engine.rewind(length)


def steps_in_turns(
    stacks: Sequence[Stack],
    depth: int,
    seconds: float,
    clock: Callable[[], int] = time.perf_counter_ns,
    waited: Callable[[], int] = lambda: 0,
) -> list[list[list[Step]]]:
    """Every step that counts: [stack][turn][step].

    Args:
        depth: positions in use before the first step of a turn that counts.
        seconds: no turn begins after so many, but each stack has at least a few.
        clock: nanoseconds.
        waited: nanoseconds that this thread has waited for its core so far.
    """
    steps: list[list[list[Step]]] = [[] for _ in stacks]
    end = clock() + round(seconds * 1e9)
    turn = 0
    while turn < LEAST_TURNS or clock() < end:
        order = list(range(len(stacks)))
        for index in reversed(order) if turn % 2 else order:
            steps[index].append(_turn(stacks[index], depth, clock, waited))
        turn += 1
    return steps


def _turn(stack: Stack, depth: int, clock: Callable[[], int], waited: Callable[[], int]) -> list[Step]:
    stack.place(depth - SKIPPED)
    token, steps = 0, []
    for _ in range(SKIPPED + TURN):
        start, before = clock(), waited()  # so that no wait is counted that the time does not hold
        token = int(np.argmax(stack.step(token)))
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


def _loaded(bundle: Path, job: CostsJob) -> Stack:
    options = EngineOptions(job.threads, job.depth + TURN, choice=job.choice)
    if job.engine == ONNXRUNTIME:
        return UnfilledStack(bundle, options)
    row = row_of(job.engine)
    return FilledStack(row.open(bundle / row.file if row.file else bundle, options))


def main() -> None:
    """Read a ``CostsJob`` from stdin, write the nanoseconds of every step to stdout."""
    job, tell = job_and_tell(CostsJob)
    pin(job.cpus)
    stacks = [_loaded(Path(path), job) for path in job.paths]
    steps_in_turns(stacks, job.depth, 0)  # warm-up
    with waiting_clock() as waited:
        steps = np.array(steps_in_turns(stacks, job.depth, job.seconds, waited=waited))
    tell({"samples_ns": steps[..., 0].tolist(), "waited_ns": steps[..., 1].tolist()})


if __name__ == "__main__":
    main()
