"""Outputs are checked before the work: never over an input, nor over what saap did not write, unless that is forced.

What a file holds tells whose it is: fields of a JSON object, a key of a GGUF file, a mark near the beginning of a page.
A file of ours is replaced by one of its kind only; an empty one by any. Standard library only.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from saap.base.errors import UserError
from saap.base.files import is_special, parse_json, read_whole, stream_number
from saap.base.gguf_header import read_header

LARGEST = 256 << 20  # bytes of a document that is read to tell what it is
NEAR = 4096  # bytes from the beginning that hold the mark of a page, and that a place must have room for
CARDS = (".", "README", "LICENSE", "NOTICE")  # how names begin that may stand beside what saap writes

_forced: ContextVar[bool] = ContextVar("forced", default=False)


@contextmanager
def writing_over() -> Iterator[None]:
    """Let an output take the place of files that saap did not write, as ``--force`` does, until the block ends."""
    before = _forced.set(True)
    try:
        yield
    finally:
        _forced.reset(before)


def is_forced() -> bool:
    return _forced.get()


@dataclass(frozen=True)
class Kind:
    """A kind of file that saap writes."""

    what: str  # for a person
    ours: Callable[[Path], bool]  # whether the file there is one; raises OSError or ValueError where it is none


def _json(*fields: str, kind: str | None = None) -> Callable[[Path], bool]:
    def ours(path: Path) -> bool:
        value = parse_json(read_whole(path, LARGEST))
        return isinstance(value, dict) and all(name in value for name in fields) and value.get("kind", kind) == kind

    return ours


def _marked(mark: bytes) -> Callable[[Path], bool]:
    def ours(path: Path) -> bool:
        with path.open("rb") as file:
            return mark in file.read(NEAR)

    return ours


RESULT = Kind("a result of `saap bench`", _json("schema", "measurements"))
QUALITY = Kind("a document of `saap eval`", _json("kind", "rows", kind="saap-quality"))
COSTS = Kind("a table of `saap devices costs`", _json("kind", "stacks", kind="saap costs"))
BASELINE = Kind("a recorded baseline", _json("baseline", "results"))
SPEEDS = Kind("a comparison of speeds", _json("comparable", "min_effect", "rows"))
QUALITIES = Kind("a comparison of qualities", _json("kind", "rows", kind="saap-quality-comparison"))
EMULATION = Kind("a document of `saap devices emulate`", _json("bundle", "reference", "answers"))
JUNIT = Kind("a JUnit file of saap", _marked(b'<testsuite name="saap '))
PAGE = Kind("a page of `saap report`", _marked(b" saap report</title>"))
GGUF = Kind("a GGUF file of saap", lambda path: "saap.model_sha256" in read_header(path).metadata)
RECORDS = {  # of directories
    "saap.json": Kind("a slim or tuned directory", _json("format")),
    "bundle.json": Kind("a bundle", _json("format", "target")),
    "run.json": Kind("the directory of a run", _json("model", "steps")),
}


def check_apart(out: Path, *inputs: object) -> None:
    """Refuse an output that is an input, or a folder that holds one; what is no path (a model's name) passes.

    Raises:
        UserError: says which.
    """
    place = out.resolve()
    for source in inputs:
        clash = False
        with suppress(OSError, ValueError):  # a name that no file system has
            path = Path(str(source)).resolve()
            clash = source is not None and path.exists() and (path == place or place in path.parents)
        if clash:
            raise UserError(f"{out} is, or holds, an input ({source}): give another output")


def check_place(path: Path | None, kind: Kind, *inputs: object) -> None:
    """Refuse, before minutes of work, a file that could not be written, is an input, or is no earlier one of its kind.

    A device, a pipe and ``-``, which is standard output, are written to as they are.
    """
    if path is None or str(path) == "-":
        return
    if (number := stream_number(path)) is not None:
        try:
            os.fstat(number)
        except OSError:
            raise UserError(f"{path} is closed: give another place") from None
        return
    if is_special(path):
        if not os.access(path, os.W_OK):
            raise UserError(f"{path} cannot be written (Permission denied): give another place")
        return
    if path.is_dir():
        raise UserError(f"{path} is a directory: give the name of a file")
    check_apart(path, *inputs)
    _check_no_bundle(path.parent, path)
    if not (is_forced() and not _lies_in(path, inputs)) and not _is_of(kind, path):
        raise UserError(f"{path} is not {kind.what}, and is not written over: give another name, or --force")
    check_writable(path.parent, path)


def _check_no_bundle(folder: Path, out: Path) -> None:
    """Refuse to add a file to a bundle, which is loaded only while it holds what it lists."""
    if _is_of(RECORDS["bundle.json"], folder / "bundle.json", empty=False):
        raise UserError(f"{out} would lie in a bundle, which holds only what it lists: give another place")


def check_directory_place(out: Path, records: tuple[str, ...], *inputs: object) -> None:
    """Refuse a directory that is an input or holds one, that cannot be made, or that holds what saap did not write.

    ``records``: the names of the records of which an earlier output holds one.
    """
    check_apart(out, *inputs)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: give a directory that is new, empty, or an earlier output of saap")
    if out.is_dir() and any(out.iterdir()) and not is_forced():
        record = next((name for name in records if _is_of(RECORDS[name], out / name, empty=False)), None)
        if record is None:
            kinds = " or ".join(RECORDS[name].what for name in records)
            raise UserError(
                f"{out} holds other files: give a directory that is new, empty, or {kinds} of saap, or --force"
            )
        if strangers := _strangers(out, record):
            raise UserError(f"{out} holds {strangers[0]}, which saap did not write: move it away, or --force")
    check_writable(out.parent, out)


def check_folder(folder: Path, kind: Kind, flag: str) -> None:
    """Refuse a folder of files of one kind that cannot be written, or that holds other files and none of ours."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: {flag} takes a folder")
    _check_no_bundle(folder, folder)
    if folder.is_dir() and not is_forced():
        files = [path for path in folder.iterdir() if not path.name.startswith(CARDS)]
        if files and not any(_is_of(kind, path, empty=False) for path in files if path.suffix == ".json"):
            raise UserError(f"{folder} holds other files, and not {kind.what}: give another {flag}, or --force")
    check_writable(folder, folder, f"another {flag}")


def check_writable(folder: Path, out: Path, instead: str = "another place") -> None:
    """Raise UserError where no file can be made in a folder, or in the one that would hold it."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(NEAR))  # which a full disk does not take
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): give {instead}") from None


def _is_of(kind: Kind, path: Path, empty: bool = True) -> bool:
    """Whether a file may be replaced by one of this kind; ``empty``: as may one that is not there or holds nothing."""
    try:
        if empty and (not path.exists() or path.stat().st_size == 0):
            return True
        return path.is_file() and kind.ours(path)
    except (OSError, ValueError):  # it cannot be read, or not as such a file
        return False


def _lies_in(path: Path, inputs: tuple[object, ...]) -> bool:
    """Whether a file would be one of an input's: that is no place for others, forced or not."""
    above = path.resolve().parents
    for source in inputs:
        with suppress(OSError, ValueError):  # a name that no file system has
            if source is not None and Path(str(source)).resolve() in above:
                return True
    return False


def _strangers(out: Path, record: str) -> list[str]:
    """Return files of a directory that its record does not list; cards and licences are their owner's."""
    with suppress(OSError, ValueError):
        known = parse_json(read_whole(out / record, LARGEST))
        if isinstance(known, dict) and isinstance(listed := known.get("files"), dict):
            ours = {record, *listed}
            names = sorted(path.name for path in out.iterdir() if path.name not in ours)
            return [name for name in names if not name.startswith(CARDS)]
    return []
