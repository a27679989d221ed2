"""A number that no command can mean is refused at once, by the option's name and what is allowed."""

from __future__ import annotations

import time

import click
import pytest
from support.command_line import here

from saap.cli.main import cli

# Options that may be 0, or as large as 10^9, by their names in Python.
ZERO = {
    "cool_down_s", "corrections", "depth", "drop_layers", "generate", "keep_layers", "learning_rate", "memory", "min_p",
    "patience", "prompt", "rank", "ratio_time_s", "seed", "spread", "teacher_weight", "temperature",
}  # fmt: skip
HUGE = {
    "context", "cool_down_s", "max_bytes", "max_chunks", "max_examples", "max_params", "max_time_s", "max_tokens",
    "memory", "ms_per_token", "ratio_time_s", "seed", "timeout_s", "tokens", "top_k",
}  # fmt: skip


def commands(command, context, words=()):
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            yield from commands(command.get_command(context, name), context, (*words, name))
    else:
        yield words, command


def numbers():
    """Every option of every command that holds numbers, with its command and the arguments that it must have."""
    context = click.Context(cli)
    for words, command in commands(cli, context):
        given = list(words)
        for part in command.get_params(context):
            if part.required and isinstance(part, click.Argument):
                given += ["nothing"] * abs(part.nargs)
            elif part.required:
                given += [part.opts[-1], "nothing"]
        for part in command.get_params(context):
            setting = getattr(part.type, "setting", None)
            if setting and not setting.choices and {setting.kind, setting.element} & {int, float}:
                yield pytest.param(given, setting.name, part.opts[-1], id=f"{'-'.join(words)}{part.opts[-1]}")


@pytest.mark.parametrize(("command", "name", "flag"), numbers())
def test_a_number_out_of_range_is_refused_before_any_work(command, name, flag, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wrong = [
        "-1",
        "nan",
        "inf",
        "",
        *(["0"] if name not in ZERO else []),
        *(["10000000000"] if name not in HUGE else []),
    ]
    for value in wrong:
        began = time.process_time()
        told = here(*command, flag, value, code=2).stderr
        assert flag in told and len(told.strip().splitlines()) == 1, (value, told)
        assert time.process_time() - began < 1.5
    assert list(tmp_path.iterdir()) == []
