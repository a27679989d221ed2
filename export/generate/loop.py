"""Text from a prompt, by any engine. No torch, no transformers."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from export.bundle.manifest import PREFILL_CHUNK
from export.bundle.tokenizer import BundleTokenizer, RunError, TextStream
from export.engine.protocol import Engine, Logits
from export.generate.sampling import GREEDY, Draw, Sampling


@dataclass(frozen=True)
class AnswerSettings:
    """Settings of an answer."""

    max_tokens: int = 256  # tokens to draw at most
    sampling: Sampling = GREEDY
    stop_ids: Collection[int] | None = None  # ids that end the text; None means every end-of-text id of the tokenizer
    clock: Callable[[], float] = time.perf_counter


DEFAULTS = AnswerSettings()


class CachedSequence:
    """An engine and the ids that its cache holds, so that a longer text costs only what is new in it.

    ``ids``: what the cache holds.
    """

    def __init__(self, engine: Engine) -> None:
        engine.rewind(0)
        self.engine = engine
        self.ids: list[int] = []

    def continue_to(self, ids: Sequence[int], stopped: Callable[[], bool]) -> tuple[Logits | None, int]:
        """Make the cache hold ``ids``, keeping what it already has of them from the start.

        Returns the logits [vocab] after the last id, and the number of tokens that had to be read; no logits where
        ``stopped`` said so before all were.
        """
        # The logits after the last id come only from reading it.
        kept = min(_common_prefix(self.ids, ids), len(ids) - 1)
        if kept < len(self.ids):
            kept = self.engine.rewind(kept)
            del self.ids[kept:]
        logits = None
        for start in range(kept, len(ids), PREFILL_CHUNK):
            if stopped():
                return None, start - kept
            piece = ids[start : start + PREFILL_CHUNK]
            logits = self.engine.prefill(np.asarray(piece, dtype=np.int64))
            self.ids += piece
        return logits, len(ids) - kept

    def step(self, token: int) -> Logits:
        logits = self.engine.step(token)
        self.ids.append(token)
        return logits


class Generation:
    """A text as it is written: iterate once; the numbers are complete when the iteration ends.

    Attributes:
        prompt_ids: the prompt, template included.
        read_tokens: how many of them were not in the cache.
        drawn: ids drawn, one that ends the text included.
        text: what has been given out.
        prefill_seconds: from the start to the logits of the first token.
        decode_seconds: from there to the end.
        stop_reason: ``eos``, ``length`` (max_tokens reached), ``context`` (the cache is full), ``interrupted``
            (:meth:`stop`), or None while running.
    """

    def __init__(
        self, sequence: CachedSequence, ids: list[int], stream: TextStream, draw: Draw, settings: AnswerSettings
    ) -> None:
        self._sequence, self._stream, self._draw = sequence, stream, draw
        self._stop_ids = stream.end_ids if settings.stop_ids is None else frozenset(settings.stop_ids)
        self._max_tokens, self._clock = settings.max_tokens, settings.clock
        self._stopped = False
        self.prompt_ids = ids
        self.read_tokens = 0
        self.drawn: list[int] = []
        self.text = ""
        self.prefill_seconds = 0.0
        self.decode_seconds = 0.0
        self.stop_reason: str | None = None
        self._pieces = self._run()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        piece = next(self._pieces)
        self.text += piece
        return piece

    def stop(self) -> None:
        """End the text after what is being computed, a token or a part of the prompt; a signal handler may call it."""
        self._stopped = True

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt_ids)

    @property
    def tokens(self) -> int:
        return len(self.drawn)

    def _run(self) -> Iterator[str]:
        start = self._clock()
        logits, self.read_tokens = self._sequence.continue_to(self.prompt_ids, lambda: self._stopped)
        filled = self._clock()
        self.prefill_seconds = filled - start
        if logits is None:
            self.stop_reason = "interrupted"
        while logits is not None and self.stop_reason is None:
            token = self._draw(logits, self._sequence.ids)
            self.drawn.append(token)
            self.stop_reason = self._reason_to_stop(token)
            piece = "" if self.stop_reason == "eos" else self._stream.push(token)
            self.decode_seconds = self._clock() - filled
            if piece:
                yield piece
            if self.stop_reason is None:
                logits = self._sequence.step(token)
        rest = self._stream.flush()
        if rest:
            yield rest

    def _reason_to_stop(self, token: int) -> str | None:
        if token in self._stop_ids:
            return "eos"
        if self._stopped:
            return "interrupted"
        if len(self.drawn) >= self._max_tokens:
            return "length"
        # The drawn token would need a place in the cache before it can be followed by another.
        if len(self.prompt_ids) + len(self.drawn) > self._sequence.engine.max_length:
            return "context"
        return None


def begin_text(
    engine: Engine, tokenizer: BundleTokenizer, prompt: str, settings: AnswerSettings = DEFAULTS, *, chat: bool = True
) -> Generation:
    """Text that follows ``prompt``, in pieces that never split a character.

    Args:
        prompt: a user's turn when ``chat``, else a text to continue.
        chat: put the prompt into the model's chat template.

    Raises RunError: an argument out of range, an empty prompt, no chat template, or a prompt longer than the context.
    """
    check_request(prompt, settings.max_tokens)
    ids = tokenizer.encode_chat(prompt) if chat else tokenizer.encode(prompt)
    check_length(ids, engine)
    # A continuation keeps the space that its first word needs; an answer starts a text of its own.
    stream = TextStream(tokenizer, () if chat else ids)
    return Generation(CachedSequence(engine), ids, stream, settings.sampling.sampler(), settings)


def check_request(prompt: str, max_tokens: int) -> None:
    """Refuse an empty prompt, and an answer of less than one token."""
    if max_tokens < 1:
        raise RunError(f"{max_tokens} tokens cannot be generated: ask for 1 or more")
    if not prompt.strip():
        raise RunError("the prompt is empty: give some text")


def check_length(ids: Sequence[int], engine: Engine) -> None:
    """Refuse a prompt that is longer than the cache, or that has no tokens."""
    if not ids:
        raise RunError("the prompt is empty: give some text")
    if len(ids) > engine.max_length:
        raise RunError(f"the prompt has {len(ids)} tokens, the context holds {engine.max_length}: shorten it")


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
