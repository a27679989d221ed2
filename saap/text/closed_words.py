"""The tokens that may leave the output head, so that whatever could be written still can be.

In byte-pair encoding (Sennrich et al., arXiv 1508.07909) the last merge makes a word of two others. So words form a
forest whose roots are bytes and characters. Only leaves go, the least counted first: then the merges that stay still
make every word that stays, and two words say what a gone word said. Its count is added to theirs. In a unigram model
(Kudo, arXiv 1804.10959) every word of several characters is a leaf.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from saap.base.errors import UserError

Document = dict[str, Any]  # a ``tokenizer.json``


@dataclass(frozen=True)
class Forest:
    """Words, and what they are made of.

    Attributes:
        size: ids, 0 to size - 1; some may be no word.
        parts: of each word that may go, the two that it is made of, or none.
        least: ids that stay: bytes, characters, added words, and what was asked for.
    """

    size: int
    parts: Mapping[int, tuple[int, ...]]
    least: frozenset[int]

    def order(self, counts: Sequence[float]) -> list[int]:
        """Order the ids by when they are removed; a beginning of the order is always closed.

        ``counts``: of each id in a text. Of equal counts the highest id goes first: tokenizers learn frequent words
        first.
        """
        left, users = list(counts), [0] * self.size
        for parts in self.parts.values():
            for part in set(parts):
                users[part] += 1
        heap = [(left[word], -word) for word in self.parts if not users[word]]
        heapq.heapify(heap)
        order = []
        while heap:
            count, negative = heapq.heappop(heap)
            word = -negative
            if count != left[word]:  # it has grown since
                heapq.heappush(heap, (left[word], negative))
                continue
            order.append(word)
            for part in self.parts[word]:
                left[part] += left[word]
            for part in set(self.parts[word]):
                users[part] -= 1
                if not users[part] and part in self.parts:
                    heapq.heappush(heap, (left[part], -part))
        return order

    @property
    def total(self) -> int:
        """The number of words."""
        return len(self.parts) + len(self.least)

    def checked(self, count: int) -> int:
        """Refuse a number of words that cannot stay. Raises UserError: fewer than must, or more than there are."""
        if not len(self.least) <= count <= self.total:
            raise UserError(
                f"a vocabulary of {count} words cannot be closed: {len(self.least)} must stay (bytes, characters, "
                f"added and special words), and there are {self.total}"
            )
        return count

    def without(self, gone: Collection[int]) -> list[int]:
        """Return the ids that stay, ascending."""
        return sorted((self.parts.keys() | self.least) - set(gone))

    def kept(self, counts: Sequence[float], count: int) -> list[int]:
        """Return ``count`` ids that stay, ascending.

        Raises UserError: fewer than must stay.
        """
        return self.without(self.order(counts)[: self.total - self.checked(count)])


def forest_of(document: Document, size: int, required: Collection[int] = ()) -> Forest:
    """Read the forest from a ``tokenizer.json``.

    Args:
        size: rows of the embedding.
        required: further ids that stay: of the configuration, of the chat template.

    Raises UserError: a tokenizer that cannot be closed.
    """
    model, added = document.get("model", {}), {int(word["id"]) for word in document.get("added_tokens", [])}
    kind = model.get("type") or ("BPE" if "merges" in model else None)
    if kind == "BPE":
        if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
            raise UserError("the tokenizer marks parts of words, so its vocabulary cannot be closed: leave it whole")
        words: dict[str, int] = model["vocab"]
        parts = _parts_of(words, model["merges"])
    elif kind == "Unigram":
        words = {word: index for index, (word, _) in enumerate(model["vocab"])}
        parts = {index: () for word, index in words.items() if len(word) > 1}
        unknown = model.get("unk_id")
        parts.pop(unknown, None)
        for word, index in words.items():
            if _is_byte(word):
                parts.pop(index, None)
    else:
        raise UserError(f"a tokenizer of type {kind} cannot be closed: BPE and Unigram can")
    if beyond := [index for index in (*words.values(), *added) if not 0 <= index < size]:
        raise UserError(f"the tokenizer has token {beyond[0]}, beyond the vocabulary of {size}: get the model again")
    stays, left = set[int](), [*added, *required]
    while left:  # with a word stays what it is made of
        stays.add(index := left.pop())
        left += [part for part in parts.get(index, ()) if part not in stays]
    may_go = {word: pieces for word, pieces in parts.items() if word not in stays}
    least = frozenset(set(words.values()) - may_go.keys() | stays)
    return Forest(size, may_go, least)


def _parts_of(words: Mapping[str, int], merges: Sequence[str | list[str]]) -> dict[int, tuple[int, ...]]:
    """Split each word that merges make into the two of the last merge; one that they do not reach has no parts."""
    ranks: dict[tuple[str, str], int] = {}
    for rank, merge in enumerate(merges):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault((left, right), rank)
    merged = {left + right for left, right in ranks}
    parts: dict[int, tuple[int, ...]] = {}
    for word, index in words.items():
        if word in merged:
            parts[index] = tuple(words[part] for part in _last_merge(word, ranks))
        elif len(word) > 1 and not _is_byte(word):
            parts[index] = ()
    return parts


def _last_merge(word: str, ranks: Mapping[tuple[str, str], int]) -> tuple[str, ...]:
    """Find the two parts that the last merge joins; none where merges leave a word in more pieces."""
    pieces, none = list(word), len(ranks)
    while len(pieces) > 2:
        rank, place = min((ranks.get(pair, none), n) for n, pair in enumerate(pairwise(pieces)))
        if rank == none:
            return ()
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
    return tuple(pieces) if tuple(pieces) in ranks else ()


def _is_byte(word: str) -> bool:
    """Whether it stands for a byte where text has no other word, ``<0x0A>`` for one."""
    return len(word) == 6 and word.startswith("<0x") and word.endswith(">")


def trimmed(document: Document, kept: Collection[int]) -> Document:
    """Trim a ``tokenizer.json`` to the words that are kept; ids stay what they are."""
    words, model = set(kept), dict(document["model"])
    if isinstance(model["vocab"], list):  # a word's place is its id: what went must never be the best
        model["vocab"] = [
            [word, score] if index in words else [f"\ufffe{index}", score]
            for index, (word, score) in enumerate(model["vocab"])
        ]
    else:
        model["vocab"] = {word: index for word, index in model["vocab"].items() if index in words}
        pairs = [(merge, *(merge.split(" ") if isinstance(merge, str) else merge)) for merge in model["merges"]]
        model["merges"] = [merge for merge, left, right in pairs if left + right in model["vocab"] and
                           left in model["vocab"] and right in model["vocab"]]  # fmt: skip
    return {**document, "model": model}


def renumbered(document: Document, kept: Collection[int]) -> Document:
    """Reduce a ``tokenizer.json`` to the kept words; an id is now a word's place among them.

    Raises UserError: an added or a special word is not kept.
    """
    places, model = {word: place for place, word in enumerate(sorted(kept))}, dict(trimmed(document, kept)["model"])
    if isinstance(model["vocab"], list):
        model["vocab"] = [entry for index, entry in enumerate(model["vocab"]) if index in places]
        if model.get("unk_id") is not None:
            model["unk_id"] = place_of(model["unk_id"], places)
    else:
        model["vocab"] = {word: places[index] for word, index in model["vocab"].items()}
    added = [{**word, "id": place_of(word["id"], places)} for word in document.get("added_tokens", [])]
    result = {**document, "model": model, "added_tokens": added}
    if document.get("post_processor"):
        result["post_processor"] = _of_places(document["post_processor"], places)
    if isinstance(padding := document.get("padding"), dict):
        result["padding"] = {**padding, "pad_id": place_of(padding["pad_id"], places)}
    return result


def _of_places(processor: object, places: Mapping[int, int]) -> object:
    """Renumber the processor that puts special words around a text."""
    if isinstance(processor, list):
        return [_of_places(part, places) for part in processor]
    if not isinstance(processor, dict):
        return processor
    result = {name: _of_places(part, places) for name, part in processor.items()}
    if isinstance(ids := processor.get("ids"), list):
        result["ids"] = [place_of(word, places) for word in ids]
    for name in ("sep", "cls"):  # of BERT and RoBERTa: a word and its id
        if isinstance(pair := processor.get(name), list):
            result[name] = [pair[0], place_of(pair[1], places)]
    return result


def place_of(word: int, places: Mapping[int, int]) -> int:
    """Look up the new id of a special word. Raises UserError: it is removed."""
    if word not in places:
        raise UserError(f"token {word} is a special one and would be removed: keep it, or leave the vocabulary whole")
    return places[word]
