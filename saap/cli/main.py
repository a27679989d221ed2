"""The command line. Every heavy import lives inside the command that needs it, so that ``saap --help`` is instant."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import click

from saap.base.errors import UserError
from saap.base.interrupt import ask_to_end, end_in_time, end_requested
from saap.base.lazy import HOME, strangers
from saap.base.waiting import sleep_while_waiting
from saap.base.wording import installing
from saap.cli.console import shown
from saap.cli.types import LazyGroup

EXTRAS = {
    "torch": "prune", "transformers": "prune", "safetensors": "prune", "gguf": "prune",
    "accelerate": "prune",
    "onnx": "export", "onnx_ir": "export", "onnxruntime": "bench", "numpy": "bench", "scipy": "bench",
    "tokenizers": "bench", "jinja2": "bench", "matplotlib": "bench", "optimum": "optimum",
    "lm_eval": "tasks", "datasets": "tasks",
}  # fmt: skip

# docs/exit-codes.md has all of them.
MISTAKE, INTERRUPT, NO_READER = 2, 130, 141  # as a shell counts what SIGINT and SIGPIPE end
INTERRUPTED = "interrupted; run the same command again"
NO_ROOM, NO_WRITING = "make room there, or write elsewhere", "allow writing there, or write elsewhere"
NO_PLACE = "give another place"
PLACES = {
    errno.ENOSPC: NO_ROOM, errno.EDQUOT: NO_ROOM, errno.EFBIG: NO_ROOM,
    errno.EROFS: NO_WRITING, errno.EACCES: NO_WRITING, errno.EPERM: NO_WRITING,
    errno.EEXIST: NO_PLACE, errno.ENOTDIR: NO_PLACE, errno.EISDIR: NO_PLACE, errno.ENAMETOOLONG: NO_PLACE,
    errno.ELOOP: NO_PLACE, errno.EPIPE: "what reads it has ended",
    errno.EIO: "the disk may be failing: write elsewhere",
}  # fmt: skip


COMMANDS = {  # the module and the function of each, and what it is for; no module is imported to say so
    "run": ("run:run", "All of it: from a model to a measured bundle and a page."),
    "prune": ("prune:prune", "Remove the coupled structures that matter least."),
    "tune": ("tune:tune", "Quantize in groups and tune the groups."),
    "eval": ("eval:evaluate", "Perplexity, KL, top-1 agreement and zero-shot tasks."),
    "export": ("export:export", "Write a model as a bundle, or look into a bundle."),
    "generate": ("generate:generate", "Stream text from a bundle."),
    "bench": ("bench:bench", "Measure bundles and other runtimes, here or on boards."),
    "compare": ("compare:compare", "Is it faster or slower, better or worse than before?"),
    "devices": ("devices:devices", "Known devices and this host: what they are, what fits, what changed."),
    "cache": ("cache:cache", "Show what saap keeps between runs, or clear it."),
    "report": ("report:report", "One page from results, a run or a history."),
}


@click.group(
    cls=LazyGroup, modules=COMMANDS, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(package_name="saap")
def cli() -> None:
    """Prune a language model until it is as fast as you need on the device you have.

    \b
    One command, from a model to a measured bundle:
      saap run smollm2-135m -o out/demo --speedup 1.3
    """


def check_packages() -> None:
    """Put our packages before any ``bench``, ``export`` or ``devices`` on PYTHONPATH; refuse to run with another."""
    if strangers():
        sys.path.insert(0, str(HOME))
    for name, place in strangers().items():
        raise click.ClickException(
            f"the package {name!r} is {place}, not the one of saap in {HOME}: use a fresh virtual environment"
        )


def check_folder() -> None:
    try:
        Path.cwd()
    except OSError:
        raise UserError("the working directory is gone: change into one that is there") from None


def main() -> None:
    open_streams()
    sleep_while_waiting()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, ask_to_end)
        end_in_time(cut)
    try:
        invoke()
    except Exception:
        if not end_requested():
            raise
        fail(INTERRUPTED, INTERRUPT)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is done: the interpreter's own end would print a traceback
        drop_unwritten()


def cut() -> None:
    """Leave from inside a library's call: outputs appear whole or not at all, and a run continues."""
    with suppress(OSError):
        os.write(2, f"saap: {INTERRUPTED}\n".encode())
    os._exit(INTERRUPT)


def open_streams() -> None:
    """Make closed streams ``/dev/null``, lest an output gets their number; a letter that an encoding lacks is a ?."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def drop_unwritten() -> None:
    """Drop what a stream did not take: the interpreter would try it again at its end."""
    for number, stream in ((1, sys.__stdout__), (2, sys.__stderr__)):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)


def command() -> None:
    if "_SAAP_COMPLETE" in os.environ:  # a shell asks what may come next
        cli(prog_name="saap")
    with cli.make_context("saap", sys.argv[1:]) as context:  # click's own main gives a broken pipe the exit code 1
        cli.invoke(context)


def invoke() -> None:
    """Do what the arguments say: one line and exit code 2 for what is the user's to mend."""
    try:
        check_folder()
        check_packages()
        try:
            command()
        finally:
            sys.stdout.flush()
    except (click.exceptions.Abort, EOFError, KeyboardInterrupt):
        fail(INTERRUPTED, INTERRUPT)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        fail(mistake(error), MISTAKE)
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing not in EXTRAS:
            raise
        extra = installing(EXTRAS[missing])
        fail(f"this command needs {missing}, which is not installed: pip install {extra}", MISTAKE)
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):  # which rich makes an exit code of its own
            sys.exit(NO_READER)
        raise
    except OSError as error:
        tell_place(error)
    except Exception as error:
        code = getattr(error, "exit_code", None)
        if code is None:
            raise
        fail(str(error), code)


def mistake(error: click.ClickException) -> str:
    """Say click's complaint in one sentence, as all others are, and where help is."""
    near = getattr(error, "possibilities", None)
    message = error.message if near else error.format_message()
    message = message[:1].lower() + message[1:].rstrip(".")
    if near:
        message += f" (did you mean {' or '.join(near)}?)"
    context = error.ctx if isinstance(error, click.UsageError) else None
    return message if context is None else f"{message}; see {context.command_path} --help"


def tell_place(error: OSError) -> None:
    """Leave because of a place that cannot be written, or of a reader that wants no more; else raise it again."""
    place = error.filename2 or error.filename  # of a copy the second, which is being written
    if isinstance(error, BrokenPipeError) and place is None:
        sys.exit(NO_READER)
    if error.errno not in PLACES:
        raise error
    where = f"{place}: " if place else ""
    fail(f"{where}{error.strerror or error}: {PLACES[error.errno]}", MISTAKE)


def fail(message: str, code: int) -> None:
    """Say it in one line, where somebody listens, and leave."""
    with suppress(OSError):
        click.echo(f"saap: {shown(' '.join(message.split()))}", err=True)
    sys.exit(code)
