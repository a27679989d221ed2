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
from types import FrameType
from typing import TYPE_CHECKING

import click

from export.generate.options import GenerateOptions
from saap.base.errors import UserError
from saap.base.wording import counted
from saap.cli.console import Console
from saap.cli.options import OptionsCommand, options_of
from saap.cli.types import directory

if TYPE_CHECKING:
    from export.generate.chat import Conversation
    from export.generate.loop import Generation

HELP = "Ctrl-C stops an answer, /reset starts anew, /exit, /bye or Ctrl-D leaves."
CONTROL = dict.fromkeys([*range(9), 11, 12, *range(14, 32), *range(127, 160)])  # all but tab, newline and return

Ask = Callable[[str], "Generation"]


@click.command(cls=OptionsCommand)
@click.argument("bundle", type=directory)
@click.argument("prompt", required=False)
@options_of(GenerateOptions)
@click.option("--json", "as_json", is_flag=True, help="One document with texts, ids and times, for machines.")
def generate(bundle: Path, prompt: str | None, as_json: bool, options: GenerateOptions) -> None:
    """Stream text from a bundle; needs no torch.

    BUNDLE@llama.cpp runs in llama.cpp, BUNDLE@fastest in what is fastest on this device.
    Without a prompt it is a conversation: at a terminal, or with --chat one turn per line of standard input. A prompt
    of - is read from standard input.

    \b
    Example:
      saap generate out/demo/slim-int4 "Why is the sky blue?"
      saap generate out/demo/slim-int4 --system "Be brief." --temperature 0.7 --top-p 0.9
    """
    from export.generate.text import open_bundle

    interactive = prompt is None and sys.stdin.isatty()
    if prompt is None and not interactive and not options.chat:
        raise UserError("no prompt: give one, - to read it from standard input, or --chat to read one turn per line")
    if interactive and as_json:
        raise UserError("--json is no conversation at a terminal: give a prompt, or --chat and turns on standard input")
    text = prompt if prompt != "-" else _decoded(sys.stdin.buffer.read())
    opened = open_bundle(bundle, options, text, Console.of_command())
    if not as_json:
        turns = _typed() if interactive else _lines() if text is None else iter([text])
        _hold(opened.ask, opened.conversation if text is None else None, turns)
        return
    document = {
        "bundle": str(bundle),
        "bundle_sha256": opened.manifest.content_hash,
        "threads": opened.threads,
        "context": opened.context,
        "chat_template": opened.conversation is not None,
        "system": options.system,
        "sampling": asdict(opened.sampling),
        "turns": _quietly(opened.ask, _lines() if text is None else iter([text])),
        "peak_memory_bytes": _peak(),
    }
    readable = (sys.stdout.encoding or "").lower().startswith("utf")
    click.echo(json.dumps(document, indent=1, ensure_ascii=not readable))


def _hold(ask: Ask, talk: Conversation | None, turns: Iterable[str]) -> None:
    """Answer turn after turn; ``talk`` is None for a single prompt, where mistakes and Ctrl-C end the command."""
    interactive = sys.stdin.isatty()
    for turn in turns:
        command = turn.strip()
        if talk is not None and command in ("/exit", "/bye"):
            return
        if talk is not None and command == "/help":
            click.echo(HELP, err=True)
            continue
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
            except KeyboardInterrupt:  # before the answer has begun
                if talk is None or not interactive:
                    raise
                click.echo(err=True)
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


def _quietly(ask: Ask, turns: Iterable[str]) -> list[dict[str, object]]:
    """All answers, as the JSON document has them."""
    from export.generate.text import result_of

    answers = []
    for turn in turns:
        if turn.strip():
            generation = ask(turn)
            for _ in generation:
                pass
            answers.append(asdict(result_of(turn, generation)))
    return answers


def _statistics(generation: Generation) -> str:
    read, prefill = generation.read_tokens, generation.prefill_seconds
    # The first token comes with the prompt; the clock of decoding starts after it.
    decoded, seconds = generation.tokens - 1, generation.decode_seconds
    cached = generation.prompt_tokens - read
    prompt = counted(generation.prompt_tokens, "prompt token") + (f" ({cached} of them in the cache)" if cached else "")
    peak = _peak()
    memory = "" if peak is None else f", peak memory {peak / 1e6:.0f} MB"
    return (
        f"[{prompt} at {read / prefill if prefill else 0:.1f} tok/s, {counted(generation.tokens, 'token')} at "
        f"{decoded / seconds if seconds else 0:.1f} tok/s, stop: {generation.stop_reason}{memory}]"
    )


def _peak() -> int | None:
    from bench.measure.memory import peak_rss

    return peak_rss()


@contextlib.contextmanager
def _ctrl_c_stops(generation: Generation) -> Iterator[None]:
    """Let the first Ctrl-C end the answer, and a second one the program."""
    before = signal.getsignal(signal.SIGINT)

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, before)
        generation.stop()

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _typed() -> Iterator[str]:
    """Lines of a terminal, until Ctrl-D; Ctrl-C drops the line."""
    from export.generate.text import check_text

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives input() a history
    click.echo(HELP, err=True)
    while True:
        try:
            line = input("> ")
            check_text(line)
        except ValueError:  # a byte that a paste brought
            click.echo("[this is not UTF-8 text: type or paste it anew]", err=True)
            continue
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
