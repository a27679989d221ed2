"""The measured pass and its warm-up, on a clock of the test's own."""

import numpy as np

from bench.measure.worker import timed_pass
from export.engine.protocol import Engine
from export.engine.worker import warm_up


class Clock:
    """Time that passes only when something works."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class CountingDecoder(Engine):
    """Answers with the id after the last one; prefill takes 10 s per token, a step 1 s more each time."""

    max_length = 100

    def __init__(self, clock: Clock) -> None:
        self.clock, self.fed, self.resets = clock, [], 0

    def rewind(self, length: int) -> int:
        assert not length
        self.fed, self.resets = [], self.resets + 1
        return 0

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        self.fed.extend(ids.tolist())
        self.clock.now += 10 * len(ids)
        return np.eye(128, dtype=np.float32)[ids[-1] + 1]

    def step(self, token_id: int) -> np.ndarray:
        self.fed.append(token_id)
        self.clock.now += len(self.fed)
        return np.eye(128, dtype=np.float32)[token_id + 1]


def test_exact_counts_and_times() -> None:
    clock = Clock()
    decoder = CountingDecoder(clock)
    done = timed_pass(decoder, np.array([4, 5]), 3, clock)
    assert done.tokens == [6, 7, 8, 9]
    assert decoder.fed == [4, 5, 6, 7, 8]
    assert (done.prefill_s, done.ttft_s) == (20, 20)
    assert done.token_s == [3, 4, 5]


def test_context_goes_in_untimed_and_without_a_prompt_only_steps_are_timed() -> None:
    clock = Clock()
    decoder = CountingDecoder(clock)
    done = timed_pass(decoder, np.array([4]), 2, clock, np.array([1, 2, 3]))
    assert decoder.fed == [1, 2, 3, 4, 5, 6]
    assert (done.prefill_s, done.token_s) == (10, [5, 6])
    assert done.window == (40, 51)
    done = timed_pass(CountingDecoder(clock), np.array([], np.int64), 2, clock, np.array([7]))
    assert (done.prefill_s, done.ttft_s) == (None, None)
    assert done.tokens == [8, 9, 10] and done.token_s == [2, 3]


def test_telling_the_rate_is_not_timed() -> None:
    clock = Clock()
    told: list[tuple[str, float]] = []

    def slow(phase: str, rate: float) -> None:
        told.append((phase, rate))
        clock.now += 1000

    done = timed_pass(CountingDecoder(clock), np.array([4, 5]), 3, clock, live=slow)
    assert done.token_s == [3, 4, 5]
    assert told == [("decode", 1 / 3), ("decode", 2 / 7), ("decode", 3 / 12)]


def test_warm_up_is_kept_apart() -> None:
    clock = Clock()
    decoder = CountingDecoder(clock)
    assert warm_up(decoder, np.array([1]), 3, clock) == ([10, 2, 3], None)
    assert timed_pass(decoder, np.array([1]), 1, clock).token_s == [2]
    assert decoder.resets == 2
    idle = CountingDecoder(clock)
    assert warm_up(idle, np.array([1]), 0, clock) == ([], None)
    assert idle.fed == []


class SettlingDecoder(CountingDecoder):
    """Steps take 5 s at first and 1 s from the twentieth on."""

    def step(self, token_id: int) -> np.ndarray:
        self.fed.append(token_id)
        self.clock.now += 5 if len(self.fed) < 20 else 1
        return np.eye(32, dtype=np.float32)[1]


def test_warm_up_ends_once_steps_are_steady() -> None:
    clock = Clock()
    times, steady = warm_up(CountingDecoder(clock), np.array([1]), None, clock, most=64)
    assert steady is False and len(times) == 65  # each step is a second longer: never steady
    alike = SettlingDecoder(clock)
    times, steady = warm_up(alike, np.array([1]), None, clock, most=64)
    assert steady is True and len(times) == 1 + 16
    few, unknown = warm_up(SettlingDecoder(clock), np.array([1]), None, clock, most=8)
    assert unknown is None and len(few) == 9
