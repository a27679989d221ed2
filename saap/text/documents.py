"""Text for calibration, tuning and evaluation, and its way into token ids.

Text comes from a file or a data set of a hub. Where none is given it comes from the directory that ``SAAP_DATA`` names,
else from the samples that ship with saap (:mod:`saap.text.samples`). What a result is evaluated on must not be what the
model was calibrated or tuned on: :mod:`saap.text.overlap` checks that.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import random
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from saap.base.errors import UserError
from saap.base.files import parse_json
from saap.text.conversations import is_conversation, messages_of
from saap.text.encoding import beginning, encode
from saap.text.samples import EVALUATION, TRAINING, read_sample

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

Split = Literal["calibration", "tuning", "evaluation"]

# Files of the SAAP_DATA directory. Web pages, encyclopedia and instructions: no single style decides what is kept.
TRAINING_FILES = ("c4_sample300.jsonl", "wikipedia_docs.jsonl.gz", "dolly_filtered3k.jsonl.gz")
EVALUATION_FILE = "wikitext2_test_raw.txt"
# What records call the samples.
TRAINING_SAMPLES = "web, encyclopedia and instructions (saap's samples)"
EVALUATION_SAMPLE = "WikiText-2 test (saap's sample)"

# Documents that are read from a hub's data set at most: calibration needs a few hundred.
HUB_DOCUMENTS = 4000
# A plain text is cut into documents of at least so many characters, at line ends, so that it can be shuffled.
DOCUMENT_CHARACTERS = 2000


@dataclass(frozen=True)
class Documents:
    """Texts with their origin."""

    texts: tuple[str, ...]  # documents in file order; evaluation text files are one document, exactly as they are
    source: str
    sha256: str  # over the texts, for the lineage of a result

    @property
    def text(self) -> str:
        """All of it as one text; documents are parted by a blank line."""
        return "\n\n".join(self.texts)


@dataclass(frozen=True)
class Sequences:
    """A number of rows of ``length`` tokens, after ``skip`` rows that another purpose has used."""

    count: int
    length: int
    seed: int = 0
    skip: int = 0


def load_documents(source: str | Path | None, *, split: Split, seed: int = 0) -> Documents:
    """Load the text for a purpose: the documents of ``source``, or of the default.

    Args:
        source: a text file, ``.jsonl`` or ``.json`` file (``text``, or ``instruction``/``input``/``output``), any of
            these with ``.gz``, or a data set id of a hub (``org/name`` or ``org/name:config``). None: the files in
            the directory that ``SAAP_DATA`` names, else the samples that ship.
        split: what the text is for; evaluation keeps a text file whole.
        seed: order in which the files of ``SAAP_DATA`` are mixed.

    Raises UserError: nothing there, nothing in it, a form that is not read, a broken ``SAAP_DATA`` or sample.
    """
    if source is None:
        named = os.environ.get("SAAP_DATA")
        return _of_directory(Path(named), split, seed) if named else samples_of(split)
    path = Path(source)
    if path.is_file():
        return documents_of(read_file(path, whole=split == "evaluation"), str(source))
    rows = _hub_rows(str(source), split)
    return documents_of([_row_text(row, where) for where, row in rows], f"data set {source}")


def load_rows(source: str | Path, *, split: Split) -> list[tuple[str, object]] | None:
    """Read the rows of a ``.jsonl`` or ``.json`` file or of a hub's data set, with file and line; None: plain text."""
    path = Path(source)
    return _json_rows(path, _content(path)) if path.is_file() else _hub_rows(str(source), split)


def one_kind(source: str | None) -> str | None:
    """Tell a file of running text from one of instructions; None for a mixture, and for what is no file.

    A model that is pruned or tuned on one of them loses more of the other than it has to.
    """
    if source is None or not Path(source).is_file():
        return None
    rows = load_rows(source, split="calibration")
    asked = [isinstance(row, dict) and ("instruction" in row or is_conversation(row)) for _, row in rows or []]
    if not any(asked):
        return "running text"
    return "instructions" if all(asked) else None


def read_file(path: Path, *, whole: bool = False) -> list[str]:
    """Read the documents of one file; ``whole`` keeps a plain text as one document.

    Raises UserError: naming the file, and the line where there is one.
    """
    content = _content(path)
    rows = _json_rows(path, content)
    if rows is not None:
        return [_row_text(row, where) for where, row in rows]
    return [content] if whole else cut_text(content)


def _content(path: Path) -> str:
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return raw.decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text ({error}): give UTF-8 text, .jsonl or .gz of these") from None


def _json_rows(path: Path, content: str) -> list[tuple[str, object]] | None:
    kind = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if kind in (".jsonl", ".ndjson"):
        # Only "\n" ends a row: splitlines would also break at U+2028, which JSON strings may hold.
        lines = [(f"{path} line {n}", line) for n, line in enumerate(content.split("\n"), 1) if line.strip()]
        return [(where, _parsed(line, where)) for where, line in lines]
    if kind != ".json":
        return None
    rows = _parsed(content, str(path))
    if not isinstance(rows, list):
        raise UserError(f"{path} is not a list of rows: give .jsonl, one object a line")
    return [(f"{path} row {n}", row) for n, row in enumerate(rows, 1)]


class TooLittleTextError(UserError):
    """A text does not fill as many rows as are part."""

    def __init__(self, message: str, missing: int) -> None:
        super().__init__(message)
        self.missing = missing  # rows


def pack(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    count: int,
    seed: int,
    fewer: str = "",
) -> torch.Tensor:
    """Rows of token ids for calibration and tuning, int64 [count, length].

    Documents are shuffled with the seed, tokenised without special tokens, joined by the end-of-sequence token and
    cut into rows; reading stops when there are enough. A row begins as :func:`beginning` says.

    ``fewer``: what else than more text a person may give where there is too little.

    Raises TooLittleTextError: with the numbers.
    """
    import torch

    order = list(texts)
    random.Random(seed).shuffle(order)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    begin = beginning(tokenizer)
    needed = count * (length - len(begin))
    ids: list[int] = []
    for text in order:
        if len(ids) >= needed:
            break
        ids += encode(text, tokenizer) + end
    if len(ids) < needed:
        raise TooLittleTextError(
            f"too little text: {len(order)} documents give {len(ids)} tokens, {count} rows of {length} need {needed}: "
            f"give more text{fewer and f', or {fewer}'}",
            count - len(ids) // (length - len(begin)),
        )
    rows = torch.tensor(ids[:needed], dtype=torch.int64).view(count, length - len(begin))
    return torch.cat([torch.tensor(begin, dtype=torch.int64).expand(count, -1), rows], dim=1)


def _of_directory(folder: Path, split: Split, seed: int) -> Documents:
    """Read the text in the directory that ``SAAP_DATA`` names."""
    names = (EVALUATION_FILE,) if split == "evaluation" else TRAINING_FILES
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"SAAP_DATA names {folder}, which lacks {', '.join(missing)}: mend it, unset it, or give a file"
        )
    if split == "evaluation":
        return documents_of(read_file(folder / EVALUATION_FILE, whole=True), EVALUATION_FILE)
    texts = [text for name in names for text in read_file(folder / name)]
    random.Random(f"{split} {seed}").shuffle(texts)
    return documents_of(texts, " + ".join(names))


def samples_of(split: Split) -> Documents:
    """Load the text that ships: in one order, so that tuning can pass over what calibration took of it.

    Raises UserError: a sample is damaged.
    """
    if split == "evaluation":
        return documents_of([read_sample(EVALUATION)], EVALUATION_SAMPLE)
    rows = (row for name in TRAINING for row in _json_rows(Path(name), read_sample(name)) or [])
    return documents_of((_row_text(row, where) for where, row in rows), TRAINING_SAMPLES)


def documents_of(texts: Iterable[str], source: str) -> Documents:
    """Texts with their origin and hash; blank ones are left out."""
    kept = tuple(text for text in texts if text.strip())
    if not kept:
        raise UserError(f"{source} holds no text: give a file with text in it")
    digest = hashlib.sha256()
    for text in kept:
        encoded = text.encode("utf-8", "surrogatepass")
        digest.update(f"{len(encoded)}\n".encode() + encoded)
    return Documents(kept, source, digest.hexdigest())


def _parsed(line: str, where: str) -> object:
    try:
        return parse_json(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error}): mend or remove it") from None


def is_unicode(text: str) -> bool:
    """Whether a text has no half of a surrogate pair, which JSON may hold and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def checked_text(text: str, where: str) -> str:
    """Check the text of a row."""
    if not is_unicode(text):
        raise UserError(f"{where} holds half of a surrogate pair (\\ud800 to \\udfff), which is no text: mend it")
    return text


def _row_text(row: object, where: str) -> str:
    """One row as plain text."""
    return checked_text(_joined(row, where), where)


def _joined(row: object, where: str) -> str:
    """Join the fields of a row; an instruction with its input and its answer, a line each."""
    if isinstance(row, dict):
        if isinstance(row.get("text"), str):
            return str(row["text"])
        if "instruction" in row:
            parts = (row["instruction"], row.get("input", row.get("context")), row.get("output", row.get("response")))
            return "\n".join(str(part) for part in parts if part)
        if is_conversation(row):
            return "\n".join(turn["content"] for turn in messages_of(row, where))
        if "choices" in row or "question" in row:
            raise UserError(f"{where} is a multiple-choice question: those are for evaluation tasks, give running text")
    raise UserError(f"{where} has neither 'text' nor 'instruction' nor 'messages': give rows with one of these fields")


def cut_text(content: str) -> list[str]:
    """Cut a plain text into the documents that it is shuffled by."""
    documents, lines, size = [], [], 0
    for line in content.splitlines(keepends=True):
        lines.append(line)
        size += len(line)
        if size >= DOCUMENT_CHARACTERS:
            documents.append("".join(lines))
            lines, size = [], 0
    return [*documents, "".join(lines)] if lines else documents


def _hub_rows(name: str, split: Split) -> list[tuple[str, object]]:
    """Rows of a hub's data set; whatever is no file comes here to be refused."""
    if Path(name).is_dir():
        raise UserError(f"{name} is a directory: give a text, .jsonl or .gz file")
    if name == "self":
        raise UserError(
            "models no longer write their own text: give a file, or leave the option out for saap's samples"
        )
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(:[\w.-]+)?", name) or Path(name).suffix:
        raise UserError(f"no text {name!r}: give a text, .jsonl or .gz file, or a data set id (org/name)")
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(
            f"{name} is no file here, and a data set id needs `pip install datasets`: or give a file"
        ) from None
    identifier, _, config = name.partition(":")
    part = "test" if split == "evaluation" else "train"
    try:
        rows = load_dataset(identifier, config or None, split=part, streaming=True)
        first = [row for row, _ in zip(rows, range(HUB_DOCUMENTS), strict=False)]
    except Exception as error:  # its HTTP library, and so the class of a lost connection, differs by version
        raise UserError(
            f"{name} is no file here, and no hub gave its {part!r} split ({type(error).__name__}): check the id and "
            "the network, or give a file"
        ) from None
    return [(f"{name} row {n}", row) for n, row in enumerate(first, 1)]
