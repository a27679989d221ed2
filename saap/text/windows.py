"""The protocol of a perplexity: how a text becomes predictions.

Two perplexities compare only where text, tokens, chunk, stride, beginning and joining are the same, so all of these are
part of a result. Usual ones: chunks of 2048 of WikiText-2 joined as papers do (GPTQ, Wanda, FLAP: ``--chunk 2048
--join wikitext --no-bos``), of 128 (LLM-Pruner, SAAP), PTB joined by spaces; a stride below the chunk gives each
token more context (Hugging Face's guide to perplexity).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from saap.base.errors import UserError
from saap.base.quality import Protocol
from saap.base.wording import counted
from saap.text.documents import Documents, load_documents
from saap.text.encoding import beginning, bytes_of_tokens, encode, tokenizer_for

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

Join = Literal["raw", "paragraphs", "wikitext", "spaces"]

# Of a text, so many characters for each token that is sequences are read first; English has four to five.
CHARACTERS_A_TOKEN = 5
MARGIN = 256  # tokens before the end of a part that its end may have changed


@dataclass(frozen=True)
class Cut:
    """The cut of a text into windows.

    Attributes:
        stride: tokens from one window's start to the next's; None is ``chunk``. A window after the first predicts its
            last ``stride`` tokens only.
        bos: a beginning-of-sequence token before each window, which then predicts its first token too; None: where the
            tokenizer sets one before a text.
        join: raw takes the file as it is; paragraphs empties blank lines and joins all by a blank line; wikitext
            does so with lines that keep their ends, which is what ``"\\n\\n".join`` over the rows of Hugging Face's
            data set gives; spaces joins lines, stripped as in its PTB, by a space.
    """

    chunk: int = 256
    stride: int | None = None
    bos: bool | None = None
    join: Join = "raw"
    max_chunks: int | None = None

    def __post_init__(self) -> None:
        if self.chunk < 2 or (self.max_chunks is not None and self.max_chunks < 1):
            chunks = "chunks" if self.max_chunks is None else counted(self.max_chunks, "chunk")
            amount = f"{chunks} of {counted(self.chunk, 'token')}"
            raise UserError(f"{amount} cannot predict anything: give at least 1 chunk of 2 tokens")
        if self.stride is not None and not 1 <= self.stride <= self.chunk:
            raise UserError(f"a stride of {self.stride} is not allowed: give 1 to {self.chunk}, the chunk")
        if self.join not in get_args(Join):
            raise UserError(f"--join {self.join} is not known: give {', '.join(get_args(Join))}")

    @property
    def step(self) -> int:
        return self.stride or self.chunk


@dataclass(frozen=True)
class Windows:
    """Rows to predict.

    Attributes:
        ids: [n, s] int64.
        counted: [n, s - 1] bool: which predictions enter the mean.
        predicted_bytes: UTF-8 bytes that these stand for; None where that is not known.
    """

    ids: torch.Tensor
    counted: torch.Tensor
    protocol: Protocol
    predicted_bytes: int | None = None


def joined(text: str, how: Join) -> str:
    if how == "raw":
        return text
    lines = [line if line.strip() else "" for line in text.split("\n")]
    if how == "paragraphs":
        return "\n\n".join(lines)
    if how == "spaces":
        return " ".join(line.strip() for line in lines if line)
    rows = lines[:-1] if not lines[-1] else lines  # after the last line's end there is no row
    return "\n\n".join(f"{line}\n" if line else "" for line in rows)


def evaluation_windows(model_dir: Path, source: str | None, cut: Cut) -> tuple[Windows, Documents]:
    """Cut a text for evaluation; return the windows and the text.

    Raises UserError: no such text, too little, or one that the tokenizer does not know.
    """
    documents = load_documents(source, split="evaluation")
    return windows_of(documents, tokenizer_for(model_dir, documents.texts, documents.source), cut), documents


def windows_of(documents: Documents, tokenizer: PreTrainedTokenizerBase, cut: Cut) -> Windows:
    """Cut a text; its remainder is left out.

    Raises UserError: less than one window, or no beginning-of-sequence token where one is asked for.
    """
    import torch

    most = None if cut.max_chunks is None else cut.chunk + (cut.max_chunks - 1) * cut.step
    text, ids = _first_ids(joined(documents.text, cut.join), tokenizer, most)
    starts = range(0, len(ids) - cut.chunk + 1, cut.step)[: cut.max_chunks]
    if not starts:
        raise UserError(
            f"too little text: {len(ids)} tokens, a chunk needs {cut.chunk}: give more text, or a smaller --chunk"
        )
    rows = torch.tensor([ids[start : start + cut.chunk] for start in starts], dtype=torch.int64)
    bos = bool(beginning(tokenizer)) if cut.bos is None else cut.bos
    if bos:
        if tokenizer.bos_token_id is None:
            raise UserError("this tokenizer has no beginning-of-sequence token: leave --bos out")
        rows = torch.cat([torch.full((len(rows), 1), tokenizer.bos_token_id), rows], dim=1)
    counted = torch.ones(len(rows), rows.shape[1] - 1, dtype=torch.bool)
    counted[1:, : max(0, counted.shape[1] - cut.step)] = False
    protocol = Protocol(
        text=documents.source,
        text_sha256=documents.sha256,
        tokens_sha256=hashlib.sha256(rows.numpy().tobytes()).hexdigest(),
        tokenizer_sha256=tokenizer_hash(tokenizer),
        chunk=cut.chunk,
        chunks=len(rows),
        stride=cut.step,
        bos=bos,
        join=cut.join,
        predictions=int(counted.sum()),
    )
    if (lengths := bytes_of_tokens(text, tokenizer)) is None:
        return Windows(rows, counted, protocol)
    predicted = torch.tensor(starts)[:, None] + torch.arange(cut.chunk)[not bos :]
    return Windows(rows, counted, protocol, int(lengths[predicted[counted].numpy()].sum()))


def _first_ids(text: str, tokenizer: PreTrainedTokenizerBase, most: int | None) -> tuple[str, list[int]]:
    """Encode the first ``most`` tokens of a text, and return the part of it that was read, too.

    Where a text ends changes the tokens there, not those before: the last ``MARGIN`` of a part are not taken.
    """
    size = len(text) if most is None else CHARACTERS_A_TOKEN * (most + MARGIN)
    while most is not None and size < len(text):
        ids = encode(text[:size], tokenizer)
        if len(ids) >= most + MARGIN:
            return text[:size], ids[:most]
        size *= 2
    return text, encode(text, tokenizer)[:most]


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash what decides on ids: the vocabulary with its numbers."""
    words = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(repr(words).encode("utf-8", "surrogatepass")).hexdigest()
