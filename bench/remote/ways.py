"""What ``--on`` and ``--saap-device`` may name: a board by its address, or a place of a farm that holds one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass

from bench.remote.board import Say
from bench.remote.labgrid_place import LabgridPlace, is_place
from devices.transport import Transport, open_transport


@dataclass(frozen=True)
class Way:
    """How a board is reached: ``held`` gives the transport and, at its end, the board back."""

    name: str
    held: Callable[[threading.Event, Say], AbstractContextManager[Transport]]


def way_to(url: str) -> Way:
    """The way that a URL names; nothing is connected or acquired yet.

    Raises:
        BoardError: it names no board, or what it needs here is not installed.
    """
    if is_place(url):
        return Way(url, LabgridPlace(url).held)
    transport = open_transport(url)
    return Way(transport.name, lambda stop, say: closing(transport))


@contextmanager
def kept(url: str, say: Say | None = None) -> Iterator[str]:
    """One board for several calls of :func:`bench_on`: a place of a farm stays acquired, the same one, until the end.

    Returns:
        the URL for those calls.
    """
    way = way_to(url)
    if not is_place(url):
        yield url
        return
    with way.held(threading.Event(), say or (lambda text: None)) as transport:
        yield transport.name
