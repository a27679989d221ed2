"""What a training run is asked to do, and what it says it did."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

from msgspec import Meta

from devices.common.options import Option
from saap.system.errors import UserError

if TYPE_CHECKING:
    from saap.tune.loop.processes import Batch

SMOOTHED = 8  # steps whose mean loss is shown
Precision = Literal["auto", "bf16", "fp32"]
_RUNS = "How it runs"


def _patience(text: str) -> int | None:
    return int(text) or None


@dataclass(frozen=True)
class TrainOptions:
    """Schedule, precision and memory of a training run."""

    rows_per_step: Annotated[
        int, Option("Sequences per step, split over the processes.", _RUNS, flags=("--batch",)), Meta(ge=1)
    ] = 4
    micro_rows: Annotated[
        int | None,
        Option("Sequences at once; fewer take less memory.", _RUNS, flags=("--micro-batch",), hidden=True),
        Meta(ge=1),
    ] = None  # a process's whole share
    passes: Annotated[int, Option("Passes over the text, in the same order.", _RUNS, shown=False), Meta(ge=1)] = 1
    warmup_share: Annotated[float, Option("Share of the steps that warm up.", _RUNS, shown=False), Meta(ge=0, le=1)] = (
        0.1
    )
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: Annotated[float, Option("Weight decay.", _RUNS, shown=False), Meta(ge=0)] = 0.0
    clip: Annotated[
        float | None, Option("Largest norm of the gradient of all groups; none: no limit.", _RUNS, shown=False)
    ] = 1.0
    precision: Annotated[Precision, Option("Precision of the forward and backward passes.", _RUNS, hidden=True)] = (
        "auto"
    )
    checkpointing: Annotated[
        bool, Option("Recompute activations: less memory, a third more time.", _RUNS, hidden=True)
    ] = True
    evaluations: Annotated[
        int, Option("Evaluations on held-out text, evenly spread over the run.", _RUNS, shown=False), Meta(ge=1)
    ] = 10
    patience: Annotated[
        int | None,
        Option("Evaluations without a better one before it stops; 0: never.", _RUNS, parse=_patience),
        Meta(ge=1),
    ] = 3
    save_seconds: Annotated[
        float, Option("Seconds between two states on disk: what a kill can cost.", _RUNS, shown=False), Meta(ge=0)
    ] = 60.0
    seed: Annotated[int, Option("Random seed.", _RUNS)] = 0


@dataclass
class History:
    """What happened in a run.

    Attributes:
        steps: planned.
        losses: of every step taken, in nats per learnt token, before its update.
        held_out: (steps taken, loss) of every evaluation.
        best_step: after how many steps the parameters were what they are now.
        stopped: why the run ended before ``steps``; None if it did not.
        resumed_at: the step it was continued at after a kill.
        precision: "bf16" or "fp32".
        tokens: in the rows of the steps taken, learnt or not.
        seconds: spent on the steps, evaluations not included.
    """

    steps: int
    losses: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    best_step: int = 0
    stopped: str | None = None
    resumed_at: int | None = None
    precision: str = "fp32"
    tokens: int = 0
    seconds: float = 0.0

    def said(self) -> str:
        """The run so far, for a progress bar; the loss is a mean over the last few steps."""
        recent = self.losses[-SMOOTHED:]
        held_out = f", held-out {self.held_out[-1][1]:.3f}" if self.held_out else ""
        speed = self.tokens / max(self.seconds, 1e-9)
        return f"loss {sum(recent) / len(recent):.3f}{held_out}, {speed:.0f} tokens/s"

    def kept(self) -> str:
        """Which state is the best, in words."""
        known = f" (held-out loss {min(loss for _, loss in self.held_out):.3f})" if self.held_out else ""
        return f"the state of step {self.best_step}{known}"


class DivergedError(UserError):
    """A loss or gradient stopped being finite; the model holds the state that the message names.

    It is an error, so that nobody writes out such a run without noticing; who wants to, catches it and does.
    """

    def __init__(self, message: str, step: int, history: History) -> None:
        super().__init__(message)
        self.step = step
        self.history = history


def cosine(steps: int, warmup_share: float) -> Callable[[int], float]:
    """Factor of the learning rate per step: linear warm-up, then a cosine to a tenth."""
    warmup = max(1, round(steps * warmup_share))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, steps - warmup)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * done))

    return factor


def steps_of(rows: Batch, options: TrainOptions, processes: int) -> int:
    """How many steps the rows are good for.

    Raises:
        UserError: too few rows, rows that cannot be split over the processes, or a step that teaches nothing.
    """
    size, count = options.rows_per_step, len(rows["ids"])
    if any(len(tensor) != count for tensor in rows.values()):
        raise ValueError(f"rows of different numbers: { {name: len(tensor) for name, tensor in rows.items()} }")
    for value, name in ((size, "rows per step"), (options.passes, "passes"), (options.evaluations, "evaluations")):
        if value < 1:
            raise UserError(f"{value} {name} are not allowed: give 1 or more")
    if size % processes:
        raise UserError(f"{size} rows per step cannot be split over {processes} processes: give a multiple of them")
    if count < size:
        raise UserError(f"{count} sequences of training text are fewer than one step's {size}: give more")
    once = count // size
    if "labels" in rows:
        learnt = (rows["labels"][: once * size, 1:] != -100).view(once, -1).sum(1)
        if (empty := (learnt == 0).nonzero()).numel():
            first = int(empty[0]) * size
            raise UserError(f"rows {first + 1} to {first + size} hold no token to learn: leave such rows out")
    return once * options.passes
