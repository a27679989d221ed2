"""The document of ``saap eval --json``, which ``saap compare`` and ``saap report`` read: the quality of some models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from saap.base.documents import Document

KIND: Literal["saap-quality"] = "saap-quality"


@dataclass(frozen=True)
class Protocol:
    """The protocol of a perplexity; two compare only where these are equal, but for the name of the text."""

    text: str  # where it is from, for people
    text_sha256: str | None  # over the text; None for one that the model wrote itself
    tokens_sha256: str  # over the token ids of all windows
    tokenizer_sha256: str  # over the vocabulary with its numbers
    chunk: int  # tokens of a window
    chunks: int  # windows
    stride: int  # tokens from one window's start to the next's
    bos: bool  # whether each window begins with the beginning-of-sequence token
    join: str  # how lines were joined (:mod:`saap.text.windows`)
    predictions: int  # that enter the means
    self_written: bool = False  # whether the model wrote the text, as one could before


@dataclass(frozen=True)
class ModelQuality:
    """One model: its size and its numbers on the text.

    Attributes:
        window_nll: summed over the predictions of each window: what a paired comparison needs.
    """

    name: str
    parameters: int
    bytes: int  # of its weights files
    nll: float | None = None  # nats per token; None without a text, and on text that a model wrote itself
    perplexity: float | None = None  # exp(nll); None also where no float holds it
    kl: float | None = None  # mean KL(reference || model), nats per token
    top1: float | None = None  # share of the predictions whose likeliest token is the reference's
    window_nll: tuple[float, ...] | None = None
    bits_per_byte: float | None = None  # of the text: what compares between tokenizers; None also where it is unknown


@dataclass(frozen=True)
class TaskExample:
    """One example: its place in the task, the right choice, the choices' log-likelihoods, and what counted."""

    index: int
    target: int
    loglikelihoods: tuple[float, ...]
    acc: float | None = None
    acc_norm: float | None = None


@dataclass(frozen=True)
class TaskScore:
    """One task of one model.

    Attributes:
        acc, acc_norm: accuracies in [0, 1]; None where the task has none.
    """

    model: str
    task: str
    source: str  # the file's name, or that the harness's own data set was taken
    sha256: str | None = None  # of the file; None for a data set of the harness
    examples_of: int | None = None  # examples in the file; None likewise
    acc: float | None = None
    acc_stderr: float | None = None
    acc_norm: float | None = None
    acc_norm_stderr: float | None = None
    examples: tuple[TaskExample, ...] = ()

    @property
    def metric(self) -> str:
        """The accuracy to quote: acc_norm where the task has it (BoolQ and WinoGrande have not), else acc."""
        return "acc" if self.acc_norm is None else "acc_norm"

    @property
    def quoted(self) -> float | None:
        return self.acc if self.acc_norm is None else self.acc_norm


@dataclass(frozen=True)
class AnswerScore:
    """One model's greedy answers to some prompts (:mod:`saap.evaluate.answers`).

    Attributes:
        agreement: share of the tokens of the reference's answers that the model would say next behind their beginnings.
        same: mean number of tokens until its own answer differs from the reference's.
        repetition: mean share of an answer's 4-grams that were in it before.
    """

    model: str
    agreement: float | None  # None without a reference, as same
    same: float | None
    repetition: float


@dataclass(frozen=True)
class Answers:
    """Answers of all models to the same prompts."""

    source: str  # of the prompts
    sha256: str  # over them
    prompts: int
    tokens: int  # of an answer, at most
    scores: tuple[AnswerScore, ...]


@dataclass(frozen=True)
class Quality:
    """Models on one text, on tasks, on prompts, or on several of these."""

    protocol: Protocol | None  # None where no text was evaluated
    reference: str | None  # the name of the dense model that KL and top-1 are against
    rows: tuple[ModelQuality, ...]
    tasks: tuple[TaskScore, ...] = ()
    task_seed: int | None = None  # that examples were drawn with; None without tasks
    max_examples: int | None = None  # of each task; None is all
    answers: Answers | None = None
    kind: Literal["saap-quality"] = KIND


QUALITY = Document(Quality, "quality", "make one with `saap eval --json`", version="version")
