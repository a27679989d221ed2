"""Counts that a person writes with a unit, such as ``80MB`` or ``100M``."""

from __future__ import annotations

import re
from fractions import Fraction

BYTES = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", 1):
    BYTES |= {_letter: 1000**_power, f"{_letter}b": 1000**_power, f"{_letter}ib": 1024**_power}
PARAMETERS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}


def byte_count(text: str) -> int:
    """``80MB`` -> 80000000, ``80MiB`` -> 83886080; ValueError for anything else."""
    return _amount(text, BYTES, "bytes", "80MB, 80MiB or 1.5G")


def parameter_count(text: str) -> int:
    """``1.5B`` -> 1500000000; ValueError for anything else."""
    return _amount(text, PARAMETERS, "parameters", "100M or 1.5B")


def _amount(text: str, units: dict[str, int], name: str, example: str) -> int:
    """Upper and lower case are alike."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().replace("_", "").lower())
    if match is None or match[2] not in units:
        raise ValueError(f"{text!r} is no number of {name}: write something like {example}")
    return int(Fraction(match[1]) * units[match[2]])
