"""A number that no command can mean is refused at once, by the option's name and what is allowed."""

import time

import click
import pytest
from support.command_line import every_command, here

# Options that may be 0, as large as 10^9 or below 0, by their names in Python.
ZERO = {
    "depth", "generate", "held_out", "keep_layers",
    "learning_rate", "memory", "min_p", "most_gone", "patience", "prompt", "ratio_time_s",
    "recovered",
    "seconds", "seed", "skip", "spread", "stability", "teacher_weight", "temperature", "warmup",
}  # fmt: skip
HUGE = {
    "context", "max_bytes", "max_chunks", "max_examples", "max_params", "max_time_s", "max_tokens",
    "memory", "ms_per_token", "ratio_time_s", "seconds", "seed", "timeout_s", "tokens", "top_k",
}  # fmt: skip
NEGATIVE = {"stability"}
# Below 10^9, and yet more than anybody can mean.
TOO_MANY = {
    "rounds": 1001,
}  # fmt: skip


def numbers():
    """Every option of every command that holds numbers, with its command and the arguments that it must have."""
    for words, command in every_command():
        given = list(words)
        for part in command.params:
            if part.required and isinstance(part, click.Argument):
                given += ["nothing"] * abs(part.nargs)
            elif part.required:
                given += [part.opts[-1], "nothing"]
        for part in command.params:
            setting = getattr(part.type, "setting", None)
            if setting and is_number(setting):
                yield pytest.param([*given, part.opts[-1]], "", setting, id=f"{'-'.join(words)}{part.opts[-1]}")
            for name, setting in getattr(part.type, "settings", {}).items():
                if is_number(setting) and not setting.option.shown:
                    yield pytest.param([*given, "--set"], f"{name}=", setting, id=f"{'-'.join(words)}-{name}")


def is_number(setting):
    return not setting.choices and {setting.kind, setting.element} & {int, float}


@pytest.mark.parametrize(("command", "before", "setting"), numbers())
def test_a_number_out_of_range_is_refused_before_any_work(command, before, setting, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = setting.name
    wrong = [
        *(["-1"] if name not in NEGATIVE else []),
        "nan",
        "inf",
        "",
        *(["0"] if name not in ZERO else []),
        *(["10000000000"] if name not in HUGE else []),
        *([str(TOO_MANY[name])] if name in TOO_MANY else []),
    ]
    for value in wrong:
        began = time.process_time()
        told = here(*command, before + value, code=2).stderr
        assert setting.flag in told and len(told.strip().splitlines()) == 1, (value, told)
        assert time.process_time() - began < 1.5
    assert list(tmp_path.iterdir()) == []
