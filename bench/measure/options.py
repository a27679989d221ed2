"""Options of a bench run: lengths, depths and threads, how often, and for how long. Light: no numpy, no runtime."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta

from saap.base.cores import physical_cores
from saap.base.errors import UserError
from saap.base.options import THREADS, Option, check_values
from saap.base.values import parse_counts

Counts = int | tuple[int, ...]  # one value, or a sweep
Length = Annotated[int, Meta(ge=0, le=1_000_000)]
Threads = Annotated[int, THREADS]
Lengths = Length | tuple[Length, ...]
LEAST_ROUNDS = 6  # with fewer pairs no test can tell a difference
KNOWN_ROUNDS = 10  # of fewer, an interval may be narrow by luck
MOST_ROUNDS = 60
TURNS_S = 60.0  # for a ratio within 1 % on a virtual machine

Provider = Literal["cpu", "cuda"]  # of ONNX Runtime


@dataclass(frozen=True, order=True)
class Setting:
    """One row of the table: ``depth`` untimed tokens in the cache, ``prompt`` timed ones, ``generate`` timed steps."""

    threads: int
    depth: int
    prompt: int
    generate: int

    @property
    def positions(self) -> int:
        return self.context + self.prompt + self.generate

    @property
    def context(self) -> int:
        """Tokens that go in untimed: a first decode step needs one before it."""
        return max(self.depth, int(self.prompt == 0))


@dataclass(frozen=True)
class BenchOptions:
    """Settings are the product of ``prompt``, ``generate``, ``depth`` and ``threads``."""

    prompt: Annotated[
        Lengths, Option("Prompt tokens; 0 measures decode alone.", flags=("-p", "--prompt"), parse=parse_counts)
    ] = 128
    generate: Annotated[
        Lengths, Option("Generated tokens; 0 measures prefill alone.", flags=("-n", "--generate"), parse=parse_counts)
    ] = 128
    depth: Annotated[
        Lengths, Option("Tokens in the cache before them.", flags=("-d", "--depth"), parse=parse_counts)
    ] = 0
    threads: Annotated[
        Threads | tuple[Threads, ...] | None,
        Option("Default: all physical cores.", flags=("-t", "--threads"), parse=parse_counts),
    ] = None
    repetitions: Annotated[
        Annotated[int, Meta(ge=1, le=10_000)] | None,
        Option(
            "Fresh processes per spec, interleaved; default: 10, then until the rate is known or time is up.",
            flags=("-r", "--repetitions"),
        ),
    ] = None
    precision: Annotated[
        float,
        Option("Half width of the 95 % interval, as a fraction, at which one model's repetitions end."),
        Meta(gt=0, lt=1),
    ] = 0.02
    max_time_s: Annotated[
        float, Option("Seconds: no round begins that would end later.", flags=("--max-time",)), Meta(gt=0)
    ] = 120.0
    ratio_time_s: Annotated[
        Annotated[float, Meta(ge=0)] | None,
        Option(
            "Seconds of turns for a ratio of speeds; default: 60, with -r 0.",
            flags=("--ratio-time",),
        ),
    ] = None
    timeout_s: Annotated[float, Option("Seconds of one process.", flags=("--time-limit",)), Meta(gt=0)] = 600.0
    warmup: Annotated[Length | None, Option("Warm-up steps; default: until they are steady.", shown=False)] = None
    seed: Annotated[int, Option("Of the prompt's tokens, the same for all specs."), Meta(ge=0)] = 0
    provider: Annotated[Provider, Option("Of ONNX Runtime, for bundles.")] = "cpu"
    cold: Annotated[bool, Option("Also time a load from storage.")] = True
    foreign_graph: Annotated[bool, Option("Run a bundle's graph of operators that saap does not write, too.")] = False
    choice: Annotated[
        str | None,
        Option("A setting of a peer's runtime, such as `flash attention off`, instead of trials.", shown=False),
    ] = None
    root: Path = field(default_factory=lambda: Path("/"))  # of /proc and /sys, for a recorded host
    text: tuple[int, ...] = ()  # token ids that every bundle is asked about in the end; empty: none
    greedy: int = 16  # tokens that it should say after them

    @property
    def adaptive(self) -> bool:
        """Whether the spread decides how many repetitions are made.

        At least 6, and no more where several specs take turns. Else at least 10 where time allows, and then until
        ``precision`` is reached for the ratio of each spec to the first (for the rate, where there is one spec only),
        or until ``max_time_s``.
        """
        return self.repetitions is None

    @property
    def turns_s(self) -> float:
        """Seconds of turns in bursts for the ratios of one setting."""
        if self.ratio_time_s is not None:
            return self.ratio_time_s
        return min(TURNS_S, self.max_time_s) if self.adaptive else 0.0

    @property
    def most_rounds(self) -> int:
        return MOST_ROUNDS if self.repetitions is None else self.repetitions

    @property
    def positions(self) -> int:
        """Positions that a cache must hold for any of the settings."""
        return max(setting.positions for setting in self.settings())

    def settings(self) -> list[Setting]:
        """All settings, each once, fewest threads and shortest first."""
        threads = (physical_cores(),) if self.threads is None else counts(self.threads)
        lengths = (counts(values) for values in (self.depth, self.prompt, self.generate))
        settings = (Setting(*numbers) for numbers in product(threads, *lengths))
        return sorted({setting for setting in settings if setting.prompt or setting.generate})

    def check(self) -> None:
        """Refuse what cannot be measured.

        Raises:
            UserError: naming the option.
        """
        check_values(self)
        if not self.settings():
            raise UserError("nothing to time: --prompt and --generate are both 0; give one of them")


def counts(values: Counts) -> tuple[int, ...]:
    return (values,) if isinstance(values, int) else tuple(values)
