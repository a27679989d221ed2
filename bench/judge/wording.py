"""Values of a JSON document as text for people; an unknown value, or one of the wrong type, is a dash."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from datetime import datetime, timezone

from saap.base.wording import counted

UNKNOWN = "\u2013"
TIMES = "\u00d7"
ABBREVIATIONS = {"bos", "cpu", "emc", "gpu", "id", "isa", "l4t", "numa", "os"}
AMOUNTS = {  # of a plan, by their keys in saap.json: what one of them is, and its words
    "ratio": (0.01, "{:.1f} % of the layers' weights removed"),
    "ratio_of_all": (0.01, "{:.1f} % of all weights removed"),
    **dict.fromkeys(("parameters", "max_params"), (1e6, "{:.1f} M parameters")),
    **dict.fromkeys(("bytes", "max_bytes"), (1e6, "{:.1f} MB")),
    "ms_per_token": (1.0, "{:.2f} ms per token"), "speedup": (1.0, "{:.2f}x as fast"),
}  # fmt: skip


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
        return ", ".join(f"{key} {item}" for key, item in facts(value).items())
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value))
    return str(value)


def facts(values: Mapping[str, object]) -> dict[str, str]:
    """Name the known values for people: their keys as words, bytes in MB and times in seconds."""
    named = {}
    for key, value in values.items():
        if value is None:
            continue
        stem, _, unit = key.rpartition("_")
        if stem and unit in ("bytes", "s"):
            key, known = stem, as_float(value)
            value = value if known is None else f"{megabytes(known)} MB" if unit == "bytes" else f"{known:g} s"
        words = key.replace("sha256", "SHA-256").split("_")
        named[" ".join(word.upper() if word in ABBREVIATIONS else word for word in words)] = plain(value)
    return named


def amounts(values: object) -> str:
    """Spell out the sizes and times of a plan."""
    known = [(*AMOUNTS[key], as_float(value)) for key, value in as_dict(values).items() if key in AMOUNTS]
    return ", ".join(form.format(value / unit) for unit, form, value in known if value is not None) or plain(values)


def moment(created: str) -> datetime:
    """Return an ISO 8601 time in UTC, which it is in where it does not say. Raises ValueError: it is none."""
    parsed = datetime.fromisoformat(created.replace("Z", "+00:00"))
    return parsed.astimezone(timezone.utc) if parsed.tzinfo else parsed.replace(tzinfo=timezone.utc)


def date(created: str) -> str:
    """Show an ISO 8601 time as ``4 December 2026, 12:30 UTC``, and any other text as it is."""
    try:
        known = moment(created)
    except ValueError:
        return created
    return f"{known.day} {known:%B %Y, %H:%M} UTC"


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
