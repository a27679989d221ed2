"""The number of tokens that fit into given minutes, by this machine's own rate of matrix products.

The answer is known before the first step, so that schedule, text and the teacher's answers are those of any other run.
It is kept beside the output until that is there: a run that was killed goes on with the same number.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from saap.base.errors import UserError
from saap.base.files import write_text
from saap.base.progress import Progress, note
from saap.models.architectures import shape_of
from saap.models.checkpoint import read_config
from saap.models.shape import ModelShape
from saap.system.precision import autocast_dtype, product_rate
from saap.system.processes import training_device
from saap.tune.loop.state import state_directory
from saap.tune.needs import placement_of
from saap.tune.options import TuneOptions

# Measured with SmolLM2-135M on a Zen 3.
OF_RATE = 0.65  # of the rate of a lone product is what a step and the teacher reach
PER_WEIGHT = 25_000  # operations' time that choosing a weight's integer takes, beside the passes over the text
START_S = 20.0  # until the model is there, and from the last step until it is written
MEASURED_S = 0.5


@dataclass(frozen=True)
class Pace:
    """Seconds that tuning takes: whatever is learnt, and for each token."""

    fixed_s: float
    token_s: float

    def tokens_in(self, minutes: float, options: TuneOptions) -> int:
        """Count the tokens that fit, in whole steps. Raises UserError: not even one step does."""
        step = options.training.rows_per_step * options.length
        steps = int((60 * minutes - self.fixed_s) / (step * self.token_s))
        if steps < 1:
            least = (self.fixed_s + step * self.token_s) / 60
            raise UserError(
                f"--minutes {minutes:g} is too short: choosing the integers and one step take about {least:.1f} "
                "minutes here: give more"
            )
        return steps * step


def pace_of(shape: ModelShape, teacher: ModelShape | None, options: TuneOptions, *, recomputed: bool) -> Pace:
    """Estimate the pace of a model on this machine as it is now.

    Args:
        teacher: whose answers are asked for; None: nobody's.
        recomputed: activations are computed again in the backward pass.
    """
    device, training = training_device(), options.training
    dtype = autocast_dtype(training.precision, device) or torch.float32
    rows, width = training.rows_per_step * options.length, max(sizes.ffn for sizes in shape.layers)  # the widest FFN
    rate = OF_RATE * product_rate(rows, shape.hidden, width, dtype, device, MEASURED_S)
    # Two operations a weight: forward, backward to the inputs and, of what is trained, to the weights or their scales.
    passes, of_head = 3 + recomputed, 2 + (options.train == "all")
    learning = 2 * training.passes * (passes * shape.layer_weights + of_head * shape.vocab * shape.hidden)
    asking = 0 if teacher is None else 2 * (teacher.layer_weights + teacher.vocab * teacher.hidden)
    integers = 0.0
    if options.train == "scales" and options.integers == "gptq":
        read = 2 * options.calibration_rows * options.length * 2 * shape.layer_weights
        integers = (read + PER_WEIGHT * shape.parameters) / rate
    return Pace(START_S + integers, (learning + asking) / rate)


def timed(
    options: TuneOptions, model: Path, teacher: Path | None, kept: KeptTokens, progress: Progress | None
) -> TuneOptions:
    """Give the options as many tokens as fit into their minutes. Raises UserError: not one step does."""
    if "WORLD_SIZE" in os.environ:
        raise UserError("--minutes is for one process: give --tokens")
    if (tokens := kept.read()) is None:
        shape = shape_of(read_config(model))
        answering = shape_of(read_config(teacher)) if teacher and options.teacher_weight else None
        recomputed = placement_of(shape, options.length, options).recomputed
        pace = pace_of(shape, answering, options, recomputed=recomputed)
        tokens = pace.tokens_in(kept.minutes, options)
        note(progress, f"--minutes {kept.minutes:g} is about {tokens:,} tokens here, {1 / pace.token_s:.0f} a second")
    return replace(options, tokens=tokens)


class KeptTokens:
    """The number of tokens that a budget came to, beside an output that is not there yet."""

    def __init__(self, out: Path, minutes: float) -> None:
        self.minutes = minutes
        self._path = state_directory(out) / f"minutes-{minutes:g}.json"

    def read(self) -> int | None:
        """None where no run of these minutes was begun."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            tokens = json.loads(self._path.read_text(encoding="utf-8"))["tokens"]
            return tokens if isinstance(tokens, int) and tokens > 0 else None
        return None

    def write(self, tokens: int) -> None:
        write_text(self._path, json.dumps({"tokens": tokens}))

    def discard(self) -> None:
        """Forget the number, once the output is written."""
        self._path.unlink(missing_ok=True)
        with suppress(OSError):
            self._path.parent.rmdir()
