"""A model's chat template, rendered by a process of its own: a template is a program, and somebody else wrote it.

Jinja's sandbox keeps it from files and from Python's objects. It does not keep ``{{ "x" * 10**9 }}`` from taking all
memory, nor a loop from running for hours: that is what the process and its limits are for. This file is both sides; as
a program it needs Jinja alone.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import select
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import IO, Any

MEMORY = 300 << 20  # bytes of address space
CPU_S = 1.5  # of one conversation
WAIT_S = 60.0  # for an answer, however busy the host is
MOST_TEXT = 16 << 20  # characters of a conversation


class TemplateError(Exception):
    """The template refuses the conversation, or took more than it may; the message is one line."""


class ChatTemplate:
    """Renders conversations as ``apply_chat_template`` of transformers does (the same sandbox and helpers).

    The process starts with the first conversation, or by :meth:`start`, and ends with this object.

    Args:
        source: of the template, in Jinja.
        special_tokens: what the template sees beside the conversation: ``bos_token``, ``eos_token``, ...
    """

    def __init__(self, source: str, special_tokens: Mapping[str, object]) -> None:
        self._source, self._special_tokens = source, dict(special_tokens)
        self._mark = secrets.token_hex(16)
        self._process: subprocess.Popen[bytes] | None = None

    def render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = False) -> str:
        """Return the conversation as text.

        Raises:
            TemplateError: it refuses the conversation, or takes more time or memory than it may.
        """
        return self._answer(messages, add_generation_prompt).replace(self._mark, "")

    def render_marked(self, messages: Sequence[Mapping[str, str]]) -> tuple[str, list[tuple[int, int]]]:
        """Return the conversation, and the first character and the end of each part that ``{% generation %}`` marks.

        Raises:
            TemplateError: as above.
        """
        parts = self._answer(messages, False).split(self._mark)
        ends = [0]
        for part in parts:
            ends.append(ends[-1] + len(part))
        return "".join(parts), list(zip(ends[1::2], ends[2::2], strict=False))

    def _answer(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
        self.start()
        assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        job = {"messages": [dict(turn) for turn in messages], "add_generation_prompt": add_generation_prompt}
        try:
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()
            answer = json.loads(_line(self._process.stdout))
        except (OSError, ValueError):
            _end(self._process)
            raise TemplateError(f"it takes more than {CPU_S:g} s or {MEMORY >> 20} MiB") from None
        except BaseException:  # Ctrl-C: an answer that is still to come would be taken for the next one's
            _end(self._process)
            raise
        if "error" in answer:
            raise TemplateError(answer["error"])
        return str(answer["text"])

    def start(self) -> None:
        """Start the process, unless it runs: a caller that has something else to do first may do it meanwhile."""
        if self._process is not None and self._process.poll() is None:
            return
        self._process = process = subprocess.Popen(
            [sys.executable, "-I", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            start_new_session=True,  # a terminal's Ctrl-C is ours to act on
        )  # fmt: skip
        weakref.finalize(self, _end, process)
        assert process.stdin is not None
        template = {"source": self._source, "special_tokens": self._special_tokens, "mark": self._mark}
        with contextlib.suppress(OSError):  # it has ended already, which its first answer tells
            process.stdin.write(json.dumps(template).encode() + b"\n")
            process.stdin.flush()


def _line(pipe: IO[bytes]) -> bytes:
    """One line within the time that a busy host may take, and no longer one than is allowed."""
    line, until = b"", time.monotonic() + WAIT_S
    while not line.endswith(b"\n"):
        if not select.select([pipe], [], [], max(0.0, until - time.monotonic()))[0]:
            raise ValueError("no answer")
        piece = pipe.read1(1 << 20)  # type: ignore[attr-defined]  # a BufferedReader
        line += piece
        if not piece or len(line) > 8 * MOST_TEXT:
            raise ValueError("the process ended, or does not end its answer")
    return line


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


# -- the process ----------------------------------------------------------------------------------------------------


def _main() -> None:
    first = json.loads(sys.stdin.readline())
    _limit()
    template: Any = None
    for line in sys.stdin:
        _count_anew()
        job = json.loads(line)
        try:
            template = template or _compiled(first["source"], first["mark"])
            text = template.render(
                messages=job["messages"],
                tools=None,
                documents=None,
                add_generation_prompt=job["add_generation_prompt"],
                **first["special_tokens"],
            )
            if len(text) > MOST_TEXT:
                raise ValueError(f"it writes more than {MOST_TEXT >> 20} million characters")
            answer = {"text": text}
        except MemoryError:
            template, answer = None, {"error": f"it takes more than {MEMORY >> 20} MiB"}
        except Exception as error:  # whatever a template raises: Jinja's errors, TypeError, its own
            answer = {"error": (str(error).strip().splitlines() or [type(error).__name__])[0][:500]}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _limit() -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    import jinja2.sandbox  # noqa: F401  # before the limit holds

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _count_anew() -> None:
    """End this process, wherever it is, when one conversation has taken its time."""
    import signal

    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, CPU_S)


def _compiled(source: str, mark: str) -> Any:
    """Compile a template with the helpers that transformers gives to chat templates."""
    from datetime import datetime
    from typing import NoReturn

    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}``: the assistant's text, between two marks."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            marks = nodes.Output([nodes.TemplateData(mark)]), nodes.Output([nodes.TemplateData(mark)])
            return nodes.Scope([marks[0], *body, marks[1]]).set_lineno(line)

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: Any = False
    ) -> str:
        # Jinja's own filter escapes < and >, which a prompt must keep.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)


if __name__ == "__main__":
    _main()
