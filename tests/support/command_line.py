"""The command line in this process or in one of its own, and the one line that a mistake gets."""

import contextlib
import io
import os
import subprocess
import sys
from types import SimpleNamespace

import click

from saap.cli import main as cli


def here(*arguments, code=0):
    """The command in this process, which spares the import of torch."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["saap", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                cli.invoke()
                status = 0
            except SystemExit as stop:
                status = stop.code or 0
    finally:
        sys.argv = before
    assert code in (status, None), f"exit {status}\n{out.getvalue()}\n{err.getvalue()}"
    return SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue(), code=status)


def saap(*arguments, env=None, code=0, **kwargs):
    done = subprocess.run(
        [sys.executable, "-m", "saap.cli", *map(str, arguments)], capture_output=True, text=True, check=False,
        env={**os.environ, "COLUMNS": "160", **(env or {})}, **kwargs,
    )  # fmt: skip
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def refused(*arguments, call=here, **kwargs):
    """The one line that a mistake gets."""
    return last_line(call(*arguments, code=2, **kwargs))


def last_line(done):
    """The line that tells of the mistake, below those of progress."""
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("  ")]
    return lines[-1]


def every_command(words=(), command=cli.cli):
    """All commands and groups of them, with the words of each."""
    context = click.Context(command)
    yield words, command
    for name in command.list_commands(context) if isinstance(command, click.Group) else ():
        yield from every_command((*words, name), command.get_command(context, name))


def prune_words(model, out, text, *options):
    """``saap prune`` of a tiny model on a little of a text."""
    little = ["--calibration", text, "--sequences", "8", "--length", "16"]
    return ["prune", model, "-o", out, *little, *options]
