"""What a bench run measures: lengths, depths and threads, how often, and for how long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from bench.measure.cores import physical_cores
from bench.runtimes.peer import PeerError
from bench.runtimes.providers import EXECUTION

Counts = int | Sequence[int]  # one value, or a sweep
LEAST_ROUNDS = 6  # with fewer pairs no test can tell a difference
KNOWN_ROUNDS = 10  # of fewer, an interval may be narrow by luck
MOST_ROUNDS = 60


@dataclass(frozen=True, order=True)
class Setting:
    """One row of the table: ``depth`` untimed tokens in the cache, ``prompt`` timed ones, ``generate`` timed steps."""

    threads: int
    depth: int
    prompt: int
    generate: int

    @property
    def positions(self) -> int:
        """Positions of the cache that are needed."""
        return self.context + self.prompt + self.generate

    @property
    def context(self) -> int:
        """Tokens that go in untimed: a first decode step needs one before it."""
        return max(self.depth, int(self.prompt == 0))


@dataclass(frozen=True)
class Plan:
    """Settings are the product of ``prompt``, ``generate``, ``depth`` and ``threads``, and ``pairs`` beside them.

    Attributes:
        prompt: tokens of the one prefill call; 0 measures decode alone.
        generate: decode steps; end-of-text tokens do not end them; 0 measures prefill alone.
        depth: tokens that are in the cache before.
        threads: of every spec; None is the number of physical cores.
        pairs: (prompt, generate) that are measured beside the product, as llama-bench's -pg.
        repetitions: fresh processes per spec and setting, interleaved. None: at least 6, at least 10 where time allows,
            and then until ``precision`` or ``max_time_s``.
        precision: half width of the 95 % interval, as a fraction, of each ratio to the first spec (of the rate, where
            there is one spec only) at which repetitions may end.
        max_time_s: no round is begun that would end later; the least repetitions are made all the same.
        warmup: steps before the measured pass; None: until they are steady.
        timeout_s: limit of one process; a spec that exceeds it, or crashes, is INVALID and not tried again.
        seed: of the prompt's tokens, the same for all specs and valid in all their vocabularies.
        provider: of ONNX Runtime, for bundles.
        cuda_graph: replay decode steps as a CUDA graph.
        cool_down_s: longest wait before a repetition until the cores are within 3 degrees of their start.
        cold: load once more with the files dropped from the page cache.
        root: of /proc and /sys, for a recorded host.
        text: token ids that every bundle is asked about in the end (bench.measure.answers); empty: none.
        greedy: tokens that it shall say after them.
    """

    prompt: Counts = 128
    generate: Counts = 128
    depth: Counts = 0
    threads: Counts | None = None
    pairs: Sequence[tuple[int, int]] = ()
    repetitions: int | None = None
    precision: float = 0.02
    max_time_s: float = 120.0
    warmup: int | None = None
    timeout_s: float = 600.0
    seed: int = 0
    provider: str = "cpu"
    cuda_graph: bool = False
    cool_down_s: float = 0.0
    cold: bool = True
    root: Path = field(default_factory=lambda: Path("/"))
    text: Sequence[int] = ()
    greedy: int = 16

    @property
    def adaptive(self) -> bool:
        """Whether the spread decides how many repetitions are made."""
        return self.repetitions is None

    @property
    def most_rounds(self) -> int:
        """Repetitions that are made at most."""
        return MOST_ROUNDS if self.repetitions is None else self.repetitions

    def settings(self) -> list[Setting]:
        """All settings, each once, fewest threads and shortest first."""
        threads = [physical_cores()] if self.threads is None else counts(self.threads)
        lengths = [*product(counts(self.prompt), counts(self.generate)), *self.pairs]
        found = (Setting(t, d, p, n) for t, d, (p, n) in product(threads, counts(self.depth), lengths))
        return sorted({setting for setting in found if setting.prompt or setting.generate})

    def check(self) -> None:
        """Refuse what cannot be measured.

        Raises:
            PeerError: naming the option.
        """
        for name, least in (("prompt", 0), ("generate", 0), ("depth", 0)):
            for value in counts(getattr(self, name)):
                if value < least:
                    raise PeerError(f"--{name} {value} cannot be measured: give {least} or more")
        if any(value < 0 for pair in self.pairs for value in pair):
            raise PeerError("-pg takes a prompt and a generated length of 0 or more, such as 512,128")
        if not self.settings():
            raise PeerError("nothing to time: --prompt and --generate are both 0; give one of them")
        if self.repetitions is not None and self.repetitions < 1:
            raise PeerError(f"--repetitions {self.repetitions} cannot be measured: give 1 or more")
        if self.warmup is not None and self.warmup < 0:
            raise PeerError(f"{self.warmup} warm-up steps cannot be made: give 0 or more")
        if not self.timeout_s > 0 or not self.max_time_s > 0:
            raise PeerError("a time limit of 0 s or less ends every measurement: give more")
        if not self.cool_down_s >= 0:
            raise PeerError(f"--cool-down {self.cool_down_s} s cannot be waited: give 0 or more")
        if not 0 < self.precision < 1:
            raise PeerError(f"--precision {self.precision} is no fraction: give e.g. 0.02 for 2 %")
        if self.provider not in EXECUTION:
            raise PeerError(f"--provider {self.provider} is not known: give {', '.join(EXECUTION)}")


def counts(values: Counts) -> tuple[int, ...]:
    """One value or several, as a tuple."""
    return (values,) if isinstance(values, int) else tuple(values)
