"""Rows of token ids for calibration and tuning: packed text, or conversations of which only the answers are learnt.

Text is the user's, that of SAAP_DATA, or the samples that ship.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from saap.base.errors import UserError
from saap.base.wording import counted
from saap.models.architectures import positions_of
from saap.models.checkpoint import read_config
from saap.models.resolve import load_tokenizer
from saap.text.conversations import ChatEncoder, Sample, has_chat_template, is_conversation, messages_of
from saap.text.documents import (
    Sequences,
    Split,
    TooLittleTextError,
    checked_text,
    documents_of,
    load_documents,
    load_rows,
    pack,
)
from saap.text.encoding import check_ids, tokenizer_for

IGNORED = -100  # the label of a token that is not learnt, as in transformers
KINDS = ("auto", "text", "chat")
# Conversations that are at hand to fill a row with. Of SmolLM2's tokens of Dolly, 4 % of 256 stay empty, 1.4 % of 512:
# many conversations leave less room than the shortest one needs.
WINDOW = 256
FEWEST_ROWS = 4  # that are parted into rows to learn from and rows held out


@dataclass(frozen=True)
class Rows:
    """Token ids [rows, tokens] and their text; ``sha256`` is None where only ids are known."""

    ids: torch.Tensor
    source: str
    sha256: str | None

    def lineage(self) -> dict[str, object]:
        return {"source": self.source, "text_sha256": self.sha256}


def training_rows(
    model_dir: Path,
    source: str | None,
    split: Split,
    sequences: Sequences,
) -> Rows:
    """Pack a text into rows of token ids that the model can predict."""
    count, length, seed = sequences.count, sequences.length, sequences.seed
    if count < 1 or length < 2:
        raise UserError(
            f"{counted(count, 'sequence')} of {counted(length, 'token')} cannot teach anything: "
            "give at least 1 of 2 tokens"
        )
    check_length(model_dir, length)
    documents = load_documents(source, split=split, seed=seed)
    fewer = "fewer --tokens" if split == "tuning" else "fewer --sequences or a smaller --length"
    tokenizer = tokenizer_for(model_dir, documents.texts, documents.source)
    ids = pack(documents.texts, tokenizer, length, count + sequences.skip, seed, fewer)[sequences.skip :]
    check_ids(ids, model_dir)
    return Rows(ids, documents.source, documents.sha256)


def check_length(model_dir: Path, length: int) -> None:
    """Refuse sequences that are longer than the model was made for."""
    positions = positions_of(read_config(model_dir))
    if length > positions:
        raise UserError(f"--length {length} is more than the {positions} positions of {model_dir}: give fewer")


@dataclass(frozen=True)
class TuningRows:
    """Training text, cut into rows.

    A label is the token AT its place, -100 where it is not learnt. The model shifts: the label of place t is predicted
    from the places before t, so the first of a row never is.
    """

    ids: torch.Tensor  # token ids, int64 [rows, tokens]
    labels: torch.Tensor  # int64 [rows, tokens]
    source: str
    sha256: str | None  # over the text; None where only ids are known
    kind: str  # ``text`` or ``chat``
    note: str | None = None  # what the user should be told about how the data was read

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def learnt(self) -> int:
        """Tokens that are predicted and learnt, over all rows."""
        return int((self.labels[:, 1:] != IGNORED).sum())

    def lineage(self) -> dict[str, object]:
        """Describe the text for a record; the ids' hash tells rows of one text apart."""
        digest = hashlib.sha256(self.ids.numpy().tobytes() + self.labels.numpy().tobytes()).hexdigest()
        about: dict[str, object] = {"source": self.source, "text_sha256": self.sha256, "kind": self.kind}
        return about | {"rows": len(self.ids), "learnt_tokens": self.learnt, "rows_sha256": digest}


def tuning_rows(
    model_dir: Path,
    source: str | None,
    sequences: Sequences,
    kind: str = "auto",
) -> TuningRows:
    """Rows to tune on.

    Plain text is packed as for calibration (:func:`saap.text.documents.pack`) and every token of it is learnt.
    The default is always text.

    Conversations are written with the model's chat template and only what the assistant says is learnt
    (:class:`saap.text.conversations.ChatEncoder`). They are shuffled with the seed and each is whole in one row: a
    row takes the one that has waited longest and then, of the next 256, the longest that still fits. One that is longer
    than a row has one of its own, cut at the end. Conversations in one row see each other, as packed documents do; what
    remains of a row is filled with the end-of-sequence token and not learnt. Rows do not depend on ``count``.

    Args:
        model_dir: whose tokenizer and chat template are taken.
        source: as for :func:`saap.text.documents.load_documents`; chat data is a ``.jsonl`` or ``.json`` file or
            a hub's data set with ``messages``, ``conversations`` or ``instruction``.
        kind: ``text`` reads chat data as plain text, an utterance a line. ``chat`` takes nothing else. ``auto`` takes
            data as chat where every row is a conversation and the model has a chat template; a base model, which has
            none, learns the same data as text, and ``note`` says so.

    Raises UserError: no such data, too little of it, or kind ``chat`` where it cannot be.
    """
    if kind not in KINDS:
        raise UserError(f"data of kind {kind!r} is not known: give one of {', '.join(KINDS)}")
    rows, note = None, None
    if source is None and kind == "chat":
        raise UserError("chat needs conversations: give a .jsonl file of them, or leave --kind chat out")
    if source is not None and kind != "text":
        rows, note = _chat_rows(model_dir, source, kind)
        if rows is not None:
            return _chat(model_dir, rows, source, sequences)
    text = training_rows(model_dir, source, "tuning", sequences)
    return TuningRows(text.ids, text.ids.clone(), text.source, text.sha256, "text", note)


def held_out(rows: TuningRows, share: float) -> tuple[TuningRows, TuningRows]:
    """Rows to learn from and the last ``share`` of them, at least one, to judge by.

    The document at the border of packed text has a part on either side.

    Raises UserError: fewer than four rows, or a share that is not above 0 and at most a half.
    """
    if not 0 < share <= 0.5:
        raise UserError(f"a share of {share} rows cannot be held out: give a number above 0 and at most 0.5")
    if len(rows) < FEWEST_ROWS:
        raise UserError(
            f"{len(rows)} rows are too few to hold some out, {FEWEST_ROWS} are needed: give more text, or shorter rows"
        )
    kept = len(rows) - max(1, round(share * len(rows)))
    return (
        replace(rows, ids=rows.ids[:kept], labels=rows.labels[:kept]),
        replace(rows, ids=rows.ids[kept:], labels=rows.labels[kept:]),
    )


def _chat_rows(model_dir: Path, source: str, kind: str) -> tuple[list[tuple[str, object]] | None, str | None]:
    """Read the rows if they are taken as chat, and a note for the user if they are not."""
    rows = load_rows(source, split="tuning")
    chats = [is_conversation(row) for _, row in rows or []]
    if kind == "chat":
        if not chats:
            raise UserError(f"{source} holds no conversations: give a .jsonl file of them, or --kind text")
        return rows, None
    if not any(chats):
        return None, None
    if not all(chats):
        return None, f"{source} is read as plain text: only {sum(chats)} of its {len(chats)} rows are conversations"
    if not has_chat_template(load_tokenizer(model_dir)):
        return None, f"{source} is read as plain text: the model has no chat template"
    return rows, None


def _chat(model_dir: Path, rows: list[tuple[str, object]], source: str, sequences: Sequences) -> TuningRows:
    count, length, skip = sequences.count, sequences.length, sequences.skip
    if count < 1 or length < 2:
        raise UserError(
            f"{counted(count, 'row')} of {counted(length, 'token')} cannot teach anything: give at least 1 of 2 tokens"
        )
    check_length(model_dir, length)
    talks = [(where, messages_of(row, where)) for where, row in rows]
    named = source if Path(source).is_file() else f"data set {source}"
    texts = (checked_text("\n".join(turn["content"] for turn in talk), where) for where, talk in talks)
    documents = documents_of(texts, named)
    tokenizer = tokenizer_for(model_dir, documents.texts, documents.source)
    encoder, left_out = ChatEncoder(tokenizer), [0]
    random.Random(sequences.seed).shuffle(talks)

    def cut() -> Iterator[Sample]:
        for where, talk in talks:
            for ids, learnt in encoder.samples(talk, where):
                if any(learnt[1:length]):
                    yield ids[:length], [False, *learnt[1:length]]
                else:
                    left_out[0] += 1

    packed = _pack(cut(), length, count + skip, tokenizer.eos_token_id or 0)
    if len(packed) < count + skip:
        unused = f" ({left_out[0]} answers begin after {length} tokens)" if left_out[0] else ""
        after = f" after {skip} that are used" if skip else ""
        raise TooLittleTextError(
            f"too little chat data: {len(talks)} conversations fill {len(packed)} rows of {length} tokens{unused}, "
            f"{count} are needed{after}: give more conversations, or fewer --tokens",
            count + skip - len(packed),
        )
    ids = torch.tensor([row for row, _ in packed[skip:]], dtype=torch.int64)
    check_ids(ids, model_dir)
    learnt = torch.tensor([row for _, row in packed[skip:]])
    labels = ids.masked_fill(~learnt, IGNORED)
    note = f"{left_out[0]} answers that begin after {length} tokens are left out" if left_out[0] else None
    return TuningRows(ids, labels, named, documents.sha256, "chat", note)


def _pack(samples: Iterable[Sample], length: int, count: int, filler: int) -> list[Sample]:
    """Fill at most ``count`` rows of exactly ``length``; every sample, none of them longer, is whole in one row."""
    waiting: list[Sample] = []
    rows: list[Sample] = []
    coming = iter(samples)
    while len(rows) < count:
        ids: list[int] = []
        learnt: list[bool] = []
        while True:
            waiting += [sample for _, sample in zip(range(WINDOW - len(waiting)), coming, strict=False)]
            chosen = _longest(waiting, length - len(ids)) if ids else 0 if waiting else None
            if chosen is None:
                break
            more, which = waiting.pop(chosen)
            ids, learnt = ids + more, learnt + which
        if not ids:
            break
        rest = length - len(ids)
        rows.append((ids + [filler] * rest, learnt + [False] * rest))
    return rows


def _longest(samples: Sequence[Sample], room: int) -> int | None:
    """Index of the longest sample of at most ``room`` tokens, the first of equals."""
    fitting = [(len(ids), -i) for i, (ids, _) in enumerate(samples) if len(ids) <= room]
    return -max(fitting)[1] if fitting else None
