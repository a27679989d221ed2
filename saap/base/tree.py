"""Reading /proc and /sys: what is not there, not allowed or not a number is None. Nothing here raises."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

_FIELD = re.compile(r"^(?:Node \d+ )?([\w()]+):?[ \t]+(\d{1,15})( kB)?[ \t]*$", re.MULTILINE)
_COUNT = re.compile(r"[0-9]{1,5}")  # no machine has more processors


def text(path: Path) -> str | None:
    """Return the file's text without NUL and white space around it; None for an empty or unreadable one."""
    try:
        raw = path.read_bytes()
    except OSError:
        return None
    return raw.decode("utf-8", "replace").strip("\0 \t\r\n") or None


def number(path: Path) -> int | None:
    digits = text(path)
    try:
        return int(digits) if digits else None
    except ValueError:
        return None


def fields(path: Path) -> dict[str, int]:
    """Return the counts of a file such as /proc/meminfo, a name and a number a line; bytes where the file says kB."""
    matches = _FIELD.findall(text(path) or "")
    return {name: int(count) * (1024 if unit else 1) for name, count, unit in matches}


def field(path: Path, key: str) -> int | None:
    return fields(path).get(key)


def strings(path: Path) -> list[str]:
    """Return a device tree's list of strings, which NUL separates."""
    return [part for part in (text(path) or "").split("\0") if part]


def glob(base: Path, pattern: str) -> list[Path]:
    """Return the matches in the order of the numbers in their names; a folder that may not be read has none."""
    try:
        matches = list(base.glob(pattern))
    except OSError:
        return []
    return sorted(matches, key=lambda path: (_digits(path.relative_to(base).as_posix()), path.as_posix()))


def first_text(paths: Iterable[Path]) -> str | None:
    return next(filter(None, map(text, paths)), None)


def why_unreadable(paths: Iterable[Path]) -> str | None:
    """Name the first file that is there and cannot be read, and the reason; None without one."""
    for path in paths:
        try:
            path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            return f"{path} cannot be read ({error.strerror})"
    return None


def parse_cpu_list(listed: str) -> list[int]:
    """Parse the kernel's list format, ``0-3,6`` -> [0, 1, 2, 3, 6]; other pieces are left out."""
    cpus: list[int] = []
    for piece in listed.replace(" ", ",").split(","):
        first, _, last = piece.strip().partition("-")
        if _COUNT.fullmatch(first) and _COUNT.fullmatch(last or first):
            cpus.extend(range(int(first), int(last or first) + 1))
    return cpus


def cpu_list(cpus: Iterable[int]) -> str:
    """[0, 1, 2, 3, 6] -> ``0-3,6``."""
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and cpu == runs[-1][1] + 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _digits(name: str) -> tuple[int, ...]:
    words = "".join(c if c.isdigit() else " " for c in name).split()
    return tuple(map(int, words))
