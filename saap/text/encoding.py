"""Texts as token ids."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from saap.base.errors import UserError
from saap.base.tokenizer_file import tokenizing
from saap.base.writing import read_object
from saap.text.closed_words import trimmed

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

# Of a text's beginning, read to see whether a tokenizer knows its letters.
PROBED_CHARACTERS = 4000
# Of a text, that are compared with what the whole vocabulary takes, and when a person is told.
PROBED_TOKENS, LONG = 20_000, 0.1
BUNDLE = "bundle.json"


def encode(text: str, tokenizer: PreTrainedTokenizerBase, add_special_tokens: bool = False) -> list[int]:
    """Token ids of a text, which may be longer than a context: it is cut later.

    Raises UserError: the tokenizer's own rules do not allow it.
    """
    with tokenizing(f"the tokenizer of {tokenizer.name_or_path} cannot be used", "get the model again"):
        return list(tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])


def bytes_of_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> NDArray[np.int64] | None:
    """UTF-8 bytes that each token of a text stands for, [t]; the tokens are those of :func:`encode`.

    Where several tokens share a character, the first one gets its bytes. None: the tokenizer does not say where its
    tokens lie in the text.
    """
    if not tokenizer.is_fast:
        return None
    places = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)["offset_mapping"]
    characters = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    lengths = 1 + sum((characters >= first).astype(np.int64) for first in (0x80, 0x800, 0x10000))
    before = np.concatenate([[0], np.cumsum(lengths)])
    ends = np.maximum.accumulate(np.array([end for _, end in places], dtype=np.int64))
    return np.diff(before[ends], prepend=0)


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the beginning-of-sequence token that every text begins with, where the tokenizer sets one, or nothing.

    A model that always saw that token hardly works without it: Gemma 3 270M has 6.2 instead of 4.2 nats per token.
    """
    first = tokenizer.bos_token_id
    return [first] if first is not None and encode("a", tokenizer, add_special_tokens=True)[:1] == [first] else []


def writing_tokenizer(directory: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer for a model's or a bundle's output: only tokens that its head still has.

    Ids are those of the tokenizer that reads.

    Raises UserError: there is none that transformers can read.
    """
    from saap.models.resolve import load_tokenizer

    tokenizer, words = load_tokenizer(directory), head_words_of(directory)
    if words is None:
        return tokenizer
    document = trimmed(json.loads(tokenizer.backend_tokenizer.to_str()), words.tolist())
    with tokenizing(f"the tokenizer of {directory} cannot be trimmed", "get the model again"):
        tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(document))
    return tokenizer


def long_spelling(directory: str | Path, ids: Iterable[int]) -> str | None:
    """Warn of a text that a model with a trimmed vocabulary spells in many more tokens; None: it does not.

    ``ids``: of the text in the model's own tokens.
    """
    from saap.models.resolve import load_tokenizer

    if head_words_of(directory) is None:
        return None
    tokenizer, spelled = load_tokenizer(directory), list(ids)[:PROBED_TOKENS]
    before = len(encode(str(tokenizer.decode(spelled, skip_special_tokens=True)), tokenizer))
    longer = len(spelled) / max(1, before) - 1
    if longer < LONG:
        return None
    return f"the trimmed vocabulary of {directory} takes {longer:.0%} more tokens for this text than the whole one"


def head_words_of(directory: str | Path) -> torch.Tensor | None:
    """Return the ids that the output head of a model or a bundle has, ascending; None: all."""
    from saap.models.architectures import head_vocabulary
    from saap.models.checkpoint import read_config
    from saap.models.modeling_slim import unpacked_ids

    config: Mapping[str, Any]
    if (bundle := Path(directory) / BUNDLE).is_file():
        manifest = read_object(bundle, "export the bundle again")
        config = {"vocab_size": manifest.get("vocab_size"), "slim_vocabulary": manifest.get("words") or None}
    elif not (Path(directory) / "config.json").is_file():  # a tokenizer alone, of a GGUF file
        return None
    else:
        config = read_config(directory)
    packed = head_vocabulary(config)
    return unpacked_ids(packed, int(config["vocab_size"])) if packed else None


def tokenizer_for(model_dir: Path, texts: Iterable[str], source: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model that will learn from, or be measured on, the texts of ``source``.

    Raises UserError: there is none, or more than half of the letters at the texts' beginning are unknown to it.
    """
    tokenizer = writing_tokenizer(model_dir)
    asked = ""
    for text in texts:
        asked += text[: PROBED_CHARACTERS - len(asked)]
        if len(asked) >= PROBED_CHARACTERS:
            break
    ids = [token for token in encode(asked, tokenizer) if token != tokenizer.unk_token_id]
    known, letters = (sum(map(str.isalnum, text)) for text in (tokenizer.decode(ids), asked))
    if known < letters / 2:
        raise UserError(
            f"the tokenizer of {model_dir} knows {known} of the first {letters} letters of {source}: "
            "give a text in a language of the model"
        )
    return tokenizer


def check_ids(ids: torch.Tensor, model_dir: Path) -> None:
    """Refuse token ids that a model does not have."""
    from saap.models.checkpoint import read_config

    vocabulary, highest = read_config(model_dir)["vocab_size"], int(ids.max())
    if highest >= vocabulary:
        raise UserError(
            f"the tokenizer of {model_dir} gives token {highest}, beyond the vocabulary of {vocabulary}: "
            "copy the tokenizer files of the base model there"
        )
