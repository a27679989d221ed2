"""``tokenizer.json`` that somebody else may have made: what the tokenizers library must not be given."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import msgspec

from saap.base.errors import UserError

TOKENIZER = "tokenizer.json"
LARGEST_TOKENIZER = 128 << 20  # bytes
MOST_GROWTH, MOST_STEPS, MOST_LETTERS = 1000, 16, 10_000

INNER = ("normalizers", "pretokenizers", "processors", "decoders")  # of a sequence of steps
# How many bytes each step may make of one (of normal forms: Unicode's UAX 15); other kinds are not allowed.
NORMALIZERS = {
    "BertNormalizer": 9, "ByteLevel": 2, "Lowercase": 2, "NFC": 3, "NFD": 3, "NFKC": 11, "NFKD": 11, "Nmt": 1,
    "Precompiled": 1, "Prepend": 1, "Replace": 1, "Sequence": 1, "Strip": 1, "StripAccents": 1,
}  # fmt: skip
PRE_TOKENIZERS = {
    "BertPreTokenizer": 1, "ByteLevel": 2, "CharDelimiterSplit": 1, "Digits": 1, "FixedLength": 1, "Metaspace": 5,
    "Punctuation": 1, "Sequence": 1, "Split": 1, "UnicodeScripts": 1, "Whitespace": 1, "WhitespaceSplit": 1,
}  # fmt: skip
DECODERS = {
    "BPEDecoder": 1, "ByteFallback": 1, "ByteLevel": 1, "CTC": 1, "Fuse": 1, "Metaspace": 1, "Replace": 1,
    "Sequence": 1, "Strip": 1, "WordPiece": 1,
}  # fmt: skip
POST_PROCESSORS = dict.fromkeys(
    ("BertProcessing", "ByteLevel", "RobertaProcessing", "Sequence", "TemplateProcessing"), 1
)


class _Model(msgspec.Struct):
    continuing_subword_prefix: str | None = None
    max_input_chars_per_word: int = 0


class _Document(msgspec.Struct):
    """The parts that write a text anew, and those of the model that are small to read."""

    normalizer: object = None
    pre_tokenizer: object = None
    post_processor: object = None
    decoder: object = None
    model: _Model | None = None


class _Special(msgspec.Struct):
    ids: list[int]


class _Step(msgspec.Struct):
    """One step of a part; which fields it has depends on its type."""

    type: str
    content: str | None = None
    prepend: str | None = None
    precompiled_charsmap: str = ""
    single: list[object] = []
    pair: list[object] = []
    special_tokens: dict[str, _Special] = {}
    start: int = 0  # letters that Strip takes from an end
    stop: int = 0

    def longest(self) -> int:
        """Return the bytes of the longest text, or the tokens of the longest list, that it puts in a text's place."""
        texts = [text.encode() for text in (self.content, self.prepend) if text]
        if charsmap := base64.b64decode(self.precompiled_charsmap):
            trie = int.from_bytes(charsmap[:4], "little")
            texts += charsmap[4 + trie :].split(b"\0")
        ids = max((len(special.ids) for special in self.special_tokens.values()), default=1)
        return max(*map(len, texts), len(self.single) * ids, len(self.pair) * ids, 1)


class _Merging(msgspec.Struct):
    merges: list[str | list[str]] = []


class _MergingDocument(msgspec.Struct):
    model: _Merging


def check_tokenizer(content: bytes) -> None:
    """Refuse what the library would abort on: it takes all memory, or panics.

    Raises ValueError: not of its types, steps of other kinds or too many, a text becomes many times longer, or merges
    do not fit their prefix.
    """
    document = msgspec.json.decode(content, type=_Document)
    growth = _growth("normalizer", document.normalizer, NORMALIZERS)
    growth *= _growth("pre_tokenizer", document.pre_tokenizer, PRE_TOKENIZERS)
    growths = [growth, _growth("decoder", document.decoder, DECODERS)]
    growths.append(_growth("post_processor", document.post_processor, POST_PROCESSORS))
    if (growth := max(growths)) > MOST_GROWTH:
        raise ValueError(f"it makes a text up to {growth} times longer, {MOST_GROWTH} are allowed")
    if document.model is None:
        return
    if (letters := document.model.max_input_chars_per_word) > MOST_LETTERS:
        raise ValueError(f"max_input_chars_per_word is {letters}, {MOST_LETTERS} are allowed")
    if prefix := document.model.continuing_subword_prefix:
        for merge in msgspec.json.decode(content, type=_MergingDocument).model.merges:
            second = (merge.split(" ") if isinstance(merge, str) else merge)[-1]
            if not second.startswith(prefix):  # whose bytes are cut off
                raise ValueError(f"it merges {second[:40]!r} without its continuing_subword_prefix {prefix[:40]!r}")


def _growth(name: str, part: object, kinds: Mapping[str, int]) -> int:
    """Return how many times longer the steps of a part, one after the other, may make a text.

    Raises ValueError: a step of another kind, or too many.
    """
    growth, steps = 1, _steps(part)
    if len(steps) > MOST_STEPS:
        raise ValueError(f"its {name} has {len(steps)} steps, {MOST_STEPS} are allowed")
    for step in (msgspec.convert(step, _Step) for step in steps):
        if step.type not in kinds:
            raise ValueError(f"its {name} has a step {step.type[:40]!r}, allowed are {', '.join(kinds)}")
        if step.start and step.stop:  # of a token with fewer letters the library panics
            raise ValueError(f"its {name} strips both ends of a token, one is allowed")
        growth *= kinds[step.type] * step.longest()
    return growth


def _steps(part: object) -> list[dict[str, object]]:
    """List the steps of a part, those of nested sequences too."""
    steps: list[dict[str, object]] = []
    parts = [part]
    while parts:
        part = parts.pop()
        if isinstance(part, list):
            parts += part
        elif isinstance(part, dict):
            inner = [value for name, value in part.items() if name in INNER]
            parts += inner
            steps += [part] if not inner else []
    return steps


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
        raise error(f"{what} ({what_failed(wrong)}): {remedy}") from None


def what_failed(wrong: BaseException) -> str:
    """Return the first line of an error or a panic of the library; raises again what is neither."""
    if not isinstance(wrong, Exception) and type(wrong).__name__ != "PanicException":
        raise wrong
    return (str(wrong).strip().splitlines() or [type(wrong).__name__])[0]
