"""``tokenizer.json`` that somebody else may have made: what the tokenizers library must not be given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from saap.base.errors import UserError

TOKENIZER = "tokenizer.json"
LARGEST_TOKENIZER = 128 << 20  # bytes
MOST_GROWTH = 1000


class _Model(msgspec.Struct):
    continuing_subword_prefix: str | None = None


class _Document(msgspec.Struct):
    """The parts that write a text anew, and those of the model that are small to read."""

    normalizer: object = None
    pre_tokenizer: object = None
    model: _Model | None = None


class _Merging(msgspec.Struct):
    merges: list[str | list[str]] = []


class _MergingDocument(msgspec.Struct):
    model: _Merging


def check_tokenizer(content: bytes) -> None:
    """Refuse what the library would abort on: it takes all memory, or panics.

    Raises ValueError: not of its types, a text becomes many times longer, or merges do not fit their prefix.
    """
    document = msgspec.json.decode(content, type=_Document)
    if (growth := _growth(document)) > MOST_GROWTH:
        raise ValueError(f"it makes a text up to {growth} times longer")
    if document.model is not None and (prefix := document.model.continuing_subword_prefix):
        for merge in msgspec.json.decode(content, type=_MergingDocument).model.merges:
            second = (merge.split(" ") if isinstance(merge, str) else merge)[-1]
            if not second.startswith(prefix):  # whose bytes are cut off
                raise ValueError(f"it merges {second[:40]!r} without its continuing_subword_prefix {prefix[:40]!r}")


def _growth(document: _Document) -> int:
    """Return how many times longer its replacements, one after the other, may make a text."""
    growth, parts = 1, [document.normalizer, document.pre_tokenizer]
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            content = part.get("content", part.get("prepend"))
            growth *= max(1, len(content)) if isinstance(content, str) else 1
            parts += part.values()
        elif isinstance(part, list):
            parts += part
    return growth


@contextmanager
def tokenizing(what: str, remedy: str, error: type[UserError] = UserError) -> Iterator[None]:
    """Turn whatever goes wrong in the library, which follows a file's rules, into an error of one line.

    It raises a bare ``Exception``, or panics, which is no ``Exception``.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as wrong:
        if not isinstance(wrong, Exception) and type(wrong).__name__ != "PanicException":
            raise
        message = (str(wrong).strip().splitlines() or [type(wrong).__name__])[0]
        raise error(f"{what} ({message}): {remedy}") from None
