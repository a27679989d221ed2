"""The measured pass: one prefill, then greedy decode steps, each timed until the next token is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bench.runtime import Decoder, Ids, Logits

Clock = Callable[[], float]


@dataclass(frozen=True)
class Pass:
    """Seconds of one pass, and the tokens it produced: the first from prefill, then one per decode step."""

    prefill_s: float
    ttft_s: float
    token_s: list[float]
    tokens: list[int]


def measure(decoder: Decoder, prompt: Ids, steps: int, clock: Clock) -> Pass:
    """Reset, prefill ``prompt`` [n], then exactly ``steps`` greedy decode steps, past any end-of-text token."""
    # A runtime that samples in its own code hands out tokens (``draw``), never logits.
    draw = getattr(decoder, "draw", None)
    choose: Callable[[Logits], int] = (lambda _: draw()) if draw else _greedy
    decoder.reset()
    start = clock()
    logits = decoder.prefill(prompt)
    filled = clock()
    token = choose(logits)
    tokens, now = [token], clock()
    ttft = now - start
    token_s = []
    for _ in range(steps):
        token = choose(decoder.step(token))
        before, now = now, clock()
        token_s.append(now - before)
        tokens.append(token)
    return Pass(filled - start, ttft, token_s, tokens)


def _greedy(logits: Logits) -> int:
    return int(np.argmax(logits))


def warm_up(decoder: Decoder, prompt: Ids, steps: int, clock: Clock) -> list[float]:
    """A short pass that makes the kernels' buffers exist: its prefill and steps in seconds, kept but never counted."""
    if steps < 1:
        return []
    done = measure(decoder, prompt, steps - 1, clock)
    return [done.prefill_s, *done.token_s]
