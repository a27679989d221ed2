"""Running a bundle: text out of a prompt, and the log-probabilities of a given text.

No torch and no transformers here: this is what runs on a board. Generation takes any decoder that has the three
methods of :class:`Decoder`; the command line passes the one that the benchmark measures.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from export.bundle import SCORING_GRAPH, BundleManifest, read_manifest
from export.tokenizer import BundleTokenizer, RunError, TextStream

__all__ = ["BundleScorer", "BundleTokenizer", "Decoder", "Generation", "RunError", "generate", "next_token_logprobs"]

Ids = NDArray[np.int64]
Logits = NDArray[np.float32]


class Decoder(Protocol):
    """A model with a KV cache, one sequence at a time."""

    @property
    def max_length(self) -> int:
        """Positions that the cache holds: prompt and generated tokens together."""

    def reset(self) -> None:
        """Forget the sequence."""

    def prefill(self, ids: Ids) -> Logits:
        """Append ``ids`` [n]; the logits [vocab] after the last of them."""

    def step(self, token_id: int) -> Logits:
        """Append one token; the logits [vocab] after it."""


class Generation:
    """The text of :func:`generate` as it is made: iterate once; the numbers are complete when the iteration ends.

    Attributes:
        prompt_tokens: length of the prompt in tokens, template included.
        tokens: tokens drawn, an end-of-text token included.
        prefill_seconds: from the start to the logits of the first token.
        decode_seconds: from there to the end.
        stop_reason: ``eos``, ``length`` (max_tokens reached), ``context`` (the cache is full), or None while running.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: BundleTokenizer,
        ids: list[int],
        *,
        stream: TextStream,
        stop_ids: frozenset[int],
        max_tokens: int,
        draw: Callable[[Logits], int],
        clock: Callable[[], float],
    ) -> None:
        self._decoder, self._ids, self._stream = decoder, ids, stream
        self._stop_ids, self._max_tokens = stop_ids, max_tokens
        self._draw, self._clock = draw, clock
        self.prompt_tokens = len(ids)
        self.tokens = 0
        self.prefill_seconds = 0.0
        self.decode_seconds = 0.0
        self.stop_reason: str | None = None
        self._pieces = self._run()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    @property
    def seconds(self) -> float:
        """Wall time of prefill and decode together."""
        return self.prefill_seconds + self.decode_seconds

    def _run(self) -> Iterator[str]:
        start = self._clock()
        self._decoder.reset()
        logits = self._decoder.prefill(np.asarray(self._ids, dtype=np.int64))
        filled = self._clock()
        self.prefill_seconds = filled - start
        while self.stop_reason is None:
            token = self._draw(logits)
            self.tokens += 1
            self.stop_reason = self._reason_to_stop(token)
            piece = "" if self.stop_reason == "eos" else self._stream.push(token)
            self.decode_seconds = self._clock() - filled
            if piece:
                yield piece
            if self.stop_reason is None:
                logits = self._decoder.step(token)
        rest = self._stream.flush()
        if rest:
            yield rest

    def _reason_to_stop(self, token: int) -> str | None:
        if token in self._stop_ids:
            return "eos"
        if self.tokens >= self._max_tokens:
            return "length"
        # The drawn token would need a place in the cache before it can be followed by another.
        if self.prompt_tokens + self.tokens > self._decoder.max_length:
            return "context"
        return None


def generate(
    decoder: Decoder,
    tokenizer: BundleTokenizer,
    prompt: str,
    *,
    max_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = True,
    stop_ids: Collection[int] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Generation:
    """Text that follows ``prompt``, in pieces that never split a character.

    Args:
        decoder: the model; it is reset first.
        tokenizer: the bundle's.
        prompt: a user's turn when ``chat``, else a text to continue.
        max_tokens: tokens to draw at most.
        temperature: 0 takes the likeliest token; above, tokens are drawn from softmax(logits / temperature).
        seed: of the draws.
        chat: put the prompt into the model's chat template.
        stop_ids: ids that end the text; None means every end-of-text id of the tokenizer.
        clock: seconds.

    Raises:
        RunError: an argument out of range, an empty prompt, no chat template, or a prompt longer than the context.
    """
    if max_tokens < 1:
        raise RunError(f"{max_tokens} tokens cannot be generated: ask for 1 or more")
    draw = _sampler(temperature, seed)
    ids = tokenizer.encode_chat(prompt) if chat else tokenizer.encode(prompt)
    if not ids or not prompt.strip():
        raise RunError("the prompt is empty: give some text")
    if len(ids) > decoder.max_length:
        raise RunError(f"the prompt has {len(ids)} tokens, the context holds {decoder.max_length}: shorten it")
    return Generation(
        decoder,
        tokenizer,
        ids,
        # A continuation keeps the space that its first word needs; an answer starts a text of its own.
        stream=TextStream(tokenizer, () if chat else ids),
        stop_ids=frozenset(tokenizer.eos_token_ids if stop_ids is None else stop_ids),
        max_tokens=max_tokens,
        draw=draw,
        clock=clock,
    )


def next_token_logprobs(logits: NDArray[Any], ids: NDArray[Any]) -> NDArray[np.float64]:
    """Log-probability that each position gives to the token that follows it.

    Args:
        logits: [..., s, vocab].
        ids: [..., s].

    Returns:
        [..., s - 1]; entry i is log p(ids[i + 1] | ids[: i + 1]).
    """
    heads, targets = logits[..., :-1, :], np.asarray(ids, dtype=np.int64)[..., 1:]
    top = heads.max(axis=-1, keepdims=True)
    # Shifted by the largest logit nothing overflows; float64 holds the sum over the vocabulary.
    log_sum = np.log(np.exp(heads - top).sum(axis=-1, dtype=np.float64))
    chosen = np.take_along_axis(heads, targets[..., None], axis=-1)[..., 0]
    difference: NDArray[np.float64] = chosen.astype(np.float64) - top[..., 0] - log_sum
    return difference


class BundleScorer:
    """The scoring graph of a bundle: logits of every position, from an empty cache.

    Args:
        directory: the bundle.
        threads: of ONNX Runtime within an operator.
        graph: file name; of the decode graph only the last position's logits come back.

    Raises:
        BundleError: no bundle there.
        RunError: the bundle has no such graph.
    """

    def __init__(self, directory: str | Path, threads: int = 1, graph: str = SCORING_GRAPH) -> None:
        self.manifest = read_manifest(directory)
        path = Path(directory) / graph
        if not path.is_file():
            raise RunError(f"{directory} has no {graph}: export it again with this saap")
        self._session = cpu_session(path, threads)

    def logits(self, ids: NDArray[Any]) -> Logits:
        """Logits [b, s, vocab] float32 of rows ``ids`` [b, s] that all have the same length."""
        ids = np.ascontiguousarray(ids, dtype=np.int64)
        feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), **empty_past(self.manifest, ids.shape[0])}
        if any(given.name == "position_ids" for given in self._session.get_inputs()):  # the portable target
            feed["position_ids"] = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
        (logits,) = self._session.run(["logits"], feed)
        return np.asarray(logits, dtype=np.float32)

    def logprobs(self, ids: NDArray[Any]) -> NDArray[np.float64]:
        """Log-probabilities [b, s - 1] of each next token in rows ``ids`` [b, s]."""
        return next_token_logprobs(self.logits(ids), ids)


def cpu_session(graph: Path, threads: int) -> Any:
    """An ONNX Runtime session of a graph on the CPU.

    Raises:
        RunError: this ONNX Runtime cannot load it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise RunError(f"ONNX Runtime {onnxruntime.__version__} cannot load {graph} ({first})") from error


def empty_past(manifest: BundleManifest, batch: int) -> dict[str, NDArray[Any]]:
    """A KV cache that holds nothing: name to array [batch, kv_heads, 0, head_dim], for each layer with attention."""
    dtype = np.dtype(manifest.kv_dtype)
    return {
        f"past_key_values.{index}.{part}": np.zeros((batch, layer.kv_heads, 0, manifest.head_dim), dtype)
        for index, layer in enumerate(manifest.kv_layers)
        for part in ("key", "value")
    }


def _sampler(temperature: float, seed: int) -> Callable[[Logits], int]:
    if not 0.0 <= temperature < float("inf"):  # also false for NaN
        raise RunError(f"temperature {temperature} is out of range: give 0 (greedy) or more, 0.7 is usual")
    generator = np.random.default_rng(seed)

    def draw(logits: Logits) -> int:
        if not np.isfinite(logits.max()):
            raise RunError("the bundle's logits are not finite: export it again")
        if temperature == 0.0:
            return int(logits.argmax())
        shifted = logits.astype(np.float64) - logits.max()
        with np.errstate(over="ignore"):  # a tiny temperature sends the losers to -inf, which is meant
            total = np.exp(shifted / temperature).cumsum()
        drawn = int(total.searchsorted(generator.random() * total[-1], side="right"))
        return min(drawn, len(total) - 1)  # the product may round up to the total

    return draw
