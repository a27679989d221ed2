"""The ratio of models that stay loaded and take turns in bursts of a few tokens.

Where the clock moves (a virtual machine, a phone, a hot board), repetitions in processes of their own see different
clocks, and their ratio is no better known than the clock. Here all models stay loaded, each in its process, and a burst
of one is followed at once by a burst of the next: both see the same clock. Whoever rests is stopped, so that threads
which spin while they wait disturb nobody.

What differs from one load to the next (the pages that a model got, who was loaded first) does not cancel within a load.
So all models are loaded anew every few seconds, in turned order, and a load is one value in the statistics
(:func:`bench.measure.statistics.ratio_of_loads`).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from bench.measure.options import BenchOptions, Setting
from bench.measure.result import LEAST_LOADS, Bursts, Load
from bench.measure.rounds import job_of, turn
from bench.runtimes.peers import Peer, memory_needs
from saap.base.cgroup import available
from saap.base.child import ChildFailedError, Resident
from saap.base.progress import Progress

WORKER = "bench.measure.burst_worker"
BURST_S = 0.03  # a clock was seen to move by a tenth within 0.1 s; a turn costs 0.2 ms
LEAST_STEPS = 2
LOAD_S = 3.0
MOST_LOADS = 60


def take_turns(
    peers: Sequence[Peer],
    setting: Setting,
    plan: BenchOptions,
    progress: Progress | None = None,
    *,
    load_s: float = LOAD_S,
) -> Bursts:
    """Load all peers again and again for ``plan.turns_s``, and let them take turns; a failure is in the answer.

    ``load_s``: of turns in one load.
    """
    found = Bursts(
        [peer.name for peer in peers], setting.prompt, setting.generate, setting.depth, setting.threads, loads=[]
    )
    if told := _too_large(peers, setting, plan):
        return replace(found, failure=told)
    table = _Table(peers, setting, plan, load_s)
    begun, longest, failure = time.monotonic(), 0.0, None
    report = progress or (lambda label, done, total: None)
    report("taking turns (s), load 1", 0, plan.turns_s)
    for number in range(MOST_LOADS):
        started = time.monotonic()
        try:
            found.loads.append(table.load(turn(len(peers), number)))
        except ChildFailedError as error:
            failure = str(error)
            break
        now = time.monotonic()
        longest, spent = max(longest, now - started), now - begun
        if spent + 2 * longest > plan.turns_s and number % 2 and number + 1 >= LEAST_LOADS:  # both orders as often
            break
        if number == 0 and LEAST_LOADS * longest > 2 * plan.turns_s:
            failure = f"a load and a turn take {longest:.0f} s: give --ratio-time {LEAST_LOADS * longest:.0f} or more"
            break
        report(f"taking turns (s), load {number + 2}", min(spent, 0.99 * plan.turns_s), plan.turns_s)
    report("taking turns (s)", plan.turns_s, plan.turns_s)
    return replace(found, failure=failure)


def _too_large(peers: Sequence[Peer], setting: Setting, plan: BenchOptions) -> str | None:
    """Why they cannot all be loaded at once."""
    needs = [memory_needs(peer.kind, peer.model, setting.positions, peer.path) for peer in peers]
    needed, left = sum(sum(parts.values()) for parts in needs), available(plan.root)
    if left is None or needed <= left:
        return None
    return f"all at once need about {needed / 1e6:.0f} MB, and {left / 1e6:.0f} MB are available"


@dataclass(frozen=True)
class _Table:
    """Who sits at the table, and what each is asked to do."""

    peers: Sequence[Peer]
    setting: Setting
    plan: BenchOptions
    load_s: float

    def load(self, order: list[int]) -> Load:
        """Load all in this order, and let them take turns."""
        taken = Load(order, [[] for _ in self.peers], [[] for _ in self.peers])
        vocab = min(peer.vocab_size for peer in self.peers)
        with contextlib.ExitStack() as stack:
            workers, slowest = {}, 0.0
            for index in order:
                peer, job = self.peers[index], job_of(self.peers[index], self.setting, self.plan, vocab)
                environment = peer.environment(job.threads)
                worker = stack.enter_context(Resident(WORKER, self.plan.timeout_s, environment, peer.python))
                slowest = max(slowest, _seconds(worker.ask(asdict(job))))
                worker.rest()
                workers[index] = worker
            until, number = time.monotonic() + self.load_s, 0
            while not number or time.monotonic() < until:
                self._pass(workers, number, self._steps(slowest), taken, until)
                number += 1
        return taken

    def _pass(self, workers: dict[int, Resident], number: int, steps: int, taken: Load, until: float) -> None:
        """The prompt, and then bursts until all steps are done or the time is up; whoever began is second next time."""
        for index in turn(len(workers), number):
            seconds = _seconds(workers[index].ask({"prompt": True}))
            workers[index].rest()
            if self.setting.prompt:
                taken.prefill_s[index].append(seconds)
        for burst in range(self.setting.generate // steps if steps else 0):
            for index in turn(len(workers), number + burst):
                seconds = _seconds(workers[index].ask({"steps": steps}))
                workers[index].rest()
                taken.token_s[index].append(seconds / steps)
            if burst and time.monotonic() > until:
                break

    def _steps(self, step_s: float) -> int:
        """Decode steps of a burst."""
        return min(max(LEAST_STEPS, round(BURST_S / step_s)), self.setting.generate)


def _seconds(answer: dict[str, object]) -> float:
    seconds = answer.get("seconds")
    if not isinstance(seconds, float):
        raise ChildFailedError(f"the worker told no seconds: {answer}")
    return seconds
