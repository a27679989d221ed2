"""``saap generate``: one answer, or a conversation, streamed from a bundle. No torch, no transformers.

Answers go to standard output; what the user is asked, statistics and messages go to standard error.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from export.generate.options import GenerateOptions
from saap.cli.options import OptionsCommand, options_of
from saap.cli.types import directory
from saap.system.errors import UserError
from saap.system.files import read_object

if TYPE_CHECKING:
    from export.generate.chat import Conversation
    from export.generate.loop import Generation
    from export.generate.sampling import Sampling

CHAT_CONTEXT = 4096  # positions of a conversation's cache where --context is not given
SAMPLED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
CONTROL = dict.fromkeys([*range(9), 11, 12, *range(14, 32), *range(127, 160)])  # all but tab, newline and return

Ask = Callable[[str], "Generation"]


@click.command(cls=OptionsCommand)
@click.argument("bundle", type=directory)
@click.argument("prompt", required=False)
@options_of(GenerateOptions)
@click.option("--json", "as_json", is_flag=True, help="One document with texts, ids and times, for machines.")
def generate(bundle: Path, prompt: str | None, as_json: bool, options: GenerateOptions) -> None:
    """Stream text from a bundle; needs no torch.

    Without a prompt it is a conversation: at a terminal, or with --chat one turn per line of standard input. A prompt
    of - is read from standard input.

    \b
    Example:
      saap generate out/demo/slim-int4 "Why is the sky blue?"
      saap generate out/demo/slim-int4 --system "Be brief." --temperature 0.7 --top-p 0.9
    """
    generate_text(bundle, prompt, options, as_json)


def generate_text(bundle: Path, prompt: str | None, options: GenerateOptions, as_json: bool = False) -> None:
    """Answer one prompt, or hold a conversation.

    Args:
        prompt: a text, ``-`` for all of standard input, or None for a conversation.
        as_json: print one document instead of a stream.

    Raises:
        UserError, RunError, BundleError, DecoderError: what the user can mend.
    """
    from export.bundle.manifest import read_manifest
    from export.bundle.tokenizer import BundleTokenizer

    manifest, tokenizer = read_manifest(bundle), BundleTokenizer(bundle)
    interactive = prompt is None and sys.stdin.isatty()
    templated = tokenizer.has_chat_template if options.chat is None else options.chat
    _check_mode(prompt, interactive, options, templated, as_json)
    sampling = chosen_sampling(bundle, options)
    text = prompt if prompt != "-" else _decoded(sys.stdin.buffer.read())
    for given in (text, options.system):
        _check_text(given)
    if text is not None and not templated:
        ask, setup = _continuation(bundle, manifest, tokenizer, text, sampling, options)
        talk = None
    else:
        talk, setup = _conversation(bundle, manifest, tokenizer, text, sampling, options)
        ask = talk.ask
    if not as_json:
        turns = _typed() if interactive else _lines() if text is None else iter([text])
        _hold(ask, talk if text is None else None, turns)
        return
    answers = _quietly(ask, _lines() if text is None else iter([text]))
    document = {"bundle": str(bundle), "bundle_sha256": manifest.content_hash, **setup, "system": options.system,
                "sampling": asdict(sampling), "turns": answers, "peak_memory_bytes": _peak()}  # fmt: skip
    click.echo(json.dumps(document, indent=1, ensure_ascii=False))


def chosen_sampling(bundle: Path, options: GenerateOptions) -> Sampling:
    """Greedy unless sampling is asked for; then what is not given comes from the model's generation_config.json.

    Asked for means: ``sample``, a temperature above 0, top_k, top_p or min_p.

    Raises:
        UserError: a temperature of 0 beside an option that only means something when tokens are drawn.
        RunError: a value out of range.
    """
    from export.generate.sampling import Sampling

    given = {name: value for name in SAMPLED if (value := getattr(options, name)) is not None}
    asked = [name for name in ("top_k", "top_p", "min_p") if name in given] + (["sample"] if options.sample else [])
    if asked and given.get("temperature") == 0:
        flag = "--" + asked[0].replace("_", "-")
        raise UserError(f"temperature 0 takes the likeliest token, so {flag} has no effect: leave one of them out")
    if asked or given.get("temperature"):
        given = {"temperature": 1.0, **_model_defaults(bundle), **given}
    return Sampling(**given, seed=options.seed)


def _model_defaults(bundle: Path) -> dict[str, Any]:
    path = bundle / "generation_config.json"
    config = read_object(path, "export the bundle again") if path.is_file() else {}
    found = {name: config[name] for name in SAMPLED if config.get(name) is not None}
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{path} has {name} {value!r}, which is no number: give --{name.replace('_', '-')}")
    if found.get("top_k") == 0:  # transformers' way to say that all are kept
        del found["top_k"]
    return found


def _check_mode(
    prompt: str | None, interactive: bool, options: GenerateOptions, templated: bool, as_json: bool
) -> None:
    if prompt is None and not interactive and not options.chat:
        raise UserError("no prompt: give one, - to read it from standard input, or --chat to read one turn per line")
    if prompt is None and not templated:
        raise UserError("a conversation needs the model's chat template: give a prompt to continue")
    if options.system is not None and not templated:
        raise UserError("--system needs the model's chat template: put it into the prompt, or leave --raw out")
    if interactive and as_json:
        raise UserError("--json is no conversation at a terminal: give a prompt, or --chat and turns on standard input")


def _conversation(
    bundle: Path, manifest: Any, tokenizer: Any, text: str | None, sampling: Any, options: GenerateOptions
) -> tuple[Conversation, dict[str, Any]]:
    """With the chat template, over a cache that one prompt needs or a conversation may."""
    from export.generate.chat import Conversation

    needed = CHAT_CONTEXT
    if text is not None:
        turns = [] if options.system is None else [{"role": "system", "content": options.system}]
        rendered = tokenizer.render_chat([*turns, {"role": "user", "content": text}])
        needed = len(tokenizer.encode(rendered, add_special_tokens=False)) + options.max_tokens
    decoder, setup = _decoder(bundle, manifest, needed, options)
    talk = Conversation(decoder, tokenizer, system=options.system, max_tokens=options.max_tokens, sampling=sampling)
    return talk, {**setup, "chat_template": True}


def _continuation(
    bundle: Path, manifest: Any, tokenizer: Any, text: str, sampling: Any, options: GenerateOptions
) -> tuple[Ask, dict[str, Any]]:
    """A plain text that is continued."""
    from export.generate.loop import generate

    needed = len(tokenizer.encode(text)) + options.max_tokens
    decoder, setup = _decoder(bundle, manifest, needed, options)

    def ask(prompt: str) -> Generation:
        return generate(decoder, tokenizer, prompt, max_tokens=options.max_tokens, sampling=sampling, chat=False)

    return ask, {**setup, "chat_template": False}


def _decoder(bundle: Path, manifest: Any, needed: int, options: GenerateOptions) -> tuple[Any, dict[str, Any]]:
    from bench.measure.cores import physical_cores
    from bench.runtimes.onnxruntime import OrtDecoder

    threads = physical_cores() if options.threads is None else options.threads
    context = max(1, min(manifest.context_length, needed)) if options.context is None else options.context
    return OrtDecoder(bundle, threads, context, prepacked=options.prepacked), {
        "threads": threads,
        "context": context,
    }


def _hold(ask: Ask, talk: Conversation | None, turns: Iterable[str]) -> None:
    """Answer turn after turn; ``talk`` is None for a single prompt, where mistakes and Ctrl-C end the command."""
    interactive = sys.stdin.isatty()
    for turn in turns:
        command = turn.strip()
        if talk is not None and command == "/exit":
            return
        if talk is not None and command == "/reset":
            talk.reset()
            click.echo("[a new conversation]", err=True)
        elif command or talk is None:
            try:
                generation = ask(turn)
            except ValueError as error:
                if talk is None or not interactive or not hasattr(error, "exit_code"):
                    raise
                click.echo(f"[{error}]", err=True)
                continue
            with _ctrl_c_stops(generation) if talk is not None else contextlib.nullcontext():
                _stream(generation)
            click.echo(_statistics(generation), err=True)
            if generation.stop_reason == "context" and talk is not None:
                click.echo("[the context is full: /reset starts a new conversation]", err=True)


def _stream(generation: Generation) -> None:
    """Print an answer as it comes; to a terminal no control characters, which could do more than be shown."""
    terminal = sys.stdout.isatty()
    for piece in generation:
        click.echo(piece.translate(CONTROL) if terminal else piece, nl=False)
    click.echo()


def _quietly(ask: Ask, turns: Iterable[str]) -> list[dict[str, Any]]:
    """All answers, as the JSON document has them."""
    answers = []
    for turn in turns:
        if turn.strip():
            generation = ask(turn)
            text = "".join(generation)
            answers.append(
                {
                    "prompt": turn,
                    "text": text,
                    "ids": generation.drawn,
                    "n_prompt": generation.prompt_tokens,
                    "n_prompt_read": generation.read_tokens,
                    "n_gen": generation.tokens,
                    "prefill_seconds": generation.prefill_seconds,
                    "decode_seconds": generation.decode_seconds,
                    "stop_reason": generation.stop_reason,
                }
            )
    return answers


def _statistics(generation: Generation) -> str:
    read, prefill = generation.read_tokens, generation.prefill_seconds
    # The first token comes with the prompt; the clock of decoding starts after it.
    decoded, seconds = generation.tokens - 1, generation.decode_seconds
    cached = generation.prompt_tokens - read
    prompt = f"{generation.prompt_tokens} prompt tokens" + (f" ({cached} of them in the cache)" if cached else "")
    peak = _peak()
    memory = "" if peak is None else f", peak memory {peak / 1e6:.0f} MB"
    return (
        f"[{prompt} at {read / prefill if prefill else 0:.1f} tok/s, {generation.tokens} tokens at "
        f"{decoded / seconds if seconds else 0:.1f} tok/s, stop: {generation.stop_reason}{memory}]"
    )


def _peak() -> int | None:
    from bench.measure.memory import peak_rss

    return peak_rss()


@contextlib.contextmanager
def _ctrl_c_stops(generation: Generation) -> Iterator[None]:
    """The first Ctrl-C ends the answer, a second one the program."""
    before = signal.getsignal(signal.SIGINT)

    def stop(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, before)
        generation.stop()

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _typed() -> Iterator[str]:
    """Lines of a terminal, until Ctrl-D; Ctrl-C drops the line."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives input() a history
    click.echo("Ctrl-C stops an answer, /reset starts anew, /exit or Ctrl-D leaves.", err=True)
    while True:
        try:
            line = input("> ")
            _check_text(line)
        except EOFError:
            click.echo(err=True)
            return
        except KeyboardInterrupt:
            click.echo(err=True)
            continue
        yield line


def _lines() -> Iterator[str]:
    """Lines of standard input that is no terminal."""
    for line in sys.stdin.buffer:
        yield _decoded(line).rstrip("\r\n")


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise UserError("standard input is not UTF-8 text: convert it first") from None


def _check_text(text: str | None) -> None:
    """Refuse bytes that the shell passed on although they are no text."""
    try:
        (text or "").encode("utf-8")
    except UnicodeEncodeError:
        raise UserError("the prompt is not UTF-8 text: convert it first") from None
