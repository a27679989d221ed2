"""Signals and threads."""

from __future__ import annotations

import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from bench.child import until_done


def test_a_signal_that_another_thread_was_given_ends_a_wait():
    ended = threading.Event()

    def work():
        time.sleep(0.1)  # until the main thread waits
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        ended.wait(10)

    with ThreadPoolExecutor(1) as pool:
        future, began = pool.submit(work), time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            until_done([future])
        assert time.monotonic() - began < 5
        ended.set()


def test_work_that_is_done_or_failed_ends_a_wait():
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(time.sleep, 0.01), pool.submit(int, "no number")]
        until_done(futures)
    assert isinstance(futures[1].exception(), ValueError)
