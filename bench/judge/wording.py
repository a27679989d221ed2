"""Values of a JSON document as a person writes them; what is unknown, or of the wrong kind, is a dash."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from typing import Any

UNKNOWN = "\u2013"
TIMES = "\u00d7"
DASH = "\u2013"


def threads(count: int) -> str:
    """A count of threads."""
    return f"{count} thread{'s' * (count != 1)}"


def command_line(command: Any) -> str | None:
    """A command as it is typed in a shell; a list of arguments is quoted."""
    return shlex.join(map(str, command)) if isinstance(command, list | tuple) else command


def plain(value: Any) -> str:
    """A JSON value as a person would write it."""
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


def as_float(value: Any) -> float | None:
    """A finite number, else None."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None


def number(value: Any, digits: int = 1) -> str:
    """Fixed decimals."""
    return UNKNOWN if (known := as_float(value)) is None else f"{known:.{digits}f}"


def millions(value: Any) -> str:
    """A count such as that of parameters."""
    return UNKNOWN if (known := as_float(value)) is None else f"{known / 1e6:.1f} M"


def megabytes(value: Any) -> str:
    """Bytes in units of 10^6 bytes; small ones with two digits."""
    if (known := as_float(value)) is None:
        return UNKNOWN
    return f"{known / 1e6:.0f}" if known >= 1e7 else f"{known / 1e6:.2g}"


def percent(value: Any) -> str:
    """A fraction of 1 in percent."""
    return UNKNOWN if (known := as_float(value)) is None else f"{100 * known:.1f} %"


def as_dict(value: Any) -> dict[str, Any]:
    """An object, else an empty one."""
    return dict(value) if isinstance(value, Mapping) else {}


def as_list(value: Any) -> list[Any]:
    """An array, else an empty one."""
    return list(value) if isinstance(value, list | tuple) else []
