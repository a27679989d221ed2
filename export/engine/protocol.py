"""An engine: a model with a KV cache, one sequence at a time, whatever runs it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from saap.base.cores import allowed_cores
from saap.base.errors import UserError
from saap.base.wording import counted

if TYPE_CHECKING:
    from export.bundle.manifest import BundleManifest
    from export.engine.facts import ModelFacts

Ids = NDArray[np.int64]
Logits = NDArray[np.float32]


class EngineError(UserError):
    """The bundle, the context or the threads cannot be used here."""


@dataclass(frozen=True)
class EngineOptions:
    """Options for opening a model; an engine ignores those that it does not have."""

    threads: int = 1  # the caller pins the process
    max_length: int = 512  # positions of the cache: prompt and generated tokens together
    scoring: bool = False  # open what gives logits after every token (:meth:`Engine.logits`)
    provider: str = "cpu"  # of ONNX Runtime: cpu or cuda
    choice: str | None = None  # one of the engine's own settings (``Row.choices``); None: its default
    foreign_graph: bool = False  # of ONNX Runtime on the CPU: run operators that saap does not write, in a worker
    huge_pages: bool = True  # move the weights to huge pages, where the engine leaves that to us


class Engine(ABC):
    """A model that is loaded. A module's ``open(source, options)`` makes it.

    Attributes:
        max_length: positions that the cache holds.
        can_rewind: whether :meth:`rewind` can keep a part of the sequence.
        hands_out_logits: whether they come to Python; else :meth:`next_token` alone knows the next token.
    """

    max_length: int
    can_rewind: bool = True
    hands_out_logits: ClassVar[bool] = True

    @abstractmethod
    def prefill(self, ids: Ids) -> Logits:
        """Append ``ids`` [n]; the logits [vocab] after the last of them, valid until the next call."""

    @abstractmethod
    def step(self, token_id: int) -> Logits:
        """Append one token; the logits [vocab] after it, valid until the next call."""

    @abstractmethod
    def rewind(self, length: int) -> int:
        """Forget all but the first ``length`` positions, or more where it must; the number that is kept."""

    def next_token(self, logits: Logits) -> int:
        """Choose the likeliest token after what came last, whose ``logits`` are these."""
        return int(logits.argmax())

    def logits(self, rows: Ids) -> Logits:
        """Logits [batch, tokens, vocab] after every token of ``rows`` [batch, tokens]; the sequence is forgotten."""
        raise EngineError(f"{type(self).__name__} gives no logits of every token: run the bundle in ONNX Runtime")

    def versions(self) -> dict[str, str]:
        """Versions and settings by name, for a result."""
        return {}

    def facts(self) -> ModelFacts | None:
        """Sizes of the model; None where its bundle's manifest says them."""
        return None

    def close(self) -> None:
        """Free the model; the engine cannot be used afterwards."""
        self.__dict__.clear()


def check_threads(threads: int) -> None:
    """Refuse more threads than cores."""
    available = len(allowed_cores())
    if not 1 <= threads <= available:
        raise EngineError(
            f"{counted(threads, 'thread')} cannot be used: this process has {counted(available, 'core')}, "
            f"give 1 to {available}"
        )


def check_context(manifest: BundleManifest, length: int, where: str) -> None:
    """Refuse more positions than the model was made for."""
    if not 1 <= length <= manifest.context_length:
        raise EngineError(f"{length} tokens of context do not fit {where}: give 1 to {manifest.context_length}")


def check_room(total: int, limit: int) -> int:
    """Refuse more positions than the cache holds; ``total`` otherwise."""
    if total > limit:
        raise EngineError(f"the cache holds {limit} positions and {total} are needed: ask for less")
    return total


def check_ids(ids: Ids, manifest: BundleManifest) -> None:
    """Refuse ids that the embedding has no row for: not every operator does."""
    if ids.size and not 0 <= ids.min() <= ids.max() < manifest.vocab_size:
        wrong = ids.min() if ids.min() < 0 else ids.max()
        raise EngineError(
            f"token {wrong} is not in the vocabulary of {manifest.vocab_size}: the tokenizer belongs to another model"
        )


def greedy(engine: Engine, prompt: Sequence[int], count: int, stops: Sequence[int] = ()) -> list[int]:
    """Continue a prompt with the likeliest tokens: ``count`` of them, or up to one of ``stops``."""
    engine.rewind(0)
    tokens = [engine.next_token(engine.prefill(np.asarray(prompt, np.int64)))]
    while len(tokens) < count and tokens[-1] not in stops:
        tokens.append(engine.next_token(engine.step(tokens[-1])))
    return tokens
