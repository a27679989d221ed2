"""Which words may leave a head: whatever could be said can still be said, by every kind of tokenizer."""

import json

import numpy as np
import pytest
from support.unicode_texts import TEXT, texts
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from saap.base.errors import UserError
from saap.text.closed_words import forest_of, renumbered, trimmed


def byte_level():
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet))
    return made


def byte_fallback():
    """SentencePiece's kind, as Llama 2 and Gemma have it."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trained.train_from_iterator([TEXT[:300]], trainers.BpeTrainer(vocab_size=200))
    document = json.loads(trained.to_str())
    of_bytes = {f"<0x{byte:02X}>": byte for byte in range(256)}
    words = {word: 256 + index for word, index in document["model"]["vocab"].items()}
    merges = [
        tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in document["model"]["merges"]
    ]
    made = Tokenizer(models.BPE({**of_bytes, **words}, merges, byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return made


def unigram():
    words = [("<unk>", -20.0), *((f"<0x{byte:02X}>", -15.0) for byte in range(256))]
    words += [(letter, -8.0) for letter in sorted(set(TEXT))] + [
        (word, -5.0) for word in ("cat", "at", "The", "sit", "the")
    ]
    made = Tokenizer(models.Unigram(words, 0, True))
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return made


@pytest.fixture(params=[byte_level, byte_fallback, unigram])
def tokenizer(request):
    return request.param()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7])
def test_whatever_could_be_said_can_still_be_said(tokenizer, share):
    document = json.loads(tokenizer.to_str())
    size = tokenizer.get_vocab_size()
    forest = forest_of(document, size)
    counts = np.bincount(tokenizer.encode(TEXT).ids, minlength=size).tolist()
    count = round(len(forest.least) + share * len(forest.parts))
    kept = set(forest.kept(counts, count))
    assert len(kept) == count and forest.least <= kept
    fewer = Tokenizer.from_str(json.dumps(trimmed(document, kept)))
    for text in texts():
        ids = fewer.encode(text).ids
        assert set(ids) <= kept
        assert fewer.decode(ids) == tokenizer.decode(tokenizer.encode(text).ids)
    for word, index in tokenizer.get_vocab().items():  # what stays is made as before
        if index in kept and tokenizer.encode(word).ids == [index]:
            assert fewer.encode(word).ids == [index]


def test_new_ids_are_places_among_the_kept_words(tokenizer):
    tokenizer.add_special_tokens(["<|end|>"])
    end, size = tokenizer.token_to_id("<|end|>"), tokenizer.get_vocab_size()
    tokenizer.post_processor = processors.Sequence([
        processors.TemplateProcessing(single="$A <|end|>", special_tokens=[("<|end|>", end)])])  # fmt: skip
    document = json.loads(tokenizer.to_str())
    forest = forest_of(document, size)
    kept = forest.kept([0] * size, len(forest.least) + len(forest.parts) // 2)
    fewer, made = (Tokenizer.from_str(json.dumps(of(document, kept))) for of in (trimmed, renumbered))
    assert sorted(made.get_vocab().values()) == list(range(len(kept)))
    for text in texts():
        ids = made.encode(text).ids
        assert [kept[place] for place in ids] == fewer.encode(text).ids
        assert made.decode(ids) == tokenizer.decode(tokenizer.encode(text).ids)
    with pytest.raises(UserError, match=f"token {end} is a special one and would be removed"):
        renumbered(document, [word for word in kept if word != end])


def test_what_bert_puts_around_a_text_is_renumbered():
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "[S]": 3, "[C]": 4}, "merges": [["a", "b"]]}
    around = {"type": "RobertaProcessing", "sep": ["[S]", 3], "cls": ["[C]", 4]}
    document = {"model": model, "added_tokens": [], "post_processor": around, "padding": {"pad_id": 3}}
    made = renumbered(document, [0, 1, 3, 4])
    assert made["post_processor"] == {"type": "RobertaProcessing", "sep": ["[S]", 2], "cls": ["[C]", 3]}
    assert made["padding"] == {"pad_id": 2} and made["model"]["merges"] == []


def test_the_least_counted_leaf_goes_first_and_its_count_goes_to_its_parts():
    vocabulary = {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4, "bc": 5}
    document = {"model": {"type": "BPE", "vocab": vocabulary, "merges": ["a b", "ab c", "b c"]}, "added_tokens": []}
    forest = forest_of(document, 6)
    assert forest.parts == {3: (0, 1), 4: (3, 2), 5: (1, 2)} and forest.least == {0, 1, 2}
    assert forest.order([0, 0, 0, 1, 9, 8]) == [5, 4, 3], "ab is no leaf while abc is there"
    assert forest.order([0, 0, 0, 1, 3, 8]) == [4, 3, 5], "4 of ab, its own and those of abc"
    with pytest.raises(UserError, match="of 2 words cannot be closed: 3 must stay"):
        forest.kept([0] * 6, 2)
    with pytest.raises(UserError, match="a tokenizer of type WordPiece cannot be closed"):
        forest_of({"model": {"type": "WordPiece", "vocab": {}}}, 6)


def test_with_a_word_stays_what_it_is_made_of():
    vocabulary = {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4, "bc": 5}
    document = {"model": {"type": "BPE", "vocab": vocabulary, "merges": ["a b", "ab c", "b c"]}, "added_tokens": []}
    forest = forest_of(document, 6, {4})
    assert forest.least == {0, 1, 2, 3, 4} and forest.parts == {5: (1, 2)}
