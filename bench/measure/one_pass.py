"""The measured pass: untimed context, one prefill, then greedy steps, each timed until the next token is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bench.runtimes.onnxruntime import Decoder, Ids, Logits

Clock = Callable[[], float]
Live = Callable[[str, float], None]  # (phase, tokens per second)

LIVE_EVERY_S = 0.5
WINDOW = 8  # steps of each of the two windows that are compared
STEADY = 0.03  # relative difference of their medians
MOST_WARM_UP = 64


@dataclass(frozen=True)
class Pass:
    """Seconds of one pass, and the tokens it produced: the first from prefill, then one per decode step."""

    prefill_s: float | None
    ttft_s: float | None
    token_s: list[float]
    tokens: list[int]
    window: tuple[float, float]  # of decode, on the clock


def measure(
    decoder: Decoder,
    prompt: Ids,
    steps: int,
    clock: Clock,
    context: Ids | None = None,
    live: Live | None = None,
) -> Pass:
    """Reset, put ``context`` in, prefill ``prompt`` [n], then exactly ``steps`` greedy steps past any end of text.

    Without a prompt the first token comes from the context, and neither prefill nor first token is timed. ``live`` is
    told the rate between steps, outside of what is timed.
    """
    choose = _chooser(decoder)
    decoder.reset()
    if context is not None and len(context):
        logits = decoder.prefill(context)
    start = clock()
    if len(prompt):
        logits = decoder.prefill(prompt)
    filled = clock()
    tokens, now = [choose(logits)], clock()
    ttft = now - start
    window_start, told, token_s = now, now, []
    for _ in range(steps):
        tokens.append(choose(decoder.step(tokens[-1])))
        before, now = now, clock()
        token_s.append(now - before)
        if live is not None and now - told > LIVE_EVERY_S:
            live("decode", len(token_s) / sum(token_s))
            told = now = clock()
    timed = bool(len(prompt))
    return Pass(filled - start if timed else None, ttft if timed else None, token_s, tokens, (window_start, now))


def warm_up(
    decoder: Decoder, prompt: Ids, steps: int | None, clock: Clock, context: Ids | None = None, most: int = MOST_WARM_UP
) -> tuple[list[float], bool | None]:
    """Make the kernels' buffers exist and let clocks rise: a prefill of the measured length, then decode steps.

    Args:
        steps: of the whole pass, prefill included, exactly; None: until the median of the last 8 steps is within 3 %
            of that of the 8 before.
        most: decode steps at most, for which the cache has room.

    Returns:
        seconds of prefill and steps, kept but never counted; and whether they became steady, None where too few steps
        were allowed to tell.
    """
    if steps is not None and steps < 1:
        return [], None
    choose = _chooser(decoder)
    decoder.reset()
    start = clock()
    for ids in (context, prompt):
        if ids is not None and len(ids):
            logits = decoder.prefill(ids)
    token = choose(logits)
    times, now = [clock() - start], clock()
    for _ in range(min(most, MOST_WARM_UP) if steps is None else min(most, steps - 1)):
        token = choose(decoder.step(token))
        before, now = now, clock()
        times.append(now - before)
        if steps is None and is_steady(times[1:]):
            break
    return times, is_steady(times[1:]) if steps is None and most >= 2 * WINDOW else None


def is_steady(times: list[float]) -> bool:
    """Whether the last eight steps took as long as the eight before them."""
    if len(times) < 2 * WINDOW:
        return False
    last, before = np.median(times[-WINDOW:]), np.median(times[-2 * WINDOW : -WINDOW])
    return bool(abs(last - before) <= STEADY * before)


def _chooser(decoder: Decoder) -> Callable[[Logits], int]:
    """A runtime that samples in its own code hands out tokens (``draw``), never logits."""
    draw = getattr(decoder, "draw", None)
    return (lambda _: draw()) if draw else (lambda logits: int(np.argmax(logits)))
