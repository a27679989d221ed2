"""Results that saap keeps between runs and could compute again, such as scores, prices and a teacher's answers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from saap.base.files import cache_directory

T = TypeVar("T")


@dataclass(frozen=True)
class Store:
    """A folder of the cache, whose entries are files or directories named by all that their content depends on.

    Attributes:
        name: the folder's.
        most_bytes: size of all entries together; those unused longest go.
    """

    name: str
    most_bytes: int

    @property
    def folder(self) -> Path:
        return cache_directory() / self.name

    def read(self, entry: Path, parse: Callable[[bytes], T]) -> T | None:
        """Parse a file, which counts as used now; None where there is none, or a damaged one.

        ``parse`` raises KeyError or ValueError for damage.
        """
        try:
            value = parse(entry.read_bytes())
        except (OSError, KeyError, ValueError):
            return None
        with suppress(OSError):
            entry.touch()
        return value

    def write(self, entry: Path, save: Callable[[Path], object]) -> None:
        """Write a file by ``save`` and make room for it. A cache that cannot be written costs time only."""
        with suppress(OSError):
            entry.parent.mkdir(parents=True, exist_ok=True)
            save(entry)
            self.make_room(entry, entry.stat().st_size)

    def make_room(self, entry: Path, size: int) -> None:
        """Remove entries that were unused longest, until this one of ``size`` bytes fits beside the others."""
        used, sizes = {}, {}
        for other in entry.parent.iterdir():
            with suppress(OSError):  # another process may be removing it
                if other != entry:
                    used[other] = other.stat().st_mtime
                    sizes[other] = sum(f.stat().st_size for f in (other.iterdir() if other.is_dir() else (other,)))
        total = size + sum(sizes.values())
        for other in sorted(sizes, key=lambda other: used[other]):
            if total <= self.most_bytes:
                return
            if other.is_dir():
                shutil.rmtree(other, ignore_errors=True)
            else:
                other.unlink(missing_ok=True)
            total -= sizes[other]
