import gzip
import hashlib
import json
import sys
import types

import pytest

pytest.importorskip("transformers")
import torch

from saap.base.errors import UserError
from saap.text import documents as text
from saap.text.documents import load_documents, pack

LONG = "This line is long enough to tell one text from another, and it stands in both of the files given here.\n"


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rows(*objects):
    return "".join(json.dumps(row) + "\n" for row in objects)


def test_text_file_whole_for_evaluation_and_in_documents_for_calibration(tmp_path):
    content = "\n = Title = \r\n\n" + LONG * 100
    path = write(tmp_path / "a.txt", content)
    assert load_documents(path, split="evaluation").texts == (content,)
    cut = load_documents(path, split="calibration")
    assert len(cut.texts) == 5 and "".join(cut.texts) == content
    assert all(len(one) >= text.DOCUMENT_CHARACTERS for one in cut.texts[:-1])


def test_jsonl_forms_and_gzip(tmp_path):
    lines = rows(
        {"text": "plain\u2028text"},
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Say hi.", "input": "", "output": "hi"},
        {"instruction": "Why?", "context": "ctx", "response": "so"},
    )
    texts = ("plain\u2028text", "Add.\n1 2\n3", "Say hi.\nhi", "Why?\nctx\nso")
    plain = load_documents(write(tmp_path / "a.jsonl", lines), split="tuning")
    packed = load_documents(write(tmp_path / "a.jsonl.gz", gzip.compress(lines.encode())), split="tuning")
    raw = write(tmp_path / "u.jsonl", '{"text": "plain\u2028text"}\n')
    assert plain.texts == packed.texts == texts
    assert plain.sha256 == packed.sha256
    assert load_documents(raw, split="tuning").texts == texts[:1]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("q.jsonl", rows({"question": "?", "choices": ["a", "b"]}), "line 1 is a multiple-choice question"),
        ("q.jsonl", '{"text": "a"}\nnot json\n', "line 2 is not JSON"),
        ("q.jsonl", rows({"body": "x"}), "neither 'text' nor 'instruction'"),
        ("q.json", "{}", "not a list of rows"),
        ("q.txt", " \n", "holds no text"),
        ("q.txt", b"\xff\xfe\x00", "cannot be read as text"),
        ("q.txt.gz", b"not gzip", "cannot be read as text"),
        ("q.txt.gz", gzip.compress(b"text " * 999, mtime=0)[:30] + b"\xff" * 40, "cannot be read as text"),
        ("q.jsonl", '{"text": "half \\ud83d"}', r"line 1 holds half of a surrogate pair"),
        ("q.txt.gz", gzip.compress(b"x" * 9999, mtime=0)[:20], "cannot be read as text"),
    ],
)
def test_bad_files_are_one_line(tmp_path, name, content, says):
    with pytest.raises(UserError, match=says) as caught:
        load_documents(write(tmp_path / name, content), split="calibration")
    assert "\n" not in str(caught.value)


def test_no_such_text_and_broken_directories(tmp_path, monkeypatch):
    for source, says in (
        (tmp_path / "missing.txt", "no text"),
        (tmp_path, "is a directory"),
        ("self", "no longer write their own"),
    ):
        with pytest.raises(UserError, match=says):
            load_documents(source, split="calibration")
    monkeypatch.setenv("SAAP_DATA", str(tmp_path))
    for split, says in (
        ("evaluation", r"SAAP_DATA .* lacks wikitext2_test_raw.txt"),
        ("tuning", r"lacks c4_sample300"),
    ):
        with pytest.raises(UserError, match=says):
            load_documents(None, split=split)


def test_data_set_id(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        load_documents("org/name", split="calibration")
    asked = []

    def load_dataset(*args, **kwargs):  # no hub answers in a test
        asked.append((*args, kwargs["split"]))
        if args[0] == "org/none":
            raise ConnectionError("down")
        return iter([{"text": "one"}, {"text": "two"}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert load_documents("org/name:config", split="tuning").texts == ("one", "two")
    assert asked == [("org/name", "config", "train")]
    with pytest.raises(UserError, match=r"no hub gave its 'test' split \(ConnectionError\)"):
        load_documents("org/none", split="evaluation")


def test_files_of_the_data_directory(data_dir):
    evaluation = load_documents(None, split="evaluation")
    raw = evaluation.text.encode()
    assert hashlib.sha256(raw).hexdigest() == "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"
    calibration, again, tuning = (
        load_documents(None, split=split, seed=3) for split in ("calibration", "calibration", "tuning")
    )
    assert len(calibration.texts) == 300 + 526 + 2996
    assert calibration == again and calibration.texts != tuning.texts
    assert sorted(calibration.texts) == sorted(tuning.texts)


def test_pack_joins_with_eos_and_begins_as_the_tokenizer_begins_a_text(tiny_tokenizer, beginning_tokenizer):
    texts = [f"The dog number {n} sleeps." for n in range(20)]
    packed = pack(texts, tiny_tokenizer, 16, 8, seed=1)
    assert packed.shape == (8, 16) and packed.dtype == torch.int64
    assert torch.equal(packed, pack(texts, tiny_tokenizer, 16, 8, seed=1))
    assert not torch.equal(packed, pack(texts, tiny_tokenizer, 16, 8, seed=2))
    pieces = tiny_tokenizer.decode(packed.flatten()).split("<|im_end|>")
    assert set(pieces[:-1]) <= set(texts) and len(set(pieces[:-1])) == len(pieces) - 1
    begun = pack(texts, beginning_tokenizer, 17, 8, seed=1)
    assert begun[:, 0].tolist() == [tiny_tokenizer.bos_token_id] * 8 and torch.equal(begun[:, 1:], packed)
    for tokenizer, needed in ((tiny_tokenizer, 160), (beginning_tokenizer, 150)):
        with pytest.raises(UserError, match=rf"1 documents give 4 tokens, 10 rows of 16 need {needed}"):
            pack(["abc"], tokenizer, 16, 10, seed=0)


def test_what_all_of_a_file_is(tmp_path):
    plain, asked = {"text": LONG}, {"instruction": "Say it.", "output": LONG}
    chat = {"messages": [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": LONG}]}

    def kind(*rows):
        return text.one_kind(str(write(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, rows)))))

    assert kind(plain, plain) == "running text"
    assert kind(asked, chat) == "instructions"
    assert kind(plain, chat) is None
    assert text.one_kind(str(write(tmp_path / "river.txt", LONG))) == "running text"
    assert text.one_kind(None) is None and text.one_kind("org/name") is None
