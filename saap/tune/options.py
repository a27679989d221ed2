"""Options of tuning."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal, get_args

from msgspec import Meta, convert

from saap.base.options import COMPUTE, COUNT, Option, check_values, refuse_unused
from saap.base.values import parse_bytes
from saap.models.record import read_record
from saap.system.device_names import check_device_is_there

Bits = Literal[4, 8]
GroupSize = Literal[32, 64, 128]
Integers = Literal["gptq", "nearest"]
Kind = Literal["auto", "text", "chat"]
Learning = Literal["scales", "weights", "all"]
# Peak rates of what is trained and of the norms. Of scales, on held text half of it was worse with 25,000 to 400,000
# tokens, twice with 25,000 (studies/tuning).
RATES: dict[Learning, tuple[float, float]] = {"scales": (6e-3, 1e-3), "weights": (1e-4, 1e-4), "all": (1e-4, 1e-4)}
Precision = Literal["auto", "bf16", "fp32"]
FEWEST_JUDGED = 8  # rows: by one of 256 tokens, a state was kept that was 0.1 nats worse than the last (studies/demo)
_INTEGERS = "The integers"
_TRAINED = "What is trained"
_TEXT = "Training text"
_RUNS = "How it runs"


@dataclass(frozen=True)
class TrainOptions:
    """Schedule, precision and memory of a training run. What has no Option is set from Python alone."""

    rows_per_step: Annotated[
        int,
        Option("Sequences per step, split over the processes.", _RUNS, flags=("--batch",)),
        COUNT,
    ] = 4
    micro_rows: Annotated[
        int | None,
        Option("Sequences at once; fewer take less memory.", _RUNS, flags=("--micro-batch",), hidden=True),
        COUNT,
    ] = None  # a process's whole share
    passes: int = 1  # over the text; from the second on its steps are shuffled
    warmup_share: float = 0.1  # of the steps
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    clip: float | None = 1.0  # largest norm of the gradient of all groups; None: no limit
    precision: Annotated[Precision, Option("Precision of the forward and backward passes.", _RUNS, hidden=True)] = (
        "auto"
    )
    checkpointing: bool | None = None  # recompute activations; None: where memory is short
    evaluations: int = 6  # on held-out text, evenly spread over the run
    patience: Annotated[
        int | None,
        Option(
            "Evaluations without a better one before it stops; 0: never.", _RUNS, parse=lambda text: int(text) or None
        ),
        COUNT,
    ] = 3
    save_seconds: float = 60.0  # between two states on disk: what a kill can cost
    seed: Annotated[int, Option("Random seed.", _RUNS), Meta(ge=0)] = 0
    device: Annotated[str, Option(COMPUTE, _RUNS, metavar="NAME", hidden=True)] = "auto"


@dataclass(frozen=True)
class TuneOptions:
    """Precision, what is trained, and how the teacher counts."""

    bits: Annotated[Bits, Option("Bits of the linears.", _INTEGERS)] = 4
    group_size: Annotated[
        GroupSize | None,
        Option("Weights per scale; default: as pruning planned, else 32.", _INTEGERS, old=("--group",)),
    ] = None
    head_bits: Annotated[Bits | None, Option("Bits of embedding and head; default: as --bits.", _INTEGERS)] = None
    max_bytes: Annotated[
        int | None,
        Option(
            "Largest weights file, such as 80MB: each matrix gets its own bits and groups.",
            _INTEGERS,
            metavar="SIZE",
            parse=parse_bytes,
        ),
        Meta(gt=0),
    ] = None  # with it bits, head_bits and group_size mean nothing (saap.quantize.choose_forms)
    integers: Annotated[Integers, Option("Error-compensating, or each weight by itself.", _INTEGERS)] = "gptq"
    calibration_rows: int = 16  # the first of the text, which gptq looks at
    train: Annotated[
        Learning,
        Option(
            "The integers' scales; or float weights, before they are rounded; all: embedding and head too.", _TRAINED
        ),
    ] = "scales"
    learning_rate: Annotated[
        float | None, Option("Peak learning rate; default: 0.006 of scales, 0.0001 of weights.", _TRAINED),
        Meta(ge=0, le=1),
    ] = None  # fmt: skip
    norm_rate: float | None = None  # peak learning rate of the norms' weights; by default 0.001 beside scales
    teacher_weight: Annotated[
        float, Option("Share of the loss that is the KL to the teacher.", _TEXT), Meta(ge=0, le=1)
    ] = 0.5
    kept_tokens: int = 256  # of the teacher's likeliest per place
    held_out: Annotated[
        float, Option("Share of the text that decides when to stop.", _TEXT, shown=False), Meta(ge=0, le=0.5)
    ] = 0.04  # fewer than 8 rows: none is held out, and the last state is kept
    kind: Annotated[Kind, Option("chat: the model's template, only answers are learnt.", _TEXT)] = "auto"
    tokens: Annotated[int, Option("Training tokens.", _TEXT), Meta(ge=1)] = 24576
    minutes: Annotated[
        float | None, Option("Minutes that it may take in all, instead of --tokens.", _TEXT), Meta(gt=0, le=100_000)
    ] = None
    length: Annotated[int, Option("Tokens per sequence.", _TEXT, hidden=True), Meta(ge=2, le=1_000_000)] = 256
    skip: Annotated[
        int | None,
        Option("Sequences of the text to pass over; default: those that scored the structures.", _TEXT, shown=False),
        Meta(ge=0, le=1_000_000),
    ] = None
    training: TrainOptions = field(default_factory=lambda: TrainOptions(micro_rows=2))
    planned: bool = False  # each matrix has the integers that the model's pruning planned

    @property
    def group(self) -> GroupSize:
        """Weights per scale, where a model's own plan says nothing."""
        return self.group_size or 32

    @property
    def rates(self) -> tuple[float, float]:
        """Peak learning rates of what is trained and of the norms."""
        rate, of_norms = RATES[self.train]
        return (
            rate if self.learning_rate is None else self.learning_rate,
            of_norms if self.norm_rate is None else self.norm_rate,
        )

    def for_model(self, directory: Path) -> TuneOptions:
        """Take the integers that the model's pruning planned for, unless others are given."""
        if self.train != "scales":
            return self
        bundle = read_record(directory).get("plan", {}).get("bundle", {})
        asked = self.group_size is not None or self.head_bits is not None or self.max_bytes is not None
        if asked or self.bits != bundle.get("bits") or bundle.get("block") not in get_args(GroupSize):
            return self if self.planned else replace(self, group_size=self.group)
        return replace(self, group_size=convert(bundle["block"], GroupSize), planned=True)

    def recorded(self) -> dict[str, object]:
        """Convert to what saap.json and states hold, where ``block`` is the group size; the text is recorded apart."""
        of_text = ("kind", "tokens", "minutes", "length", "skip")
        rate, of_norms = self.rates
        values = asdict(self) | {"learning_rate": rate, "norm_rate": of_norms}
        about = {name: value for name, value in values.items() if name not in of_text}
        return {"block" if name == "group_size" else name: value for name, value in about.items()}

    def check(self) -> None:
        check_values(self)
        rows = self.training.rows_per_step
        if (self.training.micro_rows or 0) > rows:
            most = f"give {rows} or fewer, or a larger --batch"
            refuse_unused(self, ("micro_rows",), f"at most the {rows} sequences of a step", most)
        if self.train != "scales":
            of_integers = ("bits", "group_size", "head_bits", "max_bytes", "integers")
            refuse_unused(
                self, of_integers, f"--train scales, and {self.train} learn as floats", "tune the result again"
            )
        check_device_is_there(self.training.device)

    def holds_out(self, rows: int) -> bool:
        """Whether some of so many rows are held out."""
        return rows * self.held_out >= FEWEST_JUDGED
