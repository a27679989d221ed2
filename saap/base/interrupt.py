"""Ends that are asked for by a signal: what measures has processes of its own, here or on boards, to take with it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

PATIENCE_S = 1.8  # of somebody who pressed Ctrl-C
_signals: list[tuple[int, float]] = []  # with the seconds on the monotonic clock


def ask_to_end(number: int, frame: FrameType | None) -> None:
    """Handle a signal: raise KeyboardInterrupt, and remember it.

    A library that is just being imported may turn it into an error of its own, of a module that is not there.
    """
    _signals.append((number, time.monotonic()))
    raise KeyboardInterrupt


def end_requested() -> bool:
    return bool(_signals)


def end_in_time(leave: Callable[[], object]) -> None:
    """Call ``leave`` in a thread when an interrupt has not been handled in time.

    Python runs a handler between two of its own instructions, so none runs while a library computes. A library that
    keeps the interpreter's lock stops the thread too.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def watch() -> None:
        while number := os.read(reader, 1):
            came = time.monotonic() - PATIENCE_S / 2  # the handler may be faster than this thread
            time.sleep(PATIENCE_S)
            if number[0] == signal.SIGINT and not any(handled > came for _, handled in _signals):
                leave()

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def ended_as_by_a_person() -> Iterator[None]:
    """Leave boards and workers as clean as Ctrl-C does when a terminal is closed or a workflow is cancelled.

    A signal that is ignored stays so: under nohup the terminal may be closed.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    before = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}
    if threading.current_thread() is threading.main_thread():
        for number in before:
            signal.signal(number, ask_to_end)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)
