from __future__ import annotations

import numpy as np

from bench.measure import measure, warm_up


class Clock:
    """Time that passes only when something works."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class CountingDecoder:
    """Answers with the id after the last one; prefill takes 10 s per token, a step 1 s more each time."""

    max_length = 100

    def __init__(self, clock: Clock) -> None:
        self.clock, self.fed, self.resets = clock, [], 0

    def reset(self) -> None:
        self.fed, self.resets = [], self.resets + 1

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        self.fed.extend(ids.tolist())
        self.clock.now += 10 * len(ids)
        return np.eye(32, dtype=np.float32)[ids[-1] + 1]

    def step(self, token_id: int) -> np.ndarray:
        self.fed.append(token_id)
        self.clock.now += len(self.fed)
        return np.eye(32, dtype=np.float32)[token_id + 1]


def test_exact_counts_and_times() -> None:
    clock = Clock()
    decoder = CountingDecoder(clock)
    done = measure(decoder, np.array([4, 5]), 3, clock)
    assert done.tokens == [6, 7, 8, 9]
    assert decoder.fed == [4, 5, 6, 7, 8]
    assert (done.prefill_s, done.ttft_s) == (20, 20)
    assert done.token_s == [3, 4, 5]


def test_warm_up_is_kept_apart() -> None:
    clock = Clock()
    decoder = CountingDecoder(clock)
    assert warm_up(decoder, np.array([1]), 3, clock) == [10, 2, 3]
    assert measure(decoder, np.array([1]), 1, clock).token_s == [2]
    assert decoder.resets == 2


def test_no_warm_up_runs_nothing() -> None:
    decoder = CountingDecoder(Clock())
    assert warm_up(decoder, np.array([1]), 0, decoder.clock) == []
    assert decoder.fed == []
