"""Files that are whole or not there, and known by their sha256. Standard library only; all of saap may import it.

A document that saap writes carries ``checksum`` beside its own fields: sha256 over the others as JSON with sorted keys,
so that a byte that changed on a disk or on the way is found when it is read, and not taken for a number.
"""

from __future__ import annotations

import atexit
import errno
import hashlib
import json
import logging
import math
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from saap.base.errors import UserError

FIELD = "checksum"
CACHE = "SAAP_CACHE"  # names the cache's directory


class ChecksumError(ValueError):
    """A document is not the one that was written; the message goes on from the name of its file."""


@contextmanager
def naming(place: str | Path) -> Iterator[None]:
    """Give errors of the system that name no file, as a write has that finds no room, the name of this one."""
    try:
        yield
    except OSError as error:
        short = error.errno is None and " requested and " in str(error)  # how numpy tells of a write that found no room
        if error.filename is not None or not (error.errno or short):
            raise
        code = error.errno or errno.ENOSPC
        raise OSError(code, os.strerror(code), str(place)) from None


@contextmanager
def calling(temporary: Path, name: str | Path) -> Iterator[None]:
    """Let messages of errors say ``name`` where they would say ``temporary``, which the user does not know."""
    try:
        yield
    except UserError as error:
        error.args = tuple(a.replace(str(temporary), str(name)) if isinstance(a, str) else a for a in error.args)
        raise
    except OSError as error:
        if error.filename is not None:
            error.filename = str(error.filename).replace(str(temporary), str(name))
        raise


def write_text(path: Path, text: str, errors: str = "strict") -> None:
    """Write beside and rename, making the folder; a device or a pipe is written to as it is.

    Args:
        errors: what becomes of characters that UTF-8 has not, as in ``str.encode``.

    Raises:
        OSError: with the name of the file that cannot be written.
    """
    with naming(path):
        if is_special(path):
            number = stream_number(path)
            if number == 1:
                sys.stdout.flush()
            there = os.open(path, os.O_WRONLY) if number is None else os.dup(number)  # by its name it would begin anew
            with os.fdopen(there, "w", encoding="utf-8", errors=errors) as file:
                file.write(text)
            return
        partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_text(text, encoding="utf-8", errors=errors)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def is_special(path: Path) -> bool:
    """Whether there is something that is neither a file nor a directory: a device, a pipe, ``/dev/stdout``."""
    if stream_number(path) is not None:
        return True
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def stream_number(path: Path) -> int | None:
    """Return the number of the stream that ``/dev/stdout``, ``/dev/stderr`` or ``/dev/fd/N`` names."""
    named = re.fullmatch(r"/dev/(stdout|stderr)|/(?:dev|proc/self)/fd/(\d+)", str(path))
    if named is None:
        return None
    return {"stdout": 1, "stderr": 2}[named[1]] if named[1] else int(named[2])


def read_whole(path: Path, most: int) -> bytes:
    """Read a file that somebody else may have made.

    Raises:
        OSError: not there or not readable, or not a regular file (a device may have no end, a pipe never begin).
        ValueError: larger than ``most`` bytes.
    """
    if not stat.S_ISREG((about := path.stat()).st_mode):
        raise OSError(errno.EINVAL, "not a file", str(path))
    content = b""
    if about.st_size <= most:
        with path.open("rb") as file:
            content = file.read(most + 1)
    if max(about.st_size, len(content)) > most:
        raise ValueError(f"larger than {most >> 20} MiB")
    return content


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


MOST_NESTED = 100  # lists and objects in one another; ours have ten


def parse_json(text: str | bytes, *, finite: bool = False) -> object:
    """Parse a JSON text.

    Args:
        finite: refuse NaN and infinite numbers, which Python's own reader takes, and what is nested more than
            ``MOST_NESTED`` deep.

    Raises ValueError: invalid, nested too deeply, or an integer of too many digits.
    """
    try:
        parsed: object = json.loads(text, parse_constant=_finite, parse_float=_finite) if finite else json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text") from None
    except ValueError as error:
        if "int_max_str_digits" not in str(error):
            raise
        raise ValueError(f"a number has more than {sys.get_int_max_str_digits()} digits") from None
    if finite:
        check_nested(parsed)
    return parsed


def check_nested(parsed: object) -> None:
    """Refuse what is nested more than ``MOST_NESTED`` deep: who copies or writes it would fail. Raises ValueError."""
    level = [parsed]
    for _ in range(MOST_NESTED):
        if not (level := [each for outer in level for each in _inside(outer)]):
            return
    raise ValueError("nested too deeply")


def _inside(outer: object) -> list[object]:
    """Return the lists and objects in a list or an object."""
    inner = outer.values() if isinstance(outer, dict) else outer if isinstance(outer, list) else ()
    return [each for each in inner if isinstance(each, dict | list)]


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"a number is {number[:40]}")
    return value


def with_checksum(document: Mapping[str, object]) -> dict[str, object]:
    """Add a document's checksum as the last of its fields."""
    fields = {name: value for name, value in document.items() if name != FIELD}
    return {**fields, FIELD: _checksum(json.loads(json.dumps(fields)))}  # as it will be read: lists, and keys of text


def without_checksum(document: Mapping[str, object]) -> dict[str, object]:
    """Check and remove a document's checksum. One without, of an earlier saap or written by hand, passes.

    Raises ChecksumError: the checksum is that of other fields.
    """
    fields = {name: value for name, value in document.items() if name != FIELD}
    if FIELD in document and document[FIELD] != _checksum(fields):
        raise ChecksumError(f"it was changed after it was written; if that was you, remove its {FIELD!r}")
    return fields


def _checksum(fields: Mapping[str, object]) -> str:
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def cache_directory() -> Path:
    """Return the place for what saap can make again; a temporary one, with a warning, if that cannot be written.

    Processes that this one starts take the same.
    """
    place = cache_place()
    if why := _unwritable(place):
        other = tempfile.mkdtemp(prefix="saap-cache-")
        atexit.register(_remove_own, other, os.getpid())
        os.environ[CACHE] = other
        logging.getLogger("saap").warning(
            "saap: the cache %s cannot be written (%s): nothing is kept for next time; SAAP_CACHE may name another",
            place, why,
        )  # fmt: skip
        return Path(other)
    return place


def _unwritable(place: Path) -> str | None:
    """Say why no file can be written below a directory, which need not exist yet; empty if one can."""
    there = next((folder for folder in (place, *place.parents) if folder.exists()), None)
    if there is None or not there.is_dir():
        return os.strerror(errno.ENOTDIR)
    if os.access(there, os.W_OK | os.X_OK):
        return None
    return os.strerror(errno.EROFS if os.statvfs(there).f_flag & os.ST_RDONLY else errno.EACCES)


def _remove_own(folder: str, owner: int) -> None:
    if os.getpid() == owner:  # not a process that was forked off
        shutil.rmtree(folder, ignore_errors=True)


def cache_place() -> Path:
    """``SAAP_CACHE``, else ``saap`` in the platform's directory for caches."""
    if chosen := os.environ.get(CACHE):
        return Path(chosen)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "saap"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "saap"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "saap"
