"""Ends that are asked for by a signal: what measures has processes of its own, here or on boards, to take with it."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_signals: list[int] = []


def ask_to_end(number: int, frame: FrameType | None) -> None:
    """Handle a signal: raise KeyboardInterrupt, and remember it.

    A library that is just being imported may turn it into an error of its own, of a module that is not there.
    """
    _signals.append(number)
    raise KeyboardInterrupt


def end_requested() -> bool:
    return bool(_signals)


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
