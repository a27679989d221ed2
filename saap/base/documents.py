"""JSON files that saap writes and reads: one :class:`Document` for each kind."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Generic, TypeVar, cast, is_typeddict

import msgspec

from saap.base.errors import UserError
from saap.base.files import parse_json, read_whole, with_checksum, without_checksum, write_text

T = TypeVar("T")
LARGEST = 256 << 20  # bytes of a document


@dataclass(frozen=True)
class Document(Generic[T]):
    """A kind of JSON file: a dataclass, its format versions, and what to do about a file that is damaged.

    Attributes:
        kind: the dataclass, or the TypedDict, of which keys that it does not name are kept; constraints are
            ``msgspec.Meta`` in the annotations.
        version: the key that holds the format version, first where the dataclass has no such field; None: none.
        upgrade: an older document's fields as today's; called on every document before its types are checked.
    """

    kind: type[T]
    what: str  # what a person calls it, such as ``bench result``
    remedy: str  # how to get a good one, such as ``run `saap bench --json` again``
    version: str | None = None
    versions: tuple[int, ...] = (1,)  # that can be read; the last is written
    upgrade: Callable[[dict[str, object]], dict[str, object]] | None = None
    check: Callable[[T], None] | None = None  # what types cannot say; raises ValueError
    error: type[UserError] = UserError  # raised for all that is wrong with a file
    sealed: bool = True  # whether it carries a checksum
    mark: str = ""  # a key that every such file has, and others have not; by default that of the version

    def read(self, path: str | Path) -> T:
        """Read the document in a file.

        Raises UserError: (``error``) not there, not JSON, changed since, of another version, or not of these types.
        """
        return self.parse(self.content(path), str(path))

    def content(self, path: str | Path) -> str:
        """Return the text of such a file, not parsed; an error as of :meth:`read` where it cannot be one."""
        path = Path(path)
        try:
            return read_whole(path, LARGEST).decode("utf-8")
        except OSError as error:
            raise self.error(f"cannot read {path}: {error.strerror}; {self.remedy}") from None
        except UnicodeDecodeError:
            raise self.error(f"{path} is damaged (not UTF-8 text): {self.remedy}") from None
        except ValueError as error:
            raise self.error(f"{path} is damaged ({error}): {self.remedy}") from None

    def parse(self, text: str | bytes, name: str) -> T:
        """Parse the document in a text; ``name`` stands in messages for where it came from."""
        try:
            raw = parse_json(text, finite=True)
        except ValueError as error:
            raise self.error(f"{name} is damaged ({error}): {self.remedy}") from None
        if not isinstance(raw, dict):
            raise self.error(f"{name} is damaged (not an object): {self.remedy}")
        if (mark := self.mark or self.version) and raw.get(mark) is None:
            raise self.error(f"{name} is another kind of file (it has no {mark!r}): {self.remedy}")
        if self.version is not None and raw.get(self.version) not in self.versions:
            raise self.error(
                f"{name} has {self.what} {self.version} {raw.get(self.version)!r}, this saap reads "
                f"{' and '.join(map(str, self.versions))}: {self.remedy}"
            )
        try:
            return self.convert(raw)
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise self.error(f"{name} is damaged ({error}): {self.remedy}") from None

    def convert(self, raw: object) -> T:
        """Convert a parsed JSON object to the dataclass; ValueError, TypeError or KeyError where it does not fit."""
        if not isinstance(raw, Mapping):
            raise TypeError("not an object")
        content = without_checksum(raw) if self.sealed else dict(raw)
        if self.upgrade is not None:
            content = self.upgrade(content)
        value = msgspec.convert(content, self.kind)
        if is_typeddict(self.kind):
            value = cast("T", content)
        if self.check is not None:
            self.check(value)
        return value

    def text(self, value: T, indent: int | None = 1) -> str:
        """Return the document as JSON; one line where ``indent`` is None."""
        raw = plain(value)
        if self.version is not None and self.version not in raw:
            raw = {self.version: self.versions[-1], **raw}
        return json.dumps(with_checksum(raw) if self.sealed else raw, indent=indent, allow_nan=False)

    def write(self, path: str | Path, value: T) -> None:
        write_text(Path(path), self.text(value) + "\n")


def plain(value: object) -> dict[str, object]:
    if isinstance(value, dict):
        return value
    if not is_dataclass(value) or isinstance(value, type):
        raise TypeError(f"{value!r} is not a dataclass")
    return asdict(value)


def unknown_fields(raw: Mapping[str, object], kind: type) -> list[str]:
    return sorted(set(raw) - {field.name for field in fields(kind)})
