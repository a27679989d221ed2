"""The check that stops a document: file and line of ours where its refusal began."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

from saap.base.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
HOUSES = tuple(f"{ROOT / house}/" for house in ("saap", "export", "bench", "devices"))


class Places:
    """Notes where each error for a person is made, or where the error began that it tells of."""

    last: str | None = None  # since it was reset

    @classmethod
    def watch(cls) -> None:
        """Note them from now on."""
        if getattr(UserError.__init__, "noting", False):
            return

        def noting(self: UserError, *arguments: object) -> None:
            ValueError.__init__(self, *arguments)
            begun = sys.exc_info()[1]
            place = getattr(begun, "place", None) or place_of(begun) or _caller()
            self.place = cls.last = place or cls.last  # type: ignore[attr-defined]

        noting.noting = True  # type: ignore[attr-defined]
        UserError.__init__ = noting  # type: ignore[method-assign,assignment]


def place_of(error: BaseException | None) -> str | None:
    """The innermost line of ours that an error came through, ``file:line``."""
    if error is None or error.__traceback__ is None:
        return None
    return _ours([(f.filename, f.lineno or 0) for f in traceback.extract_tb(error.__traceback__)])


def _caller() -> str | None:
    frame, frames = sys._getframe(2), []
    while frame is not None:
        frames.append((frame.f_code.co_filename, frame.f_lineno))
        frame = frame.f_back  # type: ignore[assignment]
    return _ours(frames[::-1])


def _ours(frames: list[tuple[str, int]]) -> str | None:
    ours = [frame for frame in frames if frame[0].startswith(HOUSES)]
    return f"{ours[-1][0].removeprefix(f'{ROOT}/')}:{ours[-1][1]}" if ours else None
