"""Values of a JSON document as text for people; an unknown value, or one of the wrong type, is a dash."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping

from saap.base.wording import counted

UNKNOWN = "\u2013"
TIMES = "\u00d7"


def threads(count: int) -> str:
    return counted(count, "thread")


def command_line(command: object) -> str | None:
    """Spell a command as it is typed in a shell; a list of arguments is quoted."""
    if isinstance(command, list | tuple):
        return shlex.join(map(str, command))
    return None if command is None else str(command)


def plain(value: object) -> str:
    if value is None:
        return UNKNOWN
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value))
    return str(value)


def as_float(value: object) -> float | None:
    """Return a finite number as float, anything else as None."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        return None
    return float(value)


def number(value: object, digits: int = 1) -> str:
    return UNKNOWN if (known := as_float(value)) is None else f"{known:.{digits}f}"


def millions(value: object) -> str:
    """Show a count in millions, such as ``134.5 M``."""
    return UNKNOWN if (known := as_float(value)) is None else f"{known / 1e6:.1f} M"


def megabytes(value: object) -> str:
    """Bytes in units of 10^6 bytes; small ones with two digits."""
    if (known := as_float(value)) is None:
        return UNKNOWN
    return f"{known / 1e6:.0f}" if known >= 1e7 else f"{known / 1e6:.2g}"


def percent(value: object) -> str:
    return UNKNOWN if (known := as_float(value)) is None else f"{100 * known:.1f} %"


def as_dict(value: object) -> dict[str, object]:
    return dict(value) if isinstance(value, Mapping) else {}


def as_list(value: object) -> list[object]:
    return list(value) if isinstance(value, list | tuple) else []
