"""Several turns over one cache."""

import json

import pytest
from support.exported import export_bundle
from support.scripted_decoder import ScriptedDecoder, bpe_directory

from export.bundle.tokenizer import BundleTokenizer, RunError
from export.engine.onnxruntime import OnnxRuntimeEngine
from export.engine.protocol import EngineOptions
from export.generate.chat import Conversation
from export.generate.loop import AnswerSettings, begin_text

APPENDS = (
    "{% for message in messages %}<s>{{ message['role'] }} {{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% endif %}"
)
# Like templates that drop what was thought in earlier turns: an earlier answer is shortened once another turn follows.
REWRITES = APPENDS.replace(
    "{{ message['content'] }}", "{{ message['content'] if loop.last else message['content'][:2] }}"
)


class Counting(ScriptedDecoder):
    """Also counts what it reads."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.read = []

    def prefill(self, ids):
        self.read.append(len(ids))
        return super().prefill(ids)


def conversation(path, template, script, **options):
    tokenizer = BundleTokenizer(bpe_directory(path, {"chat_template": template}))
    script = [token for text in script for token in (*tokenizer.encode(text, add_special_tokens=False), 1)]
    decoder = Counting(script, 300, max_length=options.pop("room", 400))
    return tokenizer, Conversation(decoder, tokenizer, AnswerSettings(512), **options)


def whole(tokenizer, messages):
    return tokenizer.encode(tokenizer.render_chat(messages), add_special_tokens=False)


def test_only_the_new_turn_is_read(tmp_path):
    tokenizer, talk = conversation(tmp_path, APPENDS, ["The fox", "A dog", "x"], system="Be brief")
    first = talk.ask("Who jumps?")
    assert "".join(first) == first.text == "The fox"
    assert first.read_tokens == first.prompt_tokens
    second = talk.ask("Who sleeps?")
    assert "".join(second) == "A dog"
    expected = [
        {"role": "system", "content": "Be brief"}, {"role": "user", "content": "Who jumps?"},
        {"role": "assistant", "content": "The fox"}, {"role": "user", "content": "Who sleeps?"},
    ]  # fmt: skip
    assert talk.messages == expected
    assert second.prompt_ids == whole(tokenizer, expected)
    drawn = tokenizer.encode("A dog", add_special_tokens=False)
    assert talk._sequence.ids == [*whole(tokenizer, expected), *drawn]  # the end-of-text id was drawn, not read
    # The first turn and its answer were in the cache; its end-of-text id is the first that was not.
    assert second.read_tokens == second.prompt_tokens - first.prompt_tokens - (first.tokens - 1)
    assert talk._sequence.engine.read == [first.prompt_tokens, second.read_tokens]


def test_a_template_that_rewrites_is_read_again_from_where_it_differs(tmp_path):
    tokenizer, talk = conversation(tmp_path, REWRITES, ["The fox jumps", "A dog", "x"])
    list(talk.ask("Who jumps?"))
    second = talk.ask("Who sleeps?")
    list(second)
    assert second.prompt_ids == whole(tokenizer, talk.messages)
    length = second.prompt_tokens
    assert talk._sequence.ids[:length] == second.prompt_ids == talk._sequence.engine.seen[:length]
    assert second.read_tokens > second.prompt_tokens // 2


def test_the_answer_after_two_turns_is_that_of_a_fresh_prompt(tiny_model, tmp_path):
    """With a real graph: what stays in the cache is what a fresh prefill would put there."""
    export_bundle(tiny_model(), tmp_path / "bundle", bits=32)
    tokenizer = BundleTokenizer(tmp_path / "bundle")

    def answers(talk, turns):
        return ["".join(talk.ask(turn)) for turn in turns]

    turns = ["The fox", "And the dog?", "Why"]
    talk = Conversation(OnnxRuntimeEngine(tmp_path / "bundle", EngineOptions(1, 256)), tokenizer, AnswerSettings(9))
    found = answers(talk, turns)
    fresh = Conversation(OnnxRuntimeEngine(tmp_path / "bundle", EngineOptions(1, 256)), tokenizer, AnswerSettings(9))
    fresh.messages = talk.messages[:-1]
    last = fresh.ask(turns[-1])
    assert "".join(last) == found[-1]
    assert last.read_tokens == last.prompt_tokens == len(whole(tokenizer, talk.messages))
    talk.reset()
    assert answers(talk, turns) == found


def test_reset_keeps_the_system_prompt_in_the_cache(tmp_path):
    tokenizer, talk = conversation(tmp_path, APPENDS, ["a", "b"], system="Be brief and kind")
    list(talk.ask("one"))
    talk.reset()
    again = talk.ask("two")
    list(again)
    system = [{"role": "system", "content": "Be brief and kind"}]
    assert talk.messages == [*system, {"role": "user", "content": "two"}]
    kept = len(tokenizer.encode(tokenizer.render_chat(system, add_generation_prompt=False), add_special_tokens=False))
    assert again.read_tokens <= again.prompt_tokens - kept


def test_an_answer_is_stopped_while_a_long_turn_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("export.generate.loop.PREFILL_CHUNK", 4)
    tokenizer, talk = conversation(tmp_path, APPENDS, ["The quick brown fox", "x"])
    decoder, reads = talk._sequence.engine, []
    read = decoder.prefill

    def stopped(ids):
        reads.append(len(ids))
        answer.stop()
        return read(ids)

    answer = talk.ask("Who was it that jumped over the dog?")
    decoder.prefill = stopped
    assert list(answer) == [] and answer.stop_reason == "interrupted" and answer.tokens == 0
    assert reads == [4] and answer.read_tokens == 4 < answer.prompt_tokens and len(talk._sequence.ids) == 4
    decoder.prefill = read
    second = talk.ask("Go on")
    assert list(second) and second.prompt_ids == whole(tokenizer, talk.messages)


def test_a_stopped_answer_stays_in_the_conversation_as_far_as_it_came(tmp_path):
    tokenizer, talk = conversation(tmp_path, APPENDS, ["The quick brown fox", "x"])
    answer = talk.ask("Who?")
    next(answer)
    answer.stop()
    list(answer)
    assert answer.stop_reason == "interrupted"
    assert answer.tokens < len(tokenizer.encode("The quick brown fox", add_special_tokens=False))
    assert answer.text and "The quick brown fox".startswith(answer.text)
    second = talk.ask("Go on")
    list(second)
    assert talk.messages[1] == {"role": "assistant", "content": answer.text}
    assert second.prompt_ids == whole(tokenizer, talk.messages)


def test_a_context_that_is_full_says_so_and_leaves_the_conversation_as_it_was(tmp_path):
    _, talk = conversation(tmp_path, APPENDS, ["a", "b"], room=60)
    list(talk.ask("one"))
    with pytest.raises(RunError, match=r"the context is full: .* 60 fit; .* /reset") as caught:
        talk.ask("word " * 40)
    assert "\n" not in str(caught.value)
    assert [m["role"] for m in talk.messages] == ["user", "assistant"]
    assert "".join(talk.ask("two")) == "b"
    _, talk = conversation(tmp_path, APPENDS, ["word " * 100], room=40)  # the answer itself fills it
    answer = talk.ask("one")
    list(answer)
    assert answer.stop_reason == "context" and len(talk._sequence.ids) == 40
    with pytest.raises(RunError, match="context is full"):
        talk.ask("two")


def test_no_chat_template_and_empty_turns(tmp_path):
    with pytest.raises(RunError, match="no chat template"):
        Conversation(ScriptedDecoder([1], 300), BundleTokenizer(bpe_directory(tmp_path)))
    with pytest.raises(RunError, match="no chat template"):
        begin_text(ScriptedDecoder([1], 300), BundleTokenizer(tmp_path), "hi")
    _, talk = conversation(tmp_path, APPENDS, ["a"])
    with pytest.raises(RunError, match="empty"):
        talk.ask("  \n")
    assert talk.messages == []
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["chat_template"] == APPENDS
