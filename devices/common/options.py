"""What a field of an options dataclass says to the command line; the click options are made of it.

    @dataclass(frozen=True)
    class PruneOptions:
        ratio: Annotated[float | None, Option("Share to remove.", metavar="SHARE"), Meta(gt=0, lt=1)] = None
        slices: Annotated[int, Option("Slices of the Taylor integral.", shown=False), Meta(ge=1)] = 1

The range is ``msgspec.Meta``'s, the choices are a ``Literal``'s, a ``bool`` is a flag. A field that is itself an
options
dataclass is flattened. A field without an ``Option`` is not set from outside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Option:
    """One option of a command.

    Attributes:
        help: one sentence, without the default.
        section: the heading that help shows it under.
        flags: its spellings on the command line; empty is the field's name with dashes.
        metavar: what help shows for the value.
        shown: False keeps it out of help: ``--set NAME=VALUE``, ``--config FILE`` and ``--help-all`` know it.
        parse: text to value, raising ValueError with one line; None goes by the annotation.
    """

    help: str
    section: str = "Options"
    flags: tuple[str, ...] = ()
    metavar: str | None = None
    shown: bool = True
    parse: Callable[[str], Any] | None = None
