"""The output head as a structure: a text chooses the tokens that it keeps, and a directory is written with them alone.

The embedding and the tokenizer stay, so prompts are read as before, but where the input is trimmed too
(:mod:`saap.prune.renumber`). The kept tokens are closed (:mod:`saap.text.closed_words`), so whatever could be written
still can be, if in more tokens.

A token counts by how often it is in the text, and by how often the model predicts it there: a text of some
hundred thousand tokens has few of the names that others like it have, and the model knows them (Gemma 3 270M, half of
its tokens: WikiText-2 takes 0.3 % more tokens, 3.0 % by the text alone).
"""

from __future__ import annotations

import json
import random
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saap.base.errors import UserError
from saap.base.progress import WRITING, Progress, advance, note
from saap.base.writing import RECORD, check_output, read_object
from saap.models.architectures import architecture_of, head_vocabulary, shape_of
from saap.models.checkpoint import load_model, read_config, slim_config, write_slim
from saap.models.modeling_slim import packed_ids
from saap.models.record import Lineage, Record, Words, WordsText, read_record
from saap.models.resolve import load_tokenizer, resolve
from saap.models.shape import ModelShape
from saap.models.weight_files import tensor_reader
from saap.prune.cut.surgery import cut_tensors
from saap.prune.options import TIMED, PruneOptions
from saap.prune.plan import PrunePlan, whole_layer
from saap.prune.renumber import Renumbering, named_ids
from saap.prune.search.budget import WordsOption
from saap.text.closed_words import forest_of, trimmed
from saap.text.conversations import ChatEncoder
from saap.text.documents import Documents, load_documents
from saap.text.encoding import beginning, encode

AUTO = "auto"
SIZES, TRIED = 64, 6  # that ``auto`` chooses between, and the number of them that it tries
LONGER = 0.01  # what ``auto`` allows; bits per byte grow about as much, until the model is tuned
WORTH = 0.03  # of what a token reads, that must go: SmolLM2 reads 1.7 % less and is no faster
PREDICTED = 4096  # tokens of the text whose predictions count
ROW = 256  # tokens of a forward pass
SPARE = 0.25  # of the text, by which a size is chosen that the other part counted
SHARES = (2 / 3, 1 / 2, 1 / 3, 1 / 4, 1 / 6, 1 / 8)  # of the vocabulary, that a search chooses between
PIECE, PIECES = 1000, 8  # characters of a part of the text, and the number of parts, that price a smaller vocabulary


@dataclass(frozen=True)
class Chosen:
    """The tokens that a head keeps.

    Attributes:
        words: their ids, ascending.
        size: rows of the embedding.
        longer: share of tokens that a text takes more, of the same kind as the one that chose, not itself.
        source: that text; ``sha256`` its hash.
        input: whether embedding and tokenizer lose the other tokens, too.
        price: nats per token of such a text that the smaller vocabulary adds; 0 where it was not measured.
    """

    words: tuple[int, ...]
    size: int
    longer: float
    source: str
    input: bool = False
    sha256: str | None = None
    price: float = 0.0

    @property
    def packed(self) -> str:
        return packed_ids(self.words, self.size)

    @property
    def option(self) -> WordsOption:
        """The vocabulary as an option of the search."""
        return WordsOption(len(self.words), self.longer, self.price, self.input)

    @property
    def renumbering(self) -> Renumbering | None:
        return Renumbering(self.words) if self.input else None

    def config(
        self, config: Mapping[str, object], shape: ModelShape, *, kept: Sequence[int] | None = None
    ) -> dict[str, object]:
        """Return :func:`saap.models.checkpoint.slim_config` with this vocabulary."""
        written = slim_config(config, shape, kept=kept, vocabulary="" if self.input else self.packed)
        return self.renumbering.config(written) if self.renumbering else written

    def record(self) -> Words:
        words = Words(rows=len(self.words), of=self.size, longer=self.longer)
        return Words(**words, kept=self.packed) if self.input else words

    def lineage(self) -> WordsText:
        return WordsText(source=self.source, text_sha256=self.sha256)


def rows_of(asked: str, size: int) -> int | None:
    """Words that ``--vocabulary`` asks for: a number, with k for 1,024, or a share; None: what is fastest.

    Raises UserError: something else, or as many as there are.
    """
    if asked == AUTO:
        return None
    text, unit = (asked[:-1], 1024) if asked[-1:] in "kK" else (asked, 1)
    try:
        number = float(text) * unit
        rows = round(number * size if number < 1 else number)
    except (ValueError, OverflowError):
        rows = 0
    if not 0 < rows < size:
        raise UserError(
            f"a vocabulary of {asked!r} is not allowed, the model has {size} words: give a number such as 24k, "
            f"a share such as 0.5, or {AUTO}"
        )
    return rows


def choose_words(directory: Path, asked: str, documents: Documents, progress: Progress | None = None) -> Chosen:
    """Choose the vocabulary that the head of a model keeps.

    Args:
        asked: as in :func:`rows_of`; ``auto`` is the fewest that make a text hardly longer.

    Raises UserError: a vocabulary that cannot be closed, or not at this size.
    """
    shape = _trimmable(directory)
    rows = rows_of(asked, shape.vocab)
    advance(progress, "reading the vocabulary", 0, 0)
    read = _Read(directory, documents, load_model(directory), progress)
    forest, tried = read.forest, dict[int, float]()

    def longer(count: int) -> float:
        advance(progress, "trying sizes of the vocabulary", len(tried), 1 if rows else TRIED)
        tried[count] = read.longer(count)
        return tried[count]

    if rows is not None:
        longer(forest.checked(rows))
    elif (rows := fewest_words(longer, len(forest.least), forest.total)) is None:
        raise UserError(
            f"every smaller vocabulary of {directory} makes {documents.source} more than {LONGER:.0%} longer: "
            "give a number of words, or leave --vocabulary out"
        )
    advance(progress, "trying sizes of the vocabulary", 1, 1)
    if asked == AUTO and (less := read_less(shape, rows)) < WORTH:
        raise UserError(
            f"{directory} needs {rows} of its {shape.vocab} words for this text, and without the others a token "
            f"reads only {less:.1%} less: leave --vocabulary out, or give a number of words"
        )
    return Chosen(read.words(rows), shape.vocab, tried[rows], documents.source, sha256=documents.sha256)


def words_to_try(directory: Path, documents: Documents, progress: Progress | None = None) -> list[Chosen]:
    """Heads of several sizes and what each costs, for a search to choose between; most words first.

    Raises UserError: a vocabulary that cannot be closed.
    """
    shape, candidates = _trimmable(directory), list[Chosen]()
    advance(progress, "reading the vocabulary", 0, 0)
    model = load_model(directory)
    read = _Read(directory, documents, model, progress)
    least, most = len(read.forest.least), read.forest.total
    sizes = [count for share in SHARES if least <= (count := round(share * shape.vocab)) < most]
    for done, count in enumerate(sizes):
        advance(progress, "pricing sizes of the vocabulary", done, len(sizes))
        longer, price, words = read.longer(count), read.price(count, model), read.words(count)
        candidates.append(Chosen(words, shape.vocab, longer, documents.source, sha256=documents.sha256, price=price))
    advance(progress, "pricing sizes of the vocabulary", len(sizes), len(sizes))
    return candidates


def _trimmable(directory: Path) -> ModelShape:
    """Return the model's shape. Raises UserError: its vocabulary cannot be trimmed."""
    config = read_config(directory)
    if head_vocabulary(config) or "vocabulary" in read_record(directory):
        raise UserError(f"{directory} has a trimmed vocabulary already: trim the model that it was made from")
    if config.get("slim_quant"):
        raise UserError(f"{directory} holds tuned integers, which cannot be trimmed: trim the model it was tuned from")
    return shape_of(config)


class _Read:
    """A vocabulary, and how often each word is in a text: in a part that orders them, and in one that is held out."""

    def __init__(
        self, directory: Path, documents: Documents, model: PreTrainedModel, progress: Progress | None
    ) -> None:
        tokenizer, size = load_tokenizer(directory), shape_of(model.config).vocab
        self._document = json.loads(tokenizer.backend_tokenizer.to_str())
        required = _named_ids(directory, read_config(directory)) | _template_ids(tokenizer)
        self.forest, text = forest_of(self._document, size, required), documents.text
        part, self._spare = text[: int(len(text) * (1 - SPARE))], text[int(len(text) * (1 - SPARE)) :]
        self._first = beginning(tokenizer)
        guessed = predicted(model, encode(part, tokenizer), self._first, progress)
        self._whole = Tokenizer.from_str(json.dumps(self._document))
        counted, self.spare_counts = (counts_of(self._whole, each, size) for each in (part, self._spare))
        self.order = self.forest.order((counted + guessed).tolist())
        self._all = counted + self.spare_counts + guessed
        step = max(PIECE, len(self._spare) // PIECES)
        starts = range(0, len(self._spare) - PIECE + 1, step)
        self._pieces = [self._spare[start : start + PIECE] for start in starts] or [self._spare]
        self._as_it_is: tuple[float, int] | None = None  # nats and tokens of the pieces in all words

    def longer(self, count: int) -> float:
        """Return the share of tokens by which a vocabulary of ``count`` makes the held-out part longer."""
        tokens = self._trimmed(count).encode(self._spare, add_special_tokens=False).ids
        return float(len(tokens) / max(1, self.spare_counts.sum()) - 1)

    def words(self, count: int) -> tuple[int, ...]:
        """Return the ids of a vocabulary of this size, by the whole text."""
        return tuple(self.forest.kept(self._all.tolist(), count))

    @torch.inference_mode()
    def price(self, count: int, model: PreTrainedModel) -> float:
        """Price a vocabulary of this size on held-out text, in nats per token of the whole vocabulary."""
        kept, trimmed_own = self._stay(count), self._trimmed(count)
        if self._as_it_is is None:
            ids = [self._whole.encode(piece, add_special_tokens=False).ids for piece in self._pieces]
            self._as_it_is = sum(self._nats(model, row, None) for row in ids), sum(map(len, ids))
        own = [trimmed_own.encode(piece, add_special_tokens=False).ids for piece in self._pieces]
        nats, tokens = self._as_it_is
        return max(0.0, (sum(self._nats(model, row, kept) for row in own) - nats) / max(1, tokens))

    def _nats(self, model: PreTrainedModel, ids: list[int], kept: torch.Tensor | None) -> float:
        """Return the nats of a text of kept tokens, without its beginning."""
        row = torch.tensor([[*self._first, *ids]])
        logits = model(input_ids=row, use_cache=False).logits[0].float()
        if kept is not None:
            gone = torch.ones(logits.shape[-1], dtype=torch.bool)
            gone[kept] = False
            logits = logits.masked_fill(gone, -torch.inf)
        logprobs = logits.log_softmax(-1)[:-1].gather(-1, row[0, 1:, None])
        return -float(logprobs.sum())

    def _trimmed(self, count: int) -> Tokenizer:
        return Tokenizer.from_str(json.dumps(trimmed(self._document, self._stay(count).tolist())))

    def _stay(self, count: int) -> torch.Tensor:
        """Return the ids of a vocabulary of this size, by the part that orders them."""
        return torch.tensor(self.forest.without(self.order[: self.forest.total - count]))


def read_less(shape: ModelShape, rows: int) -> float:
    """Return the share of the weights that a token no longer reads where the head has ``rows`` tokens."""
    return (shape.vocab - rows) * shape.hidden / (shape.layer_weights + shape.vocab * shape.hidden)


def fewest_words(longer: Callable[[int], float], least: int, total: int) -> int | None:
    """Find the fewest words, of some numbers from ``least`` to below ``total``, that make a text hardly longer.

    ``longer``: the share of tokens that so many words add to the text; more words never add more. None: all add more
    than :data:`LONGER`.
    """
    sizes = [least + (total - least) * step // SIZES for step in range(SIZES)]
    place = bisect_left(sizes, True, key=lambda count: longer(count) <= LONGER)
    return sizes[place] if place < SIZES else None


@torch.inference_mode()
def predicted(
    model: PreTrainedModel, ids: list[int], first: list[int], progress: Progress | None = None
) -> NDArray[np.float64]:
    """Estimate how often the model predicts each token in a text, [vocab]; the sum is the text's length.

    Args:
        ids: of the text.
        first: what every text begins with.
    """
    starts = random.Random(0).sample(range(0, max(1, len(ids) - ROW), ROW), min(PREDICTED // ROW, len(ids) // ROW))
    total = torch.zeros(shape_of(model.config).vocab, dtype=torch.float64)
    for done, start in enumerate(starts):
        advance(progress, "predicting tokens (rows)", done, len(starts))
        row = torch.tensor([[*first, *ids[start : start + ROW]]])
        total += model(input_ids=row, use_cache=False).logits[0, len(first) :].float().softmax(-1).sum(0).double()
    advance(progress, "predicting tokens (rows)", len(starts), len(starts))
    return (total * (len(ids) / max(float(total.sum()), 1.0))).numpy()


def counts_of(tokenizer: Tokenizer, text: str, size: int) -> NDArray[np.int64]:
    """Count each id in a text, [size]."""
    return np.bincount(np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, np.int64), minlength=size)


def _named_ids(directory: Path, config: dict[str, object]) -> set[int]:
    """Ids that the configuration of the model, or of its generation, names."""
    path = directory / "generation_config.json"
    return named_ids(config) | (named_ids(read_object(path, "get the model again")) if path.is_file() else set())


def _template_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids that a chat template writes around a conversation."""
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with suppress(UserError):  # no template, or one that wants another conversation
        return {word for ids, _ in ChatEncoder(tokenizer).samples(talk, "the chat template") for word in ids}
    return set()


def write_trimmed(
    output: Path,
    source: Path,
    config: Mapping[str, object],
    tensors: Iterator[tuple[str, torch.Tensor]],
    record: Record,
    chosen: Chosen | None,
) -> Path:
    """Write a slim directory (:func:`saap.models.checkpoint.write_slim`) with the chosen vocabulary.

    ``config``: of this vocabulary; the tensors are of the whole one.
    """
    if chosen is None or chosen.renumbering is None:
        return write_slim(output, source, config, tensors, record)
    fewer = chosen.renumbering.tensors(tensors, architecture_of(dict(config)))
    return write_slim(output, source, config, fewer, record, chosen.renumbering.files)


def words_by_text(
    source: Path, options: PruneOptions, calibration: object, progress: Progress | None
) -> Chosen | list[Chosen]:
    """Choose the vocabulary by a text and name it in a note, or return several for the search.

    Raises UserError: no text to choose by, or as of :func:`choose_words`.
    """
    if not (calibration is None or isinstance(calibration, str | Path)):
        raise UserError("a vocabulary is chosen by a text: give --calibration FILE, or leave --calibration out")
    documents = load_documents(calibration, split="calibration", seed=options.seed)
    several = options.method == "saap" and bool({*options.asked} & {*TIMED, "max_bytes"})
    if options.vocabulary == AUTO and several:
        candidates = words_to_try(source, documents, progress)
        return [replace(words, input=options.vocabulary_input) for words in candidates]
    words = choose_words(source, str(options.vocabulary), documents, progress)
    words = replace(words, input=options.vocabulary_input)
    subject = "model has" if words.input else "head predicts"
    note(
        progress,
        f"vocabulary: the {subject} {len(words.words):,} of {words.size:,} tokens; "
        f"text like {words.source} takes {100 * words.longer:.1f}% more tokens",
    )
    return words


def trim_by_text(
    model: str | Path,
    options: PruneOptions,
    *,
    output: str | Path,
    calibration: str | Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write a model whose vocabulary is trimmed as ``options`` ask, and nothing else; arguments as of ``prune``.

    Raises UserError: as of :func:`words_by_text`, or a place that cannot be written.
    """
    output = Path(output)
    check_output(output, model, calibration, record=RECORD)
    source = resolve(model, progress=progress)
    words = words_by_text(source, options, calibration, progress)
    assert isinstance(words, Chosen), "without a requirement there is nothing to search"
    return trim(source, words, output, progress)


def trim(source: Path, chosen: Chosen, output: Path, progress: Progress | None = None) -> Path:
    """Write a model whose head has the chosen tokens; its weights stay what they are.

    Raises UserError: a place that cannot be written.
    """
    advance(progress, WRITING, 0, 0)
    config = read_config(source)
    shape, (names, read) = shape_of(config), tensor_reader(source)
    plan = PrunePlan(tuple(map(whole_layer, shape.layers)))
    tensors = cut_tensors(names, read, plan, shape, architecture_of(config))
    written = chosen.config(config, shape)
    before = read_record(source)
    lineage: Lineage = {**before.get("lineage", {}), "words": chosen.lineage()}
    record: Record = {**before, "vocabulary": chosen.record(), "lineage": lineage}
    return write_trimmed(output, source, written, tensors, record, chosen)
