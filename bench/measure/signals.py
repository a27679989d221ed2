"""Signals that must not cut a step in two."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Collection, Iterator
from concurrent.futures import Future, wait
from typing import Any

AWAKE_S = 0.2


def until_done(futures: Collection[Future[Any]]) -> None:
    """Wait for other threads' work, and hear every signal meanwhile.

    Python handles a signal in its main thread. A wait without end there does not notice one that the system handed to
    another thread, or that came in just before it: an interrupt now and then had no effect.
    """
    while wait(futures, AWAKE_S).not_done:
        pass


@contextlib.contextmanager
def signals_wait() -> Iterator[None]:
    """The end that a signal asks for meanwhile comes after the block.

    An interrupt inside ``Popen`` would leave a process that nobody knows of. Blocking the signals instead would not do:
    a child inherits its parent's mask.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    handlers = {number: handler for number, handler in found.items() if callable(handler)}
    for number in handlers:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if came:
        handlers[signal.Signals(came[0])](came[0], None)
