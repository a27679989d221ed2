"""What a tuning run is asked to do."""

from __future__ import annotations

from dataclasses import dataclass, field

from saap.system.errors import UserError
from saap.tune.adapters import GroupAdapterConfig
from saap.tune.loop.options import TrainOptions

BITS, BLOCKS, INTEGERS = (4, 8), (32, 64, 128), ("gptq", "nearest")
FOLDS = ("scale", "zero-point")
# Peaks. On held text half that of scales was worse with 25,000 to 400,000 tokens, twice with 25,000 (studies/tuning).
RATES = {"scale": 6e-3, "zero-point": 2e-3}


@dataclass(frozen=True)
class TuneOptions:
    """Precision, what is trained, and from whom it is learnt.

    Attributes:
        bits, block: of the linears; ``block`` consecutive input columns share a scale.
        head_bits: of embedding and head, which are quantised and not trained; None is ``bits``.
        symmetric: zero points of the layers' linears are 2^(bits-1), which needs none at run time.
        max_bytes: of the bundle's weights file; matrices get 4 or 8 bit as loses least
        (:mod:`saap.quantize.mixed_bits`), and
            ``bits`` and ``head_bits`` mean nothing.
        integers: ``gptq`` (:mod:`saap.quantize.gptq`) or ``nearest``, which takes each matrix by itself.
        calibration_rows: sequences that gptq looks at, the first of the text.
        fold: what is trained for each group, one of :data:`FOLDS`.
        rank: of the fold's low-rank form; None is a free factor per group.
        learning_rate: peak, of the fold's parameters; None is the fold's own.
        norm_rate: peak for the weights of the norms.
        teacher_weight: share of the loss that is KL to the teacher, where there is one.
        temperature: of both sides of that KL.
        kept_tokens: the teacher's likeliest tokens that are kept per place.
        held_out: share of the rows that decides when to stop and which state is kept. The last state is kept where
            it is less than one row.
        training: schedule, precision and memory.
    """

    bits: int = 4
    block: int = 32
    head_bits: int | None = None
    symmetric: bool = True
    max_bytes: int | None = None
    integers: str = "gptq"
    calibration_rows: int = 16
    fold: str = "scale"
    rank: int | None = None
    learning_rate: float | None = None
    norm_rate: float = 1e-3
    teacher_weight: float = 0.5
    temperature: float = 1.0
    kept_tokens: int = 256
    held_out: float = 0.04
    training: TrainOptions = field(default_factory=lambda: TrainOptions(micro_rows=2))

    def check(self) -> None:
        """Refuse values that are not offered.

        Raises:
            UserError: names the option, what is allowed, and what to do.
        """
        for value, allowed, what in (
            (self.bits, BITS, "bits"), (self.block, BLOCKS, "group size"), (self.head_bits or self.bits, BITS, "bits"),
            (self.integers, INTEGERS, "kind of integers"), (self.fold, FOLDS, "fold"),
        ):  # fmt: skip
            if value not in allowed:
                raise UserError(f"{value!r} is no {what}: choose one of {', '.join(map(str, allowed))}")
        if self.rank is not None and self.rank < 0:
            raise UserError(f"rank {self.rank} is negative: give 1 or more")
        if not 0 <= self.held_out <= 0.5:
            raise UserError(f"a share of {self.held_out} rows cannot be held out: give one from 0 to 0.5")
        if not 0 <= self.teacher_weight <= 1:
            raise UserError(f"{self.teacher_weight} is no share of the loss: give the teacher's from 0 to 1")

    @property
    def rate(self) -> float:
        """The peak of the fold's parameters."""
        return RATES[self.fold] if self.learning_rate is None else self.learning_rate

    @property
    def adapter(self) -> GroupAdapterConfig:
        """The fold as :mod:`saap.tune.adapters` takes it."""
        return GroupAdapterConfig(self.fold, self.rank)
