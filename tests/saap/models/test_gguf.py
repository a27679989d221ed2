"""Sentencepiece tokenizers of GGUF files give the ids of sentencepiece itself."""

import io

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as proto

from saap.models.gguf import CONTROL, NORMAL, USER_DEFINED, spm_tokenizer

SENTENCES = [
    "The lowest of the new towers is wider than the older one in the lower town.",
    "English teachers were teaching newer English widely, and the widest lesson was the newest.",
    "She wrote: 12,345 numbers (67 of them odd) & more!",
    "Ein Übermaß an Größe; naïve café déjà vu.",
] * 8
TEXTS = [
    *SENTENCES[:4], "English", " a leading space", "trailing  ", "two  and   three", "line\nline\n\nline", "日本語",
    "🫨 new", "unwider newestly", "", "ﬁne ½", "tab\there",
]  # fmt: skip


@pytest.fixture(params=[True, False], ids=["prefix", "no prefix"], scope="module")
def model(request):
    """A small sentencepiece BPE trained here, as bytes, and whether it puts a space before a text."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=out, vocab_size=420, model_type="bpe", byte_fallback=True,
        character_coverage=1.0, normalization_rule_name="identity", remove_extra_whitespaces=False,
        add_dummy_prefix=request.param, user_defined_symbols=["<mark>"], minloglevel=2,
    )  # fmt: skip
    return out.getvalue(), request.param


def ours(model):
    parsed = proto.ModelProto.FromString(model[0])
    tokens, types, scores = zip(*((p.piece, p.type, p.score) for p in parsed.pieces), strict=True)
    return spm_tokenizer(tokens, types, scores, parsed.trainer_spec.unk_id, model[1])


def test_ids_are_sentencepiece_s_and_are_decoded(model):
    theirs, tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model[0]), ours(model)
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert (ids, tokenizer.decode(ids)) == (theirs.encode(text), text)
    # What a user defined stays whole. With a prefix a space follows it, as in llama.cpp and unlike sentencepiece.
    found = tokenizer.encode("English<mark> teachers", add_special_tokens=False)
    assert "<mark>" in found.tokens if model[1] else found.ids == theirs.encode("English<mark> teachers")


def test_control_pieces_are_special_and_left_out_of_text():
    tokenizer = spm_tokenizer(
        ["<unk>", "<s>", "a", "b", "ab"], [2, CONTROL, NORMAL, NORMAL, NORMAL], [0, 0, -2, -3, -1], 0, False
    )
    assert tokenizer.encode("<s>ab").ids == [1, 4]
    assert tokenizer.decode([1, 4]) == "ab"


def test_better_scores_are_joined_first():
    tokens, types = ["<unk>", "a", "b", "c", "ab", "bc"], [2, *[NORMAL] * 5]
    for scores, expected in (([0, -3, -3, -3, -1, -2], ["ab", "c"]), ([0, -3, -3, -3, -2, -1], ["a", "bc"])):
        assert spm_tokenizer(tokens, types, scores, 0, False).encode("abc").tokens == expected


def test_runs_of_spaces_that_users_defined_are_one_piece():
    """As in Gemma, whose file holds them with real spaces."""
    tokens = ["<unk>", "\u2581", "  ", "   ", "a"]
    tokenizer = spm_tokenizer(tokens, [2, NORMAL, USER_DEFINED, USER_DEFINED, NORMAL], [0, -1, -9, -9, -1], 0, False)
    assert tokenizer.encode("a   a  a a").tokens == ["a", "   ", "a", "  ", "a", "\u2581", "a"]
