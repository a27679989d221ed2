"""``saap generate`` as a person, a pipe and a machine meet it."""

import contextlib
import io
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from support.command_line import here, refused
from support.exported import export_bundle

from export.bundle.manifest import read_manifest, write_manifest
from export.bundle.tokenizer import BundleTokenizer


@pytest.fixture(scope="module")
def exported(tmp_path_factory, llama):
    home = tmp_path_factory.mktemp("exported")
    export_bundle(llama(home / "tiny"), home / "bundle")
    return home / "bundle"


@pytest.fixture
def bundle(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "bundle")


@pytest.fixture
def generate(monkeypatch):
    def ask(*arguments, stdin=b"", code=0):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        return here("generate", *arguments, "--threads", "1", code=code)

    return ask


def document(done):
    return json.loads(done.stdout)


def test_small_files_are_read_once_and_what_is_read_is_hashed(bundle, generate, monkeypatch):
    small = [name for name in ("bundle.json", *read_manifest(bundle).files) if not name.endswith(".onnx")]
    read, opened = Path.open, Counter()

    def counted(path, *arguments, **settings):
        opened[path.relative_to(bundle).as_posix() if bundle in path.parents else ""] += 1
        return read(path, *arguments, **settings)

    monkeypatch.setattr(Path, "open", counted)
    for options in ((), ("--sample",)):
        opened.clear()
        generate(bundle, "A model", "--max-tokens", "1", *options)
        opened["bundle.json"] -= 1  # the engine opens the bundle by itself
        assert all(opened[name] <= 1 for name in small), opened
    names = [name for name in read_manifest(bundle).files if opened[name]]
    assert {"tokenizer.json", "generation_config.json"} <= {*names}
    for name in {*names, "model.onnx", "model.onnx.data"}:  # what was hashed before may not have been opened
        content = (bundle / name).read_bytes()
        (bundle / name).write_bytes(bytes([content[0] ^ 1]) + content[1:])
        assert f"{name} does not match the hash" in refused("generate", bundle, "A model", "--sample")
        (bundle / name).write_bytes(content)
    (bundle / "extra").symlink_to("model.onnx")
    assert "extra is not listed in bundle.json" in refused("generate", bundle, "A model")
    (bundle / "extra").unlink()


def test_one_answer_and_its_numbers(bundle, generate):
    done = generate(bundle, "The quick brown fox", "--max-tokens", "7")
    prompt = BundleTokenizer(bundle).encode_chat("The quick brown fox")
    assert f"[{len(prompt)} prompt tokens at " in done.stderr
    assert " 7 tokens at " in done.stderr and "stop: length, peak memory " in done.stderr
    told = document(generate(bundle, "The quick brown fox", "--max-tokens", "7", "--json"))
    (turn,) = told["turns"]
    assert turn["text"] + "\n" == done.stdout
    assert [turn["n_prompt"], turn["n_prompt_read"], turn["n_gen"], len(turn["ids"])] == [len(prompt)] * 2 + [7] * 2
    assert turn["text"] == BundleTokenizer(bundle).decode(turn["ids"])
    assert told["bundle_sha256"] == read_manifest(bundle).content_hash
    assert told["sampling"]["temperature"] == 0.0 and told["context"] == len(prompt) + 7
    assert turn["prefill_seconds"] > 0 and turn["decode_seconds"] > 0 and told["peak_memory_bytes"] > 2**20


def test_the_prompt_from_a_pipe_and_without_template(bundle, generate):
    given = generate(bundle, "A model is small", "--max-tokens", "5", "--raw").stdout
    assert generate(bundle, "-", "--max-tokens", "5", "--raw", stdin=b"A model is small").stdout == given
    assert generate(bundle, "-", "--max-tokens", "5", "--no-chat", stdin=b"A model is small").stdout == given
    told = document(generate(bundle, "A model is small", "--raw", "--max-tokens", "5", "--json"))
    assert told["turns"][0]["n_prompt"] == len(BundleTokenizer(bundle).encode("A model is small"))
    assert (told["chat_template"], told["system"]) == (False, None)


def test_turns_from_lines_share_a_cache(bundle, generate):
    lines = b"The fox\n\n/help\nAnd the dog?\n/reset\nThe fox\n/bye\nnever asked\n"
    done = generate(bundle, "--chat", "--max-tokens", "6", stdin=lines)
    cached = ["of them in the cache" in line for line in done.stderr.splitlines() if "tok/s" in line]
    assert cached == [False, True, True]  # after /reset, what the template begins with
    assert "/bye or Ctrl-D leaves" in done.stderr
    assert "[a new conversation]" in done.stderr and "never" not in done.stderr
    told = document(generate(bundle, "--chat", "--json", "--max-tokens", "6", stdin=b"The fox\n\nAnd the dog?\n"))
    answers = [turn["text"] for turn in told["turns"]]
    assert done.stdout == f"{answers[0]}\n{answers[1]}\n{answers[0]}\n"
    before, after = told["turns"]
    assert after["n_prompt_read"] <= after["n_prompt"] - before["n_prompt"]
    tokenizer = BundleTokenizer(bundle)
    messages = [{"role": "user", "content": "The fox"}, {"role": "assistant", "content": answers[0]},
                {"role": "user", "content": "And the dog?"}]  # fmt: skip
    assert after["n_prompt"] == len(tokenizer.encode(tokenizer.render_chat(messages), add_special_tokens=False))


def test_a_system_prompt_is_part_of_the_prompt(bundle, generate):
    told = document(generate(bundle, "Hi", "--system", "Be brief", "--max-tokens", "3", "--json"))
    tokenizer = BundleTokenizer(bundle)
    text = tokenizer.render_chat([{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hi"}])
    assert told["turns"][0]["n_prompt"] == len(tokenizer.encode(text, add_special_tokens=False))


def test_sampling_is_asked_for_and_then_has_the_model_s_settings(bundle, generate):
    config = {"do_sample": True, "temperature": 0.6, "top_k": 0, "top_p": 0.9, "repetition_penalty": 1.1}
    (bundle / "generation_config.json").write_text(json.dumps(config))
    write_manifest(bundle, read_manifest(bundle))

    def settings(*arguments):
        return document(generate(bundle, "Hi", "--max-tokens", "2", "--json", *arguments))["sampling"]

    greedy = {"temperature": 0.0, "top_k": None, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "seed": 0}
    assert settings() == settings("--temperature", "0") == greedy
    assert settings("--repetition-penalty", "1.3") == {**greedy, "repetition_penalty": 1.3}
    models = {**greedy, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1}
    assert settings("--sample") == models
    assert settings("--top-k", "5") == {**models, "top_k": 5}
    assert settings("--temperature", "1.5", "--min-p", "0.1") == {**models, "temperature": 1.5, "min_p": 0.1}
    drawn = [
        generate(bundle, "Hi", "--temperature", "3", "--seed", seed, "--max-tokens", "12").stdout for seed in "112"
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    (bundle / "generation_config.json").write_text('{"temperature": "hot"}')
    write_manifest(bundle, read_manifest(bundle))
    assert "temperature 'hot', which is no number" in refused("generate", bundle, "Hi", "--sample")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["Hi", "--temperature", "0", "--top-p", "0.9"], "so --top-p has no effect"),
        (["Hi", "--temperature", "0", "--sample"], "so --sample has no effect"),
        (["Hi", "--temperature", "-1"], "--temperature -1.0 is not allowed: give a number from 0"),
        (["Hi", "--top-p", "2"], "--top-p 2.0 is not allowed: give a number above 0"),
        (["Hi", "--raw", "--system", "x"], "--system needs the model's chat template"),
        (["Hi", "--max-tokens", "0"], "--max-tokens 0 is not allowed: give 1 or more"),
        (["Hi", "--context", "0"], "--context 0 is not allowed: give 1 or more"),
        (["Hi", "--context", "9999"], "9999 tokens of context do not fit"),
        (["Hi", "--threads", "0"], "--threads 0 is not allowed: give a whole number from 1"),
        (["word " * 300], "tokens with this turn and 256 fit"),
        (["word " * 300, "--raw"], "the context holds 256"),
        (["  "], "the prompt is empty"),
        (["-"], "the prompt is empty"),
        (["caf\udce9"], "not UTF-8"),
        ([], "no prompt: give one, - to read it"),
        (["--raw"], "no prompt"),
        (["--chat", "--raw"], "--chat and --raw contradict each other: give one of them"),
    ],
)
def test_mistakes_are_one_line(bundle, monkeypatch, arguments, message):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b""), encoding="utf-8"))
    assert message in refused("generate", bundle, *arguments)


def test_standard_input_that_is_no_text_is_one_line(bundle, monkeypatch):
    for arguments in (["-"], ["--chat"]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
        assert "standard input is not UTF-8" in refused("generate", bundle, *arguments)


def test_a_full_context_ends_piped_turns_with_one_line(bundle, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one\n" + b"word " * 60 + b"\n"), encoding="utf-8"))
    message = refused("generate", bundle, "--chat", "--max-tokens", "3", "--context", "64")
    assert "the context is full" in message and "/reset" in message


def test_a_bundle_without_template_continues_text_and_holds_no_conversation(bundle, generate, monkeypatch):
    (bundle / "chat_template.jinja").unlink()
    write_manifest(bundle, read_manifest(bundle))
    assert (
        generate(bundle, "A model", "--max-tokens", "4").stdout
        == generate(bundle, "A model", "--raw", "--max-tokens", "4").stdout
    )
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"x\n"), encoding="utf-8"))
    for arguments in (["--chat"], ["Hi", "--chat"]):
        assert "no chat template" in refused("generate", bundle, *arguments)


class Terminal:
    """``saap generate`` at a terminal of its own, in a process of its own."""

    def __init__(self, *arguments):
        self.master, slave = pty.openpty()
        self.shown = ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "saap.cli", "generate", *map(str, arguments)], stdin=slave, stdout=slave,
            stderr=slave, start_new_session=True, env={**os.environ, "TERM": "dumb"},
            # A shell's background job, as tests may be, ignores Ctrl-C, and so would what it starts.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        os.close(slave)

    def until(self, text, count=1, seconds=30):
        limit = time.monotonic() + seconds
        while self.shown.count(text) < count:
            assert time.monotonic() < limit, self.shown
            if not select.select([self.master], [], [], 1)[0]:  # a read would wait for ever
                continue
            with contextlib.suppress(OSError):  # what Linux says when the other side has closed
                self.shown += os.read(self.master, 1 << 16).decode("utf-8", "replace")

    def type(self, text):
        os.write(self.master, text.encode())


def test_a_conversation_at_a_terminal(tiny_model, tmp_path):
    # Nothing ends this answer but its length, which takes far longer than the test may.
    export_bundle(tiny_model(max_position_embeddings=60000), tmp_path / "bundle", bits=32)
    manifest = read_manifest(tmp_path / "bundle")
    write_manifest(tmp_path / "bundle", type(manifest)(**{**vars(manifest), "eos_token_ids": []}))
    at = Terminal(tmp_path / "bundle", "--threads", "1", "--max-tokens", "50000", "--context", "60000")
    at.until("> ")
    at.type("The fox\n")
    at.until("The fox\r\n")
    while at.shown.endswith("The fox\r\n"):  # until the answer has begun
        at.shown += os.read(at.master, 1 << 16).decode("utf-8", "replace")
    at.process.send_signal(signal.SIGINT)
    at.until("stop: interrupted")
    at.until("> ", 2)
    time.sleep(0.5)  # Python sees a signal between the prompt and the wait for a key only with the next key
    at.process.send_signal(signal.SIGINT)  # at the prompt it drops the line
    at.until("> ", 3)
    at.type("/reset\n")
    at.until("[a new conversation]")
    at.until("> ", 4)
    os.write(at.master, b"caf\xe9\n")
    at.until("[this is not UTF-8 text")
    at.until("> ", 5)
    at.type("\x04")
    assert at.process.wait(30) == 0
    os.close(at.master)
    assert "Traceback" not in at.shown


def test_a_reader_that_has_enough_is_no_error(bundle):
    command = [sys.executable, "-m", "saap.cli", "generate", str(bundle), "hello", "--threads", "1", "--raw"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.read(1)
        process.stdout.close()
        said = process.stderr.read().decode()
    assert said == ""
    assert process.returncode == 141
