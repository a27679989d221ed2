"""Text of the command line as values, for ``Option(parse=...)``; a mistake is a ValueError of one line."""

from __future__ import annotations

import re

UNITS = {"": 1, "b": 1}
for power, letter in enumerate("kmgt", 1):
    UNITS |= {letter: 1000**power, f"{letter}b": 1000**power, f"{letter}ib": 1024**power}
COUNTS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}

MOST_LAYERS = 10_000


def parse_layers(text: str) -> frozenset[int] | None:
    """``0-2,29`` -> {0, 1, 2, 29}; ``none`` is None."""
    if text == "none":
        return None
    layers: set[int] = set()
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            start, end = int(first), int(last or first)
            if not 0 <= start <= end < MOST_LAYERS:
                raise ValueError
            layers.update(range(start, end + 1))
    except ValueError:
        raise ValueError(f"{text!r} names no layers: write something like 0-2,29, or none") from None
    return frozenset(layers)


def parse_count(text: str) -> int | None:
    """``160`` -> 160; ``all`` is None."""
    if text == "all":
        return None
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number: write something like 160, or all") from None


def parse_counts(text: str) -> tuple[int, ...]:
    """One number or a list, such as ``128,512``."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"{text!r} is neither a number nor a list of numbers: write something like 128 or 128,512"
        ) from None


def parse_pair(text: str) -> tuple[str, str]:
    """``OLD=NEW`` -> two names."""
    old, _, new = text.partition("=")
    if not old or not new:
        raise ValueError(f"{text!r} names no two models: write OLD=NEW")
    return old, new


def parse_duration(text: str) -> float:
    """``90s``, ``30m`` or ``1h`` in seconds; a number alone is seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d*)?)([smh]?)", text.strip().lower())
    if not match:
        raise ValueError(f"{text!r} is not a time: write something like 90s, 30m or 1h")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def parse_bytes(text: str) -> int:
    """``1.5G`` -> 1500000000, ``80MiB``; upper and lower case are alike."""
    return _amount(text, UNITS, "bytes", "80MB, 80MiB or 1.5G")


def parse_parameters(text: str) -> int:
    """``1.5B`` -> 1500000000, ``100M``."""
    return _amount(text, COUNTS, "parameters", "100M or 1.5B")


def _amount(text: str, units: dict[str, int], name: str, example: str) -> int:
    from fractions import Fraction

    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().replace("_", "").lower())
    if match is None or match[2] not in units:
        raise ValueError(f"{text!r} is not a number of {name}: write something like {example}")
    return int(Fraction(match[1]) * units[match[2]])


def parse_names(text: str) -> tuple[str, ...]:
    """Names between commas, each once."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
