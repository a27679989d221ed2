"""What ``saap eval --json`` writes, and ``saap compare`` and ``saap report`` read: the quality of some models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from devices.common.documents import Document

KIND: Literal["saap-quality"] = "saap-quality"


@dataclass(frozen=True)
class Protocol:
    """What a perplexity is of; two compare only where these are equal, but for the name of the text.

    Attributes:
        text: where it is from, for people.
        text_sha256: over the text; None for one that the model wrote itself.
        tokens_sha256: over the token ids of all windows.
        tokenizer_sha256: over the vocabulary with its numbers.
        chunk: tokens of a window.
        chunks: windows.
        stride: tokens from one window's start to the next's.
        bos: whether each window begins with the beginning-of-sequence token.
        join: how lines were joined (:mod:`saap.text.windows`).
        predictions: that enter the means.
        self_written: whether the model wrote the text.
    """

    text: str
    text_sha256: str | None
    tokens_sha256: str
    tokenizer_sha256: str
    chunk: int
    chunks: int
    stride: int
    bos: bool
    join: str
    predictions: int
    self_written: bool = False


@dataclass(frozen=True)
class ModelQuality:
    """One model: its size and its numbers on the text.

    Attributes:
        bytes: of its weights files.
        nll: nats per token; None without a text, and on text that a model wrote itself.
        perplexity: exp(nll); None also where no float holds it.
        kl: mean KL(reference || model), nats per token.
        top1: share of the predictions whose likeliest token is the reference's.
        window_nll: summed over the predictions of each window: what a paired comparison needs.
    """

    name: str
    parameters: int
    bytes: int
    nll: float | None = None
    perplexity: float | None = None
    kl: float | None = None
    top1: float | None = None
    window_nll: tuple[float, ...] | None = None


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
        source: the file's name, or that the harness's own data set was taken.
        sha256: of the file; None for a data set of the harness.
        examples_of: examples in the file; None likewise.
        acc, acc_norm: accuracies in [0, 1]; None where the task has none.
    """

    model: str
    task: str
    source: str
    sha256: str | None = None
    examples_of: int | None = None
    acc: float | None = None
    acc_stderr: float | None = None
    acc_norm: float | None = None
    acc_norm_stderr: float | None = None
    examples: tuple[TaskExample, ...] = ()

    @property
    def metric(self) -> str:
        """What the literature quotes: acc_norm where the task has it (BoolQ and WinoGrande have not), else acc."""
        return "acc" if self.acc_norm is None else "acc_norm"

    @property
    def quoted(self) -> float | None:
        return self.acc if self.acc_norm is None else self.acc_norm


@dataclass(frozen=True)
class Quality:
    """Models on one text, on tasks, or on both.

    Attributes:
        protocol: None where no text was evaluated.
        reference: the name of the dense model that KL and top-1 are against.
        task_seed: that examples were drawn with; None without tasks.
        max_examples: of each task; None is all.
    """

    protocol: Protocol | None
    reference: str | None
    rows: tuple[ModelQuality, ...]
    tasks: tuple[TaskScore, ...] = ()
    task_seed: int | None = None
    max_examples: int | None = None
    kind: Literal["saap-quality"] = KIND


QUALITY = Document(Quality, "quality", "make one with `saap eval --json`", version="version")
