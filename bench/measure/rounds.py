"""The loop of a bench run: every round runs each spec once per setting, until enough is known or time is up."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import msgspec

from bench.measure.options import KNOWN_ROUNDS, LEAST_ROUNDS, BenchOptions, Setting
from bench.measure.result import ModelFacts, Sample
from bench.measure.statistics import relative_half_width, typical
from bench.measure.worker import ColdLoad, Measured, Repetition
from bench.power.energy import Recorder
from bench.runtimes.peers import Peer
from export.engine.turns import random_tokens, turn
from saap.base.cgroup import available
from saap.base.child import ChildFailedError, call
from saap.base.progress import Progress, advance

IDLE_S = 2.0
WORKER = "bench.measure.worker"


@dataclass
class Outcome:
    """The answers of one spec's workers so far, in one setting."""

    peer: Peer
    setting: Setting
    job: Repetition
    environment: dict[str, str]  # of its workers
    samples: list[Sample] = field(default_factory=list)
    model: ModelFacts | None = None
    versions: dict[str, str] = field(default_factory=dict)
    failure: str | None = None
    stderr: list[str] = field(default_factory=list)
    unknown: dict[str, str] = field(default_factory=dict)
    cold_load_s: float | None = None

    @property
    def values(self) -> list[float]:
        """The values that the spread is judged by: seconds per token of decode, else of prefill."""
        if self.setting.generate:
            return [typical(s.token_s) for s in self.samples]
        return [s.prefill_s for s in self.samples if s.prefill_s is not None]


class Rounds:
    """Runs the workers, which ``progress`` counts, while the recorder reads the power."""

    def __init__(
        self, peers: Sequence[Peer], plan: BenchOptions, recorder: Recorder, progress: Progress | None
    ) -> None:
        self.plan, self.recorder, self._progress = plan, recorder, progress
        self._orders = [turn(len(peers), number) for number in range(plan.most_rounds)]
        vocab = min(peer.vocab_size for peer in peers)
        self.outcomes = {
            setting: [
                Outcome(peer, setting, job_of(peer, setting, plan, vocab), peer.environment(setting.threads))
                for peer in peers
            ]
            for setting in plan.settings()
        }
        self._idle: tuple[float, float] | None = None
        self._turns = plan.turns_s > 0 and len(peers) > 1  # which tell the ratios, so that rounds need not
        self._order = self._round = 0
        self._total = float(
            len(peers) * len(self.outcomes) * (plan.repetitions or (LEAST_ROUNDS if self._turns else KNOWN_ROUNDS))
        )

    def rest(self) -> None:
        """Pause, so that the power of the idle host is known."""
        if self.recorder.sensor is not None:
            begun = time.monotonic()
            time.sleep(IDLE_S)
            self._idle = (begun, time.monotonic())

    def run(self) -> None:
        """All rounds; a setting whose ratios are known well enough is left out of further ones."""
        begun = time.monotonic()
        active = list(self.outcomes)
        while active and self._round < self.plan.most_rounds:
            started = time.monotonic()
            for setting in active:
                for index in self._orders[self._round]:
                    self._one(self.outcomes[setting][index])
            self._round += 1
            if self.plan.adaptive and self._round >= LEAST_ROUNDS:
                if self._turns:
                    break
                working = {s: [o for o in self.outcomes[s] if o.failure is None] for s in active}
                widths = {setting: half_width(outcomes) for setting, outcomes in working.items() if outcomes}
                known = self.plan.precision if self._round >= KNOWN_ROUNDS else 0.0
                active = [setting for setting, width in widths.items() if width > known]
                now = time.monotonic()
                if now - begun + (now - started) > self.plan.max_time_s:
                    break
                self._estimate({setting: widths[setting] for setting in active}, begun, now)
        advance(self._progress, "bench (runs)", self._order, self._order)

    def load_cold(self) -> None:
        """One load per spec with its files dropped from the page cache first."""
        first = next(iter(self.outcomes.values()))
        for index, outcome in enumerate(first):
            advance(self._progress, f"loading from storage (models), {outcome.peer.name}", index, len(first))
            seconds, reason = cold_load(outcome, self.plan.timeout_s)
            for others in self.outcomes.values():
                others[index].cold_load_s = seconds
                if reason:
                    others[index].unknown["cold_load_s"] = reason

    def _one(self, outcome: Outcome) -> None:
        """One process of a spec that has not failed before."""
        self._say(outcome, f"round {self._round + 1}")
        if outcome.failure is None:
            memory = available(self.plan.root)
            job = replace(outcome.job, order=self._order, spawned_at=time.monotonic(), available_before=memory)
            try:
                answer = call(
                    WORKER, asdict(job), self.plan.timeout_s, outcome.environment, outcome.peer.python,
                    lambda note: self._say(outcome, f"round {self._round + 1}, {_rate(note)}"),
                )  # fmt: skip
            except ChildFailedError as error:
                outcome.failure, outcome.stderr = str(error), error.stderr
            else:
                self._keep(outcome, msgspec.convert(answer, Measured))
        self._order += 1

    def _keep(self, outcome: Outcome, answer: Measured) -> None:
        energy, why = self.recorder.energy(*answer.window, idle=self._idle)
        unknown = answer.sample.unknown | ({} if energy else {"energy": why or "no decode window"})
        outcome.samples.append(replace(answer.sample, energy=energy, unknown=unknown))
        if answer.model is not None:
            spelling = outcome.peer.model.spelling
            outcome.model = replace(answer.model, vocab_size=outcome.peer.vocab_size, spelling=spelling)
        outcome.versions |= answer.versions

    def _estimate(self, widths: dict[Setting, float], begun: float, now: float) -> None:
        """Estimate the number of processes: an interval shrinks with the root of it, and time is limited."""
        each = (now - begun) / max(1, self._order)
        left = 0.0
        for setting, width in widths.items():
            wider = width / self.plan.precision
            rounds = min(self._round * (wider**2 - 1), self.plan.most_rounds - self._round)
            left += max(1.0, rounds) * len(self.outcomes[setting])
        by_time = max(0.0, self.plan.max_time_s - (now - begun)) / each
        self._total = self._order + min(left, by_time)

    def _say(self, outcome: Outcome, what: str) -> None:
        total = max(self._total, self._order + 1)
        advance(self._progress, f"bench (runs), {outcome.peer.name}: {what}", self._order, total)


def job_of(peer: Peer, setting: Setting, plan: BenchOptions, vocab_size: int) -> Repetition:
    """Make a worker's job for one model; all models get tokens that each of them knows."""
    tokens = random_tokens(setting.context + setting.prompt, vocab_size, plan.seed)
    job = replace(
        peer.job(setting.threads, setting.positions, plan.provider),
        context=tokens[: setting.context],
        prompt=tokens[setting.context :],
        n_gen=setting.generate,
        warmup=plan.warmup,
    )
    return Repetition(**vars(job), root=str(plan.root))


def half_width(outcomes: Sequence[Outcome]) -> float:
    """Widest half of a 95 % interval, as a fraction: of each ratio to the first spec, or of the only spec's rate."""
    base, *others = [outcome.values for outcome in outcomes]
    if not others:
        return relative_half_width([1.0] * len(base), base, paired=True)
    return max(relative_half_width(base, other, paired=True) for other in others)


def cold_load(outcome: Outcome, timeout_s: float) -> tuple[float | None, str | None]:
    """Seconds of a load from storage, or None and why it is not known."""
    path = outcome.peer.path
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    total = sum(drop_from_cache(file) for file in files)
    try:
        job = asdict(replace(outcome.job, only_load=True))
        answer = call(WORKER, job, timeout_s, outcome.environment, outcome.peer.python)
    except ChildFailedError as error:
        return None, str(error)
    load = msgspec.convert(answer, ColdLoad)
    if load.read_bytes is None:
        return None, "this kernel does not tell what a process reads"
    if 2 * load.read_bytes < total:
        return None, f"the system kept the files: {load.read_bytes} bytes of {total} were read"
    return load.load_s, None


def drop_from_cache(path: Path) -> int:
    """Ask the system to forget the file's pages; its size in bytes."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if hasattr(os, "posix_fadvise"):
            os.fsync(file.fileno())  # pages that are not written yet cannot be dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return size


def _rate(note: dict[str, object]) -> str:
    rate = note.get("rate")
    return f"{rate:.1f} tok/s" if isinstance(rate, float) and rate else str(note.get("phase", ""))
