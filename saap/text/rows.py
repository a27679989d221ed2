"""Rows of token ids for a purpose: from the user's text, from SAAP_DATA, or written by the model itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from devices.common.progress import Progress
from saap.models.resolve import load_tokenizer
from saap.models.streaming import open_writer
from saap.system.errors import UserError
from saap.text.documents import Documents, Split, load_documents, pack, self_written
from saap.text.windows import Cut, Windows, given_windows, windows_of


@dataclass(frozen=True)
class Rows:
    """Token ids [rows, tokens] and where they are from; ``documents`` is None for text the model wrote itself."""

    ids: torch.Tensor
    source: str
    sha256: str | None
    documents: Documents | None

    @property
    def self_written(self) -> bool:
        """Whether the dense model wrote this text: then perplexity on it means nothing."""
        return self.documents is None

    def lineage(self) -> dict[str, Any]:
        """What a record says about the text."""
        return {"source": self.source, "text_sha256": self.sha256}


def training_rows(
    model_dir: Path,
    source: str | None,
    split: Split,
    count: int,
    length: int,
    seed: int,
    progress: Progress | None = None,
    skip: int = 0,
) -> Rows:
    """Rows for calibration or tuning, [count, length]; ``skip`` passes over rows that another purpose has used."""
    for value, name in ((count, "sequences"), (length, "tokens per sequence")):
        if value < 1:
            raise UserError(f"{value} {name} are not allowed: give 1 or more")
    documents = load_documents(source, split=split, seed=seed)
    tokenizer = load_tokenizer(model_dir)
    if documents is None:
        # Calibration and tuning draw from different seeds, so nothing has to be skipped.
        own_seed = 2 * seed + (split == "tuning")
        writer = open_writer(model_dir, "--data" if split == "tuning" else "--calibration")
        ids = self_written(writer, tokenizer, count, length, own_seed, progress=progress)
        return Rows(ids, f"written by the dense model (seed {own_seed})", None, None)
    ids = pack(documents.texts, tokenizer, length, count + skip, seed)[skip:]
    return Rows(ids, documents.source, documents.sha256, documents)


def evaluation_windows(
    model_dir: Path, source: str | None, cut: Cut, progress: Progress | None = None
) -> tuple[Windows, Documents | None]:
    """Windows for evaluation; from a text that the model writes itself, with None, where there is no other.

    Raises:
        UserError: no such text, or too little.
    """
    documents = load_documents(source, split="evaluation")
    tokenizer = load_tokenizer(model_dir)
    if documents is None:
        if cut.bos or cut.step != cut.chunk or cut.join != "raw" or cut.max_chunks is None:
            raise UserError("there is no text to cut like that: give --text FILE")
        model = open_writer(model_dir, "--text")
        ids = self_written(model, tokenizer, cut.max_chunks, cut.chunk, 0, held_out=True, progress=progress)
        return given_windows(ids, "held-out text written by the dense model", None, tokenizer, cut), None
    return windows_of(documents, tokenizer, cut), documents
