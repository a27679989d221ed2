"""Models that stay loaded, each in a process, and take turns in bursts of a few tokens.

Where the clock moves (a virtual machine, a phone, a hot board), repetitions in processes of their own see different
clocks, and their ratio is no better known than the clock. Here all models stay loaded, and a burst of one is followed
at once by a burst of the next: both see the same clock. A model that waits for its turn is stopped, so that threads
which spin while they wait disturb nobody.

What differs from one load to the next (the pages that a model got, which was loaded first) does not cancel within a
load. So all models are loaded anew every few seconds, in turned order, and a load is one value in the statistics
(:func:`bench.measure.statistics.ratio_of_loads`).
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from export.engine.process import EngineProcess
from export.engine.worker import Job
from saap.base.child import ChildFailedError
from saap.base.progress import Progress, advance

BURST_S = 0.03  # a clock was seen to move by a tenth within 0.1 s; a turn costs 0.2 ms
LEAST_STEPS = 2
LOAD_S = 3.0
LEAST_LOADS, MOST_LOADS = 4, 60  # an interval of a ratio needs two of each order


@dataclass(frozen=True)
class Contender:
    """A model that takes turns with others."""

    name: str
    job: Job
    python: str = sys.executable
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Load:
    """All models loaded once, and the turns that they took; what stands at one place was measured in one turn."""

    order: list[int]  # in which they were loaded, by index
    prefill_s: list[list[float]]  # [model][turn], of the prompt
    token_s: list[list[float]]  # [model][turn], mean of a burst's decode steps


def take_turns(
    contenders: Sequence[Contender],
    seconds: float,
    progress: Progress | None = None,
    *,
    load_s: float | None = None,
    timeout_s: float = 600.0,
) -> tuple[list[Load], str | None]:
    """Load all models again and again for so many seconds, and let them take turns.

    Args:
        load_s: seconds of turns in one load.
        timeout_s: of one answer.

    Returns:
        The loads, and why there are no more or none.
    """
    loads: list[Load] = []
    begun, longest, failure = time.monotonic(), 0.0, None
    advance(progress, "taking turns (s), load 1", 0, seconds)
    for number in range(MOST_LOADS):
        started = time.monotonic()
        try:
            loads.append(one_load(contenders, turn(len(contenders), number), load_s or LOAD_S, timeout_s))
        except ChildFailedError as error:
            failure = str(error)
            break
        now = time.monotonic()
        longest, spent = max(longest, now - started), now - begun
        if spent + 2 * longest > seconds and number % 2 and number + 1 >= LEAST_LOADS:  # both orders as often
            break
        if number == 0 and LEAST_LOADS * longest > 2 * seconds:
            failure = f"a load and a turn take {longest:.0f} s: give --ratio-time {LEAST_LOADS * longest:.0f} or more"
            break
        advance(progress, f"taking turns (s), load {number + 2}", min(spent, 0.99 * seconds), seconds)
    advance(progress, "taking turns (s)", seconds, seconds)
    return loads, failure


def one_load(contenders: Sequence[Contender], order: list[int], load_s: float, timeout_s: float) -> Load:
    """Load all models in this order, and let them take turns.

    Raises ChildFailedError: a process that ended, hung, or gave no seconds.
    """
    load = Load(order, [[] for _ in contenders], [[] for _ in contenders])
    job = contenders[0].job  # prompts and steps are alike
    with contextlib.ExitStack() as stack:
        processes, slowest = {}, 0.0
        for index in order:
            each = contenders[index]
            process = stack.enter_context(EngineProcess(each.job, each.python, each.environment, timeout_s))
            slowest = max(slowest, process.step_s)
            process.rest()
            processes[index] = process
        steps = min(max(LEAST_STEPS, round(BURST_S / slowest)), job.n_gen)
        until, number = time.monotonic() + load_s, 0
        while not number or time.monotonic() < until:
            _pass(processes, load, number, steps, until)
            number += 1
    return load


def _pass(processes: Mapping[int, EngineProcess], load: Load, number: int, steps: int, until: float) -> None:
    """Time the prompt, then bursts until all steps are done or the time is up; the first is second next time."""
    job = processes[0].job
    for index in turn(len(processes), number):
        seconds = processes[index].prompt()
        processes[index].rest()
        if job.prompt:
            load.prefill_s[index].append(seconds)
    for burst in range(job.n_gen // steps if steps else 0):
        for index in turn(len(processes), number + burst):
            seconds = processes[index].steps(steps)
            processes[index].rest()
            load.token_s[index].append(seconds / steps)
        if burst and time.monotonic() > until:
            break


def turn(count: int, repetition: int) -> list[int]:
    """Order the models of a round by index: forwards and backwards in turn.

    With more than two models the start also moves on, so that none is always in the middle.
    """
    shift = repetition // 2 % count
    order = [*range(shift, count), *range(shift)]
    return order[::-1] if repetition % 2 else order


def random_tokens(count: int, vocab_size: int, seed: int) -> list[int]:
    """Token ids, uniform over the vocabulary, the same for the same arguments."""
    return [int(i) for i in np.random.default_rng(seed).integers(vocab_size, size=count)]
