"""Progress reports of long tasks.

A label is ``what (unit), detail``, as in ``scoring (sequences), plan 2``. It begins with the name of the work;
the unit is what ``done`` and ``total`` count. A total of 0 says that nobody knows how much there is.

Any function of (label, done, total) is a progress. An object with a method ``note`` as well is also told sentences,
such as which text is read; a command's console has one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

Progress = Callable[[str, float, float], None]  # what is being done, how much is done, how much there is
LOADING, WRITING = "loading the model", "writing the model"  # seconds of a small model, whose number nobody knows

_LABEL = re.compile(r"(?P<what>[^(,:]*) \((?P<unit>[^(),:]+)\)(?P<detail>.*)", re.DOTALL)


@runtime_checkable
class Noting(Protocol):
    """A progress that shows sentences, too."""

    def note(self, text: str) -> None:
        """Show a sentence."""


def advance(progress: Progress | None, label: str, done: float, total: float) -> None:
    """Tell a progress how much is done, where there is one."""
    if progress is not None:
        progress(label, done, total)


def note(progress: Progress | None, text: str) -> None:
    """Tell a sentence to a progress that shows them; a plain function does not."""
    if isinstance(progress, Noting):
        progress.note(text)


@dataclass(frozen=True)
class Label:
    """A label in its parts; the unit is empty where the label names none."""

    what: str
    unit: str = ""
    detail: str = ""

    @classmethod
    def of(cls, text: str) -> Label:
        if match := _LABEL.fullmatch(text):
            return cls(**match.groupdict())
        what = re.split("[,:]", text, maxsplit=1)[0]
        return cls(what, detail=text[len(what) :])

    @property
    def shown(self) -> str:
        return self.what + self.detail
