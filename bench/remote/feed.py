"""What is written to a board's agent: the pieces of a file, and what becomes of a file that cannot be read here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from devices.transport import BoardError

PIECE = 1 << 18


def pieces(source: Path | bytes, offset: int) -> Iterator[bytes]:
    """A file, or bytes, from ``offset`` on."""
    if isinstance(source, bytes):
        yield source[offset:]
        return
    with source.open("rb") as file:
        file.seek(offset)
        while piece := file.read(PIECE):
            yield piece


def size_of(source: Path | bytes) -> int:
    """Bytes.

    Raises:
        BoardError: a file that is gone.
    """
    if isinstance(source, bytes):
        return len(source)
    try:
        return source.stat().st_size
    except OSError as error:
        raise BoardError(f"{source} cannot be read ({error.strerror}): measure again") from None


def whole(some: Iterable[bytes], size: int, broken: list[str]) -> Iterator[bytes]:
    """The pieces; why they end early, where they do, is added to ``broken``."""
    try:
        for piece in some:
            yield piece
            size -= len(piece)
    except OSError as error:
        broken.append(error.strerror or str(error))
    else:
        if size > 0:
            broken.append("it became shorter meanwhile")


def feed(stdin: IO[bytes], some: Iterable[bytes]) -> None:
    """Write to a process and close its standard input."""
    with contextlib.suppress(OSError, ValueError):  # whoever reads has ended, which its answer tells
        try:
            for piece in some:
                stdin.write(piece)
        finally:
            stdin.close()  # also after a mistake of ours: else it waits for more
