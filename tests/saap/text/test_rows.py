import copy
import gzip
import json

import pytest

pytest.importorskip("transformers")
import torch

from saap.base.errors import UserError
from saap.models.resolve import load_tokenizer
from saap.text.conversations import ChatEncoder, messages_of
from saap.text.documents import Sequences
from saap.text.rows import IGNORED, WINDOW, TuningRows, _pack, held_out, training_rows, tuning_rows

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What jumps over the dog?"},
    {"role": "assistant", "content": "The quick fox."},
    {"role": "user", "content": "And then?"},
    {"role": "assistant", "content": "The dog sleeps on."},
]
MARKED = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Drops what an earlier answer thought, as reasoning models' templates do.
FORGETFUL = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' and not loop.last %}{{ message['content'].split('|')[-1] }}"
    "{% else %}{{ message['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def rows_for(model, source, count, length, seed, *, skip=0, **kind):
    return tuning_rows(model, source, Sequences(count, length, seed, skip), **kind)


def with_template(tokenizer, template):
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


def learnt_text(tokenizer, sample):
    ids, learnt = sample
    return tokenizer.decode([token for token, is_learnt in zip(ids, learnt, strict=True) if is_learnt])


def write_rows(path, rows):
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


def dolly(count=40):
    return [
        {"instruction": f"Add {i} and {i + 1}.", "input": "" if i % 2 else "Now.", "output": f"It is {2 * i + 1}."}
        for i in range(count)
    ]


def answers(rows, tokenizer):
    """The learnt pieces of all rows: consecutive learnt tokens, as text."""
    pieces = []
    for ids, labels in zip(rows.ids.tolist(), rows.labels.tolist(), strict=True):
        piece = []
        for token, label in [*zip(ids, labels, strict=True), (0, IGNORED)]:
            if label != IGNORED:
                assert label == token
                piece.append(token)
            elif piece:
                pieces.append(tokenizer.decode(piece))
                piece = []
    return pieces


def test_plain_text_is_packed_as_for_calibration(tiny_model, tmp_path):
    model = tiny_model()
    (tmp_path / "a.txt").write_text("The dog sleeps on, and the river rose.\n" * 200, encoding="utf-8")
    for source in (str(tmp_path / "a.txt"), None):
        rows = rows_for(model, source, 3, 32, 1, skip=2)
        before = training_rows(model, source, "tuning", Sequences(3, 32, 1, 2))
        assert torch.equal(rows.ids, before.ids) and torch.equal(rows.labels, rows.ids)
        assert (rows.source, rows.sha256, rows.kind, rows.note) == (before.source, before.sha256, "text", None)
        assert rows.learnt == 3 * 31 and rows.labels.data_ptr() != rows.ids.data_ptr()


def test_every_answer_with_its_end_is_learnt_and_nothing_else(tiny_tokenizer):
    (sample,) = ChatEncoder(tiny_tokenizer).samples([*TALK, {"role": "user", "content": "Why?"}], "here")
    text = tiny_tokenizer.apply_chat_template(TALK, tokenize=False)
    assert tiny_tokenizer.decode(sample[0]) == text
    assert sample[0] == tiny_tokenizer(text, add_special_tokens=False).input_ids
    assert learnt_text(tiny_tokenizer, sample) == "The quick fox.<|im_end|>The dog sleeps on.<|im_end|>"


def test_the_template_s_own_marks_are_taken(tiny_tokenizer):
    tokenizer = with_template(tiny_tokenizer, MARKED)
    ((ids, learnt),) = ChatEncoder(tokenizer).samples(TALK, "here")
    reference = tokenizer.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
    assert ids == reference["input_ids"] and [int(one) for one in learnt] == reference["assistant_masks"]
    assert list(ChatEncoder(tiny_tokenizer).samples(TALK, "here")) == [(ids, learnt)]
    blank_at_end = with_template(tiny_tokenizer, MARKED.replace("{% endgeneration %}", "{{ '\n' }}{% endgeneration %}"))
    (sample,) = ChatEncoder(blank_at_end).samples(TALK, "here")
    assert learnt_text(tokenizer, sample) == "The quick fox.<|im_end|>\nThe dog sleeps on.<|im_end|>\n"


def test_a_template_that_rewrites_earlier_turns_gives_a_sample_per_answer(tiny_tokenizer):
    tokenizer = with_template(tiny_tokenizer, FORGETFUL)
    talk = [dict(turn) for turn in TALK]
    talk[2]["content"], talk[4]["content"] = "jumping?|A fox.", "lazy|It sleeps."
    first, second = ChatEncoder(tokenizer).samples(talk, "here")
    assert learnt_text(tokenizer, first) == "jumping?|A fox.<|im_end|>"
    assert learnt_text(tokenizer, second) == "lazy|It sleeps.<|im_end|>"
    assert "A fox." in tokenizer.decode(second[0]) and "jumping" not in tokenizer.decode(second[0])


def test_real_template_of_smollm2(real_model):
    tokenizer = load_tokenizer(real_model)
    talk = [*TALK[1:3], {"role": "user", "content": "Décrivez 🦊!"}, {"role": "assistant", "content": " Ünïcode 🦊.\n"}]
    ((ids, learnt),) = ChatEncoder(tokenizer).samples(talk, "here")
    assert ids == tokenizer.apply_chat_template(talk, tokenize=True, return_dict=False)
    assert learnt_text(tokenizer, (ids, learnt)) == "The quick fox.<|im_end|> Ünïcode 🦊.\n<|im_end|>"
    # What is not learnt before the first answer is exactly the prompt that `saap generate` would give.
    prompt = tokenizer.apply_chat_template(talk[:1], tokenize=True, return_dict=False, add_generation_prompt=True)
    assert ids[: learnt.index(True)] == prompt
    # A blank at the start of an answer that melts into the prompt's line break: that token is the prompt's.
    for said, learnt_of_it in (("  Later.", " Later."), ("\n\nLater.", "\nLater.")):
        talk = [TALK[1], {"role": "assistant", "content": said}]
        (sample,) = ChatEncoder(tokenizer).samples(talk, "here")
        assert sample[0] == tokenizer.apply_chat_template(talk, tokenize=True, return_dict=False)
        assert learnt_text(tokenizer, sample) == learnt_of_it + "<|im_end|>"


def test_forms_of_chat_data_say_the_same():
    asked, said = "Add.\n\n1 2", "3"
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    forms = [
        {"messages": turns},
        {"conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": said}]},
        {"instruction": "Add.", "input": "1 2", "output": said},
        {"instruction": "Add.", "context": "1 2", "response": said},
    ]
    assert all(messages_of(form, "here") == turns for form in forms)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_conversations_fill_rows_and_each_is_learnt_once(tiny_model, tmp_path, tiny_tokenizer, name):
    model, source = tiny_model(), write_rows(tmp_path / name, dolly())
    rows = rows_for(model, source, 8, 128, 3)
    assert rows.kind == "chat" and rows.ids.shape == rows.labels.shape == (8, 128) and rows.ids.dtype == torch.int64
    found = answers(rows, tiny_tokenizer)
    expected = [f"It is {2 * i + 1}.<|im_end|>" for i in range(40)]
    assert len(set(found)) == len(found) > 8 and set(found) <= set(expected)
    assert (rows.labels[:, 0] == IGNORED).all() and ((rows.labels != IGNORED).sum(1) > 0).all()
    assert rows.learnt == int((rows.labels != IGNORED).sum())
    fewer, later = rows_for(model, source, 3, 128, 3), rows_for(model, source, 5, 128, 3, skip=3)
    assert torch.equal(torch.cat([fewer.ids, later.ids]), rows.ids)
    assert torch.equal(torch.cat([fewer.labels, later.labels]), rows.labels)
    assert not torch.equal(rows_for(model, source, 8, 128, 4).ids, rows.ids)
    assert rows.lineage() | {"rows_sha256": ""} == {
        "source": source, "text_sha256": rows.sha256, "kind": "chat", "rows": 8, "learnt_tokens": rows.learnt,
        "rows_sha256": "",
    }  # fmt: skip
    assert fewer.lineage()["rows_sha256"] != later.lineage()["rows_sha256"]


def test_packing_keeps_samples_whole_and_takes_the_longest_that_fits():
    sizes = [5, 2, 6, 3, 4, 4, 10, 1]
    samples = [([i] * size, [i % 2 == 0] * size) for i, size in enumerate(sizes)]
    rows = _pack(samples, 10, 9, filler=99)
    assert [ids for ids, _ in rows] == [
        [0] * 5 + [4] * 4 + [7],
        [1] * 2 + [2] * 6 + [99] * 2,
        [3] * 3 + [5] * 4 + [99] * 3,
        [6] * 10,
    ]
    assert all(
        is_learnt == (i % 2 == 0 and i != 99) for ids, learnt in rows for i, is_learnt in zip(ids, learnt, strict=True)
    )
    assert _pack(iter(samples), 10, 2, 99) == rows[:2]
    many = [([i] * 7, [True] * 7) for i in range(2 * WINDOW)]
    assert [ids[0] for ids, _ in _pack(many, 10, 2 * WINDOW, 99)] == list(range(2 * WINDOW))


def test_long_conversations_are_cut_at_their_end(tiny_model, tmp_path, tiny_tokenizer):
    talks = [{"instruction": "Say a lot.", "output": f"{i} " + "the fox " * 60} for i in range(2)]
    talks.append({"instruction": "the dog " * 60, "output": "No."})
    rows = rows_for(tiny_model(), write_rows(tmp_path / "a.jsonl", talks), 2, 64, 0)
    assert all(answer.startswith(("0 the fox", "1 the fox")) for answer in answers(rows, tiny_tokenizer))
    assert (rows.labels[:, -1] != IGNORED).all()
    assert rows.note == "1 answers that begin after 64 tokens are left out"
    with pytest.raises(UserError, match=r"3 conversations fill 2 rows of 64 tokens \(1 answers begin after 64 tokens"):
        rows_for(tiny_model(), str(tmp_path / "a.jsonl"), 3, 64, 0)


def test_kinds(tiny_model, tmp_path):
    model, source = tiny_model(), write_rows(tmp_path / "a.jsonl", dolly())
    chat = rows_for(model, source, 2, 64, 0)
    text = rows_for(model, source, 2, 64, 0, kind="text")
    assert (chat.kind, text.kind, text.note) == ("chat", "text", None) and torch.equal(text.labels, text.ids)
    (model / "chat_template.jinja").unlink()
    fallen = rows_for(model, source, 2, 64, 0)
    assert torch.equal(fallen.ids, text.ids) and fallen.note == (
        f"{source} is read as plain text: the model has no chat template"
    )
    with pytest.raises(UserError, match=r"no chat template.* give --kind text"):
        rows_for(model, source, 2, 64, 0, kind="chat")
    messages = write_rows(tmp_path / "m.jsonl", [{"messages": TALK}] * 9)
    assert rows_for(model, messages, 2, 64, 0).kind == "text"
    mixed = write_rows(tmp_path / "mixed.jsonl", [*dolly(), {"text": "The dog sleeps on."}])
    assert rows_for(model, mixed, 2, 64, 0).note.endswith("only 40 of its 41 rows are conversations")
    plain = write_rows(tmp_path / "p.jsonl", [{"text": "The dog sleeps on. " * 20}])
    assert rows_for(model, plain, 2, 16, 0).note is None


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"messages": [{"role": "tool", "content": "x"}]}, "line 2 has a turn of role 'tool'"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, r"line 2 has a turn of role \['user'\]"),
        ({"instruction": "half \ud83d", "output": "x"}, "line 2 holds half of a surrogate pair"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "line 2 has a turn of from 'bot'"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "line 2 has a turn whose content is no text"),
        ({"messages": "hello"}, "line 2 has turns that are no list"),
        ({"messages": [{"role": "user", "content": "x"}]}, "line 2 has no answer"),
        ({"messages": []}, "line 2 has no answer"),
        ({"messages": TALK[2:]}, "line 2 begins with an answer"),
        ({"instruction": "Add.", "output": " "}, "line 2 has an empty answer"),
        ({"instruction": "Add."}, "line 2 has an empty answer"),
        ({"text": "plain"}, "line 2 is no chat"),
    ],
)
def test_bad_rows_name_file_and_line(tiny_model, tmp_path, row, says):
    source = write_rows(tmp_path / "bad.jsonl", [*dolly(1), row])
    with pytest.raises(UserError, match=rf"bad\.jsonl {says}") as caught:
        rows_for(tiny_model(), source, 1, 32, 0, kind="chat")
    assert "\n" not in str(caught.value)


def test_what_cannot_be_learnt_from_is_refused(tiny_model, tmp_path, tiny_tokenizer):
    model, source = tiny_model(), write_rows(tmp_path / "a.jsonl", dolly(5))
    refusals = [
        ((source, 9, 128), {}, r"5 conversations fill \d rows of 128 tokens, 9 are needed: give more"),
        ((source, 1, 128), {"skip": 9}, "1 are needed after 9 that are used"),
        ((source, 1, 1), {}, "1 row of 1 token cannot teach anything"),
        ((source, 1, 64), {"kind": "talk"}, "give one of auto, text, chat"),
        ((None, 1, 64), {"kind": "chat"}, "chat needs conversations"),
        ((write_rows(tmp_path / "e.jsonl", []), 1, 64), {}, "holds no text"),
        ((write_rows(tmp_path / "e.jsonl", []), 1, 64), {"kind": "chat"}, "holds no conversations"),
        ((str(tmp_path / "none.jsonl"), 1, 64), {}, "no text"),
        ((str(tmp_path), 1, 64), {}, "is a directory"),
    ]
    for arguments, options, says in refusals:
        with pytest.raises(UserError, match=says):
            rows_for(model, *arguments, 0, **options)
    strict = with_template(tiny_tokenizer, "{{ raise_exception('No system turn') }}")
    with pytest.raises(UserError, match=r"line 1: .* refuses it \(No system turn\)"):
        list(ChatEncoder(strict).samples(TALK, "line 1"))
    unprompted = with_template(tiny_tokenizer, "{{ messages | length }}{% if add_generation_prompt %}>{% endif %}")
    with pytest.raises(UserError, match="does not write an answer after its own prompt"):
        list(ChatEncoder(unprompted).samples(TALK, "line 1"))


def test_the_last_rows_are_held_out():
    ids = torch.arange(40).view(10, 4)
    rows = TuningRows(ids, ids + 100, "here", "0" * 64, "text")
    train, held = held_out(rows, 0.25)
    assert (len(train), len(held)) == (8, 2) and torch.equal(torch.cat([train.ids, held.ids]), ids)
    assert torch.equal(held.labels, ids[8:] + 100) and held.source == "here"
    assert len(held_out(rows, 0.01)[1]) == 1
    with pytest.raises(UserError, match="3 rows are too few"):
        held_out(TuningRows(ids[:3], ids[:3], "here", None, "text"), 0.1)
    for share in (0.0, 0.6, float("nan")):
        with pytest.raises(UserError, match="cannot be held out"):
            held_out(rows, share)
