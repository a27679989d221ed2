"""A model whose embedding and tokenizer have the kept words alone, too: an id is a word's place among them.

Its files are smaller and any client reads them, since there is one vocabulary; prompts in other languages take more
tokens than they did.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from saap.base.tokenizer_file import TOKENIZER
from saap.base.writing import read_object
from saap.models.architectures import Architecture
from saap.models.resolve import load_tokenizer
from saap.text.closed_words import place_of, renumbered

# Fields of a configuration that hold ids, or lists of them, or lists of lists.
NAMES_IDS = re.compile(r"(token_ids?|token_index|words_ids)$|^(begin_)?suppress_tokens$")
VOCABULARY_SIZES = ("vocab_size", "vocab_size_per_layer_input")
# Tokenizer files that say the same as tokenizer.json, of all words.
OTHER_FILES = ("tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json")


def ids_in(place: object) -> set[int]:
    """Return the ids in a field of a configuration."""
    if isinstance(place, list):
        return set().union(*map(ids_in, place))
    return {place} if isinstance(place, int) and not isinstance(place, bool) and place >= 0 else set()


def named_ids(config: Mapping[str, object]) -> set[int]:
    """Ids that a configuration, of a model or of its generation, names."""
    return set().union(*(ids_in(value) for name, value in config.items() if NAMES_IDS.search(name)))


@dataclass(frozen=True)
class Renumbering:
    """The kept tokens and their new ids.

    Attributes:
        words: ids that stay, ascending.
    """

    words: tuple[int, ...]

    @cached_property
    def places(self) -> dict[int, int]:
        return {word: place for place, word in enumerate(self.words)}

    def config(self, config: Mapping[str, object]) -> dict[str, object]:
        """Renumber a configuration. Raises UserError: it names a removed token."""
        fields = {name: self._ids(value) if NAMES_IDS.search(name) else value for name, value in config.items()}
        return fields | {name: len(self.words) for name in VOCABULARY_SIZES if name in fields}

    def _ids(self, value: object) -> object:
        if isinstance(value, list):
            return [self._ids(each) for each in value]
        return place_of(value, self.places) if isinstance(value, int) and ids_in(value) else value

    def tensors(
        self, tensors: Iterator[tuple[str, torch.Tensor]], architecture: Architecture
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield a model's tensors; those with a row for each token are cut to the kept ones."""
        tables = [architecture.embedding, architecture.head]
        if architecture.per_layer:
            tables.append(architecture.per_layer.table)
        rows = torch.tensor(self.words)
        for name, tensor in tensors:
            yield name, tensor[rows] if name.rpartition(".")[0] in tables else tensor

    def files(self, directory: Path, source: Path) -> None:
        """Write the tokenizer of ``source`` anew into a directory, and mend the configuration files that are there."""
        for name in OTHER_FILES:
            (directory / name).unlink(missing_ok=True)
        document = json.loads(load_tokenizer(source).backend_tokenizer.to_str())
        _write(directory / TOKENIZER, renumbered(document, self.words))
        if (path := directory / "generation_config.json").is_file():
            _write(path, self.config(read_object(path, "get the model again")))
        if (path := directory / "tokenizer_config.json").is_file():
            settings = read_object(path, "get the model again")
            if isinstance(decoder := settings.get("added_tokens_decoder"), dict):
                kept = ((self.places.get(int(word)), entry) for word, entry in decoder.items())
                settings["added_tokens_decoder"] = {str(place): entry for place, entry in kept if place is not None}
            _write(path, settings)


def _write(path: Path, document: Mapping[str, object]) -> None:
    path.write_text(json.dumps(document, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
