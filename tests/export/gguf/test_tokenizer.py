"""Tokenizers in GGUF files: llama.cpp gives the ids that tokenizer.json gives."""

import json

import pytest
from conftest import SENTENCES
from support import llama_cpp_run
from support.gguf_texts import TEXTS
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from export.gguf.tokenizer import BYTE, CONTROL, SPLITS, UNUSED, USER_DEFINED, tokenizer_fields
from export.gguf.write import export_gguf
from saap.base.errors import UserError
from saap.models.resolve import load_tokenizer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)


def split_by(regex):
    return pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(regex), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip


PRE_TOKENIZERS = {
    "gpt-2": BYTE_LEVEL,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTE_LEVEL]),
    **{name: split_by(regex) for regex, name in SPLITS.items()},
}


def byte_level(path, pre):
    """Trained on the texts unsplit, so that its merges reach across every place where a split is due."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 2, trainer)
    tokenizer.add_tokens(["<tool>"])
    tokenizer.pre_tokenizer = pre
    tokenizer.save(str(path / "tokenizer.json"))
    return tokenizer


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_llama_cpp_splits_as_the_named_pre_tokenizer(tiny_model, tmp_path, name):
    path = tiny_model(vocab_size=960)
    tokenizer = byte_level(path, PRE_TOKENIZERS[name])
    report = export_gguf(path, tmp_path / "model.gguf", kind="F16")
    texts = TEXTS
    if name == "tekken":  # as the note says, llama.cpp's version of this one knows no combining marks
        assert "no combining marks" in report.notes[0]
        texts = [text.replace("नमस्ते", "") for text in TEXTS]
    found = llama_cpp_run.run(tmp_path / "model.gguf", texts=texts)
    for text, ids in zip(texts, found["encoded"], strict=True):
        assert ids == tokenizer.encode(text, add_special_tokens=False).ids, text


def sentencepiece(path, normalizer=None, pre=None):
    """Llama-2's and Mistral's kind: characters, then bytes for those that are unknown."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES * 2, trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:3]
    content["model"]["byte_fallback"] = True
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(path / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **named}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "special_tokens_map.json").unlink(missing_ok=True)
    return tokenizer


PREPEND = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
SPACES = {
    "prepended": {"normalizer": PREPEND},
    "metaspace": {"pre": pre_tokenizers.Metaspace(prepend_scheme="always", split=False)},
    "none prepended": {"normalizer": normalizers.Replace(" ", "▁")},
}


@pytest.mark.parametrize("parts", SPACES.values(), ids=SPACES.keys())
def test_a_sentencepiece_tokenizer(tiny_model, tmp_path, parts):
    path = tiny_model(vocab_size=960)
    tokenizer = sentencepiece(path, **parts)
    fields = tokenizer_fields(path, 960)
    assert (fields.model, fields.types[3], fields.types[258]) == ("llama", BYTE, BYTE)
    report = export_gguf(path, tmp_path / "model.gguf", kind="F16")
    metaspace = "pre" in parts  # does not put a space before a text that begins with one
    assert [note.split(" ")[-3:] for note in report.notes] == [["tokenizer", "does", "not"]] * metaspace
    texts = [text for text in TEXTS if "<|" not in text and not (metaspace and text.startswith(" "))]
    found = llama_cpp_run.run(tmp_path / "model.gguf", texts=texts)
    assert found["special"][2] is True
    for text, ids in zip(texts, found["encoded"], strict=True):
        assert ids == tokenizer.encode(text, add_special_tokens=False).ids, text


def test_special_tokens_ends_and_template(tiny_model, tmp_path):
    path = tiny_model()
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "generation_config.json").write_text('{"eos_token_id": [2, 17]}')
    report = export_gguf(path, tmp_path / "model.gguf", kind="F16")
    found = llama_cpp_run.run(tmp_path / "model.gguf", texts=["<|im_end|>"])
    assert found["special"] == [1, 2, True]
    assert {2, 17} <= set(found["ends"])
    assert found["template"] == load_tokenizer(path).chat_template
    assert found["encoded"] == [[2]]
    assert report.notes == []


def test_types_of_tokens_rows_without_one_and_what_surrounds_a_text(tiny_model):
    path = tiny_model(vocab_size=960)
    tokenizer = byte_level(path, BYTE_LEVEL)
    count, fields = tokenizer.get_vocab_size(), tokenizer_fields(path, 960)
    assert fields.types[:3] == [CONTROL] * 3 and fields.tokens[:3] == SPECIAL
    assert (fields.tokens[count - 1], fields.types[count - 1]) == ("<tool>", USER_DEFINED)
    assert fields.types[count:] == [UNUSED] * (960 - count) and fields.tokens[count] == f"[PAD{count}]"
    assert fields.add == {"bos_token": False, "eos_token": False}
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.save(str(path / "tokenizer.json"))
    surround, normalizer = tokenizer_fields(path, 960).notes
    assert "between [0] and []" in surround and "normalizer (NFC)" in normalizer


@pytest.mark.parametrize(
    "pre, shown",
    [
        (split_by(r"\d+|\D+"), "Split + ByteLevel"),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), "ByteLevel"),
        (pre_tokenizers.Whitespace(), "Whitespace"),
    ],
)
def test_an_unknown_pre_tokenizer_is_refused(tiny_model, tmp_path, pre, shown):
    path = tiny_model(vocab_size=960)
    byte_level(path, pre)
    with pytest.raises(UserError, match="known: gpt-2, smollm, llama-bpe, qwen2, tekken") as error:
        export_gguf(path, tmp_path / "model.gguf")
    assert f"({shown})" in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny"]


def test_no_tokenizer_another_kind_and_too_few_rows_are_refused(tiny_model):
    path = tiny_model()
    with pytest.raises(UserError, match="ids up to 299, the embedding 256 rows"):
        tokenizer_fields(path, 256)
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(path / "tokenizer.json"))
    with pytest.raises(UserError, match="type 'WordLevel'"):
        tokenizer_fields(path, 320)
    Tokenizer(models.BPE()).save(str(path / "tokenizer.json"))
    with pytest.raises(UserError, match="tokenizer has no tokens"):
        tokenizer_fields(path, 320)
    (path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        tokenizer_fields(path, 320)
