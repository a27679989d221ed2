"""The process that holds a model in an engine: ``python -m export.engine.worker``, a JSON line for a JSON line.

The first line is the ``Job``; its answer, the seconds of a decode step, comes once the model is loaded and warm. Each
line after it is a request: the prompt from an empty cache or some decode steps, answered with their seconds; or
logits of rows of tokens, or what the model says to a text.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import msgspec
import numpy as np

from export.engine.protocol import Engine, EngineOptions, Ids, Logits, greedy
from saap.base.child import end_with_parent
from saap.base.cores import pin
from saap.base.memory_limit import limit_memory

Clock = Callable[[], float]
Answer = dict[str, object]

WINDOW = 8  # steps of each of the two windows that are compared
STEADY = 0.03  # relative difference of their medians
MOST_WARM_UP = 64


@dataclass(frozen=True)
class Job:
    """A model to hold, and what is timed of it: ``context`` goes in untimed before ``prompt``, then ``n_gen`` steps."""

    module: str  # of the engine
    source: str  # what it opens
    options: EngineOptions
    packages: list[str] = field(default_factory=list)  # imported before the model is loaded
    cpus: list[int] = field(default_factory=list)  # to pin to; none: all
    most_bytes: int | None = None  # that the process may take for the model; None: all
    context: list[int] = field(default_factory=list)
    prompt: list[int] = field(default_factory=list)
    n_gen: int = 0
    warmup: int | None = None  # passes of the warm-up; None: until steps are steady

    def open(self) -> Engine:
        """Load the model in this process."""
        engine: Engine = import_module(self.module).open(Path(self.source), self.options)
        return engine

    def prepare(self) -> None:
        """Import what the engine needs, and stay on the job's cores."""
        for package in self.packages:
            import_module(package)
        if self.cpus:
            pin(self.cpus)
        if self.most_bytes is not None:
            limit_memory(self.most_bytes)


class Prompt(msgspec.Struct, tag="prompt"):
    """Empty the cache, read the context, and time the prompt."""


class Steps(msgspec.Struct, tag="steps"):
    """Time some decode steps after what came before."""

    count: int


class Rows(msgspec.Struct, tag="rows"):
    """Write the logits after every token of some rows to a .npy file."""

    ids: list[list[int]]
    out: str


class Text(msgspec.Struct, tag="text"):
    """Continue a text greedily, and take its likelihood."""

    ids: list[int]
    greedy: int


def warm_up(
    engine: Engine, prompt: Ids, steps: int | None, clock: Clock, context: Ids | None = None, most: int = MOST_WARM_UP
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
    engine.rewind(0)
    start = clock()
    for ids in (context, prompt):
        if ids is not None and len(ids):
            logits = engine.prefill(ids)
    token = engine.next_token(logits)
    times, now = [clock() - start], clock()
    for _ in range(min(most, MOST_WARM_UP) if steps is None else min(most, steps - 1)):
        token = engine.next_token(engine.step(token))
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


class Worker:
    """A model that is loaded, and answers requests."""

    def __init__(self, job: Job, engine: Engine, clock: Clock = time.perf_counter) -> None:
        self._engine, self._clock, self._token = engine, clock, 0
        self._prompt, self._context = np.asarray(job.prompt, np.int64), np.asarray(job.context, np.int64)
        self._job = job

    def warm_up(self) -> Answer:
        """Make it ready for what the job times."""
        if not self._job.prompt and not self._job.context:
            return {"seconds": 1.0}
        times, _ = warm_up(self._engine, self._prompt, self._job.warmup, self._clock, self._context, self._job.n_gen)
        return {"seconds": float(np.median(times[1:] or times or [1.0]))}

    def answer(self, request: Prompt | Steps | Rows | Text) -> Answer:
        """Do what a request asks for."""
        if isinstance(request, Rows):
            np.save(request.out, self._engine.logits(np.asarray(request.ids, np.int64)))
            return {"rows": len(request.ids)}
        if isinstance(request, Text):
            return continued(self._engine, request.ids, request.greedy)
        return {"seconds": self._prefill() if isinstance(request, Prompt) else self._steps(request.count)}

    def _prefill(self) -> float:
        engine = self._engine
        engine.rewind(0)
        if len(self._context):
            logits = engine.prefill(self._context)
        start = self._clock()
        if len(self._prompt):
            logits = engine.prefill(self._prompt)
        self._token = engine.next_token(logits)
        return self._clock() - start

    def _steps(self, count: int) -> float:
        engine, token = self._engine, self._token
        start = self._clock()
        for _ in range(count):
            token = engine.next_token(engine.step(token))
        seconds, self._token = self._clock() - start, token
        return seconds


def continued(engine: Engine, ids: list[int], count: int) -> Answer:
    """Greedy tokens after a text of two tokens or more, and the text's likelihood.

    The likelihood is taken step by step and the tokens after one prefill, so both paths are looked at. A likelihood
    that is no number is None, which JSON can hold: a board's result has to arrive to be called worse.

    Returns ``{"tokens": [greedy ids], "nll": nats per token}``.
    """
    engine.rewind(0)
    logits = engine.prefill(np.asarray(ids[:1], np.int64))
    losses = []
    for token in ids[1:]:
        losses.append(_loss(logits, token))
        logits = engine.step(token)
    nll = float(np.mean(losses))
    return {"tokens": greedy(engine, ids, count)[:count], "nll": nll if math.isfinite(nll) else None}


def _loss(logits: Logits, token: int) -> float:
    """-log softmax, in float64 so that the sum over the vocabulary adds no error of its own."""
    row = np.asarray(logits, np.float64)
    top = row.max()
    return float(top + np.log(np.exp(row - top).sum()) - row[token])


def main() -> None:
    """Answer until no more requests come."""
    end_with_parent()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print

    def tell(answer: Answer) -> None:
        out.write(json.dumps(answer) + "\n")
        out.flush()

    job = msgspec.json.decode(sys.stdin.buffer.readline(), type=Job)
    job.prepare()
    worker = Worker(job, job.open())
    tell(worker.warm_up())
    for line in sys.stdin.buffer:
        tell(worker.answer(msgspec.json.decode(line, type=Prompt | Steps | Rows | Text)))


if __name__ == "__main__":
    main()
