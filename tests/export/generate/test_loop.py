import json
from dataclasses import replace

import pytest
from support.old_products import old_products
from support.scripted_decoder import TEXTS, ScriptedDecoder, bpe_directory
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from export.bundle.manifest import read_manifest, write_manifest
from export.bundle.tokenizer import BundleTokenizer, RunError, TextStream
from export.generate.loop import AnswerSettings, begin_text

TEMPLATE = (
    "{% for message in messages %}\n"
    "  {% if message['role'] == 'system' %}{% continue %}{% endif %}\n"
    "{{ bos_token + message['role'] + '\\n' + message['content'] | tojson + eos_token }}\n"
    "{% generation %}{% set inner = 1 %}{% endgeneration %}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}{{ bos_token }}assistant {{ strftime_now('%Y') }}{% endif %}\n"
)


def metaspace_directory(path):
    """Build a tokenizer whose decoder drops the first space of any text, as Llama 2's does."""
    words = ["<unk>", "</s>", *["▁Paris", "▁is", "▁big", "▁", "a", "b"], *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return BundleTokenizer(path)


@pytest.fixture
def tiny(tmp_path):
    return BundleTokenizer(bpe_directory(tmp_path, {"chat_template": TEMPLATE}))


def pieces_of(tokenizer, ids, context=()):
    stream = TextStream(tokenizer, context)
    return [stream.push(token) for token in ids] + [stream.flush()]


def assert_same_as_transformers(directory):
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(directory), BundleTokenizer(directory)
    chat = [
        {"role": "system", "content": "Be brief & <kind>."},
        {"role": "user", "content": 'Say "naïve" '},
        {"role": "assistant", "content": "naïve\n"},
        {"role": "user", "content": "Again, 日本."},
    ]
    for messages in (chat, chat[1:2]):
        for prompt in (True, False):
            text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            assert ours.render_chat(messages, add_generation_prompt=prompt) == text
            assert ours.encode(text, add_special_tokens=False) == theirs(text, add_special_tokens=False).input_ids
    for text in TEXTS:
        ids = theirs(text).input_ids
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert "".join(pieces_of(ours, ids)) == ours.decode(ids)
    assert ours.bos_token_id == theirs.bos_token_id


def test_tokenizers_render_and_encode_as_transformers_does(tmp_path):
    assert_same_as_transformers(bpe_directory(tmp_path, {"chat_template": TEMPLATE}))
    # A template in a file, and an object for a special token.
    token = {"content": "</s>", "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    bpe_directory(tmp_path, {"chat_template": "from the config", "eos_token": {"__type": "AddedToken", **token}})
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    assert_same_as_transformers(tmp_path)


def test_real_tokenizer_renders_and_encodes_as_transformers_does(real_model):
    assert_same_as_transformers(real_model)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "refuses this conversation"),  # not out of the sandbox
        ("{{ raise_exception('only system turns') }}", "only system turns"),
    ],
)
def test_templates_that_refuse(tmp_path, template, says):
    with pytest.raises(RunError, match=says):
        BundleTokenizer(bpe_directory(tmp_path, {"chat_template": template})).encode_chat("hi")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, [1]),
        ({"generation_config.json": {"eos_token_id": [5, 7]}}, [5, 7]),
        ({"generation_config.json": {"eos_token_id": 0}}, [0]),
    ],
)
def test_end_of_text_ids_come_from_the_nearest_source(tmp_path, files, expected):
    for name, value in files.items():
        (tmp_path / name).write_text(json.dumps(value))
    directory = bpe_directory(tmp_path)
    assert BundleTokenizer(directory).eos_token_ids == expected
    old = read_manifest(old_products() / "bundle")
    write_manifest(directory, replace(old, eos_token_ids=[2, 0]))
    assert BundleTokenizer(directory).eos_token_ids == [2, 0]


@pytest.mark.parametrize("damage", ["missing", "not json", "list"])
def test_broken_tokenizer_directory_is_one_line(tmp_path, damage):
    bpe_directory(tmp_path)
    path = tmp_path / ("tokenizer.json" if damage != "list" else "tokenizer_config.json")
    path.unlink() if damage == "missing" else path.write_text("[]" if damage == "list" else "{")
    with pytest.raises(RunError, match=path.name) as error:
        BundleTokenizer(tmp_path)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2


def test_stream_never_shows_half_a_character(tiny):
    for text in TEXTS:
        ids = tiny.encode(text, add_special_tokens=False)
        pieces = pieces_of(tiny, ids)
        assert "".join(pieces) == text
        assert not any("\ufffd" in piece for piece in pieces)
    family = pieces_of(tiny, tiny.encode("👩", add_special_tokens=False))
    assert len(family) > 2
    assert [piece for piece in family if piece] == ["👩"]
    ids = tiny.encode("ok 👩", add_special_tokens=False)[:-1]  # broken bytes at the end are shown, not lost
    assert "".join(pieces_of(tiny, ids)) == tiny.decode(ids)
    assert tiny.decode(ids).endswith("\ufffd")


def test_stream_keeps_spaces_that_the_decoder_strips(tmp_path):
    tokenizer = metaspace_directory(tmp_path)
    ids = [tokenizer.tokenizer.token_to_id(word) for word in ("▁Paris", "▁is", "</s>", "▁big", "<0xC3>", "<0xA9>", "a")]
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids) == "Paris is bigéa"
    # Continuing a text, the first word needs its space; on its own it must not have one.
    assert pieces_of(tokenizer, ids[1:2], context=ids[:1]) == [" is", ""]
    assert pieces_of(tokenizer, ids[1:2]) == ["is", ""]


def test_generation_streams_until_any_end_of_text_id(tiny):
    script = [*tiny.encode("Dogs jump, naïve 👩!", add_special_tokens=False), 1]
    decoder = ScriptedDecoder(script, 300)
    ticks = iter(range(1000))
    out = begin_text(decoder, tiny, "The fox", AnswerSettings(clock=lambda: float(next(ticks))), chat=False)
    pieces = list(out)
    assert "".join(pieces) == "Dogs jump, naïve 👩!"
    assert len(pieces) > 5
    assert (out.stop_reason, out.tokens, out.prompt_tokens) == ("eos", len(script), len(tiny.encode("The fox")))
    assert decoder.seen == [*tiny.encode("The fox"), *script[:-1]]
    # One tick for prefill, one per drawn token.
    assert (out.prefill_seconds, out.decode_seconds) == (1.0, float(len(script)))
    other = begin_text(decoder, tiny, "The fox", AnswerSettings(stop_ids=[script[2], 1]), chat=False)
    assert len("".join(other)) < 8
    assert (other.tokens, decoder.resets) == (3, 2)


def test_chat_prompt_has_the_template_and_one_beginning(tiny):
    decoder = ScriptedDecoder([1], 300, max_length=200)
    assert list(begin_text(decoder, tiny, "hello")) == []
    text = tiny.render_chat([{"role": "user", "content": "hello"}])
    assert decoder.seen == tiny.encode(text, add_special_tokens=False)
    assert decoder.seen[:2].count(0) == 1


def test_generation_stops_at_max_tokens_and_at_a_full_context(tiny):
    script = tiny.encode("ababab", add_special_tokens=False)[:1]
    n = len(tiny.encode("The fox"))
    for room, limit, tokens, reason in [(64, 5, 5, "length"), (n + 3, 50, 4, "context"), (n, 50, 1, "context")]:
        out = begin_text(ScriptedDecoder(script, 300, room), tiny, "The fox", AnswerSettings(limit), chat=False)
        assert "".join(out) == tiny.decode(script * tokens)
        assert (out.tokens, out.stop_reason) == (tokens, reason)


@pytest.mark.parametrize(
    ("prompt", "arguments", "message"),
    [
        ("x", {"max_tokens": 0}, "ask for 1 or more"),
        ("", {}, "empty"),
        (" \n", {}, "empty"),
        ("word " * 90, {}, "the context holds 64: shorten it"),
    ],
)
def test_bad_input_is_told_before_anything_runs(tiny, prompt, arguments, message):
    decoder = ScriptedDecoder([1], 300)
    with pytest.raises(RunError, match=message):
        begin_text(decoder, tiny, prompt, AnswerSettings(**arguments), chat=False)
    assert decoder.resets == 0
