"""Click options made of an options dataclass.

    @click.command(cls=OptionsCommand)
    @click.argument("model")
    @options_of(PruneOptions)
    def prune(model: str, options: PruneOptions) -> None: ...

A flag wins over ``--set NAME=VALUE``. What a field says is
:class:`saap.base.options.Option`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from saap.base.errors import UserError
from saap.base.options import TYPED, Setting, assigned, build, settings_of
from saap.cli.types import FieldOption, Sections, offered

if TYPE_CHECKING:
    ValueType = click.ParamType[object]
else:
    ValueType = click.ParamType  # generic in click's types only

T = TypeVar("T")


class OptionsCommand(Sections):
    """A command that says for an option without a flag how it is set."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        words = args[: args.index("--")] if "--" in args else args
        for option in self.params:
            on, off = (next((w for w in words if w in flags), "") for flags in (option.opts, option.secondary_opts))
            if on and off:
                raise UserError(f"{on} and {off} contradict each other: give one of them")
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            name = error.option_name.lstrip("-").replace("-", "_")
            if not any(name in option.type.settings for option in self.params if isinstance(option.type, _Assignment)):
                raise
            raise UserError(
                f"{error.option_name} is not a flag: write --set {name}=VALUE, or leave it at its default"
            ) from None


class _Value(ValueType):
    """Text for a setting; a mistake is one line that says what is allowed."""

    def __init__(self, setting: Setting) -> None:
        self.name, self.setting = setting.name, setting

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> object:
        if not isinstance(value, str):
            return value
        try:
            return self.setting.read(value)
        except ValueError as error:
            raise UserError(f"{self.setting.flag} {error}") from None

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        if self.setting.option.names is not None:
            return offered(self.setting.option.names(), incomplete)
        if self.setting.kind is Path:
            return [CompletionItem(incomplete, type="file")]
        return offered([str(choice) for choice in self.setting.choices], incomplete)


class _Assignment(ValueType):
    """``NAME=VALUE``."""

    name = "assignment"

    def __init__(self, settings: Mapping[str, Setting]) -> None:
        self.settings = settings

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> object:
        return assigned(self.settings, value) if isinstance(value, str) else value


def options_of(kind: type) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Return a decorator that adds the flags of an options dataclass; the function gets it as ``options``."""
    settings = settings_of(kind)

    def decorate(function: Callable[..., T]) -> Callable[..., T]:
        @functools.wraps(function)
        def command(*arguments: object, set_: list[tuple[str, object]], **values: object) -> T:
            context = click.get_current_context()
            typed = dict(set_)
            for name in settings.keys() & values.keys():
                value = values.pop(name)
                if context.get_parameter_source(name) is not ParameterSource.DEFAULT:
                    typed[name] = value
            reset = TYPED.set({(settings[name].owner, name) for name in typed})
            try:
                return function(*arguments, options=build(kind, typed), **values)
            finally:
                TYPED.reset(reset)

        decorated: Callable[..., T] = command
        for option in reversed([*map(_flag, filter(lambda s: s.option.shown, settings.values())), *_more(settings)]):
            decorated = option(decorated)
        return decorated

    return decorate


def _flag(setting: Setting) -> Callable[[Callable[..., T]], Callable[..., T]]:
    option = setting.option
    about: dict[str, object] = {"section": option.section, "old": option.old, "hidden": option.hidden}
    if setting.kind is bool:
        pair = any("/" in flag for flag in setting.flags)
        about |= {"default": None} if pair else {"is_flag": True, "flag_value": not setting.default, "default": None}
        shown = setting.name.replace("_", "-") if pair and setting.default else ""
    else:
        about |= {"type": _Value(setting), "metavar": setting.metavar, "multiple": setting.repeated}
        about["required"] = setting.default is MISSING
        shown = default_of(setting)
    about["help"] = option.help + (f" [default: {shown}]" if shown else "")
    return click.option(*setting.flags, setting.name, cls=FieldOption, **about)


def default_of(setting: Setting) -> str:
    """Return the default as help shows it; nothing where it is None, False or empty."""
    value = setting.default
    if value is MISSING or value in (None, "", (), frozenset()) or value == 0:  # False is 0
        return ""
    if isinstance(value, tuple | frozenset):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _more(settings: Mapping[str, Setting]) -> list[Callable[[Callable[..., T]], Callable[..., T]]]:
    def show_all(context: click.Context, param: click.Parameter, value: bool) -> None:
        if value and not context.resilient_parsing:
            click.echo(help_all(context, settings))
            context.exit()

    return [
        click.option(
            "--set", "set_", type=_Assignment(settings), multiple=True,
            metavar="NAME=VALUE", help="Set an option by its name; --help-all lists them.",
        ),
        click.option(
            "--help-all", is_flag=True, is_eager=True, expose_value=False,
            callback=show_all, help="Every option with its meaning and default.",
        ),
    ]  # fmt: skip


def help_all(context: click.Context, settings: Mapping[str, Setting]) -> str:
    """Every setting: its flag or its name, meaning, values and default."""
    formatter = context.make_formatter()
    formatter.write_usage(context.command_path, "[OPTIONS] ...")
    formatter.write_paragraph()
    formatter.write_text("Options with dashes are flags; all names can be set by --set NAME=VALUE.")
    sections: dict[str, list[tuple[str, str]]] = {}
    for setting in settings.values():
        left = ", ".join(setting.flags) if setting.option.shown else setting.name
        values = f"[{'|'.join(map(str, setting.choices))}]" if setting.choices else setting.metavar
        if setting.kind is not bool or not setting.option.shown:
            left += f" {values}" if setting.option.shown else f"={values}"
        shown = default_of(setting) or ("required" if setting.default is MISSING else str(setting.default).lower())
        shown = "" if "default:" in setting.option.help else f" [default: {shown}]"
        sections.setdefault(setting.option.section, []).append((left, setting.option.help + shown))
    for heading, rows in sections.items():
        with formatter.section(heading):
            formatter.write_dl(rows)
    return formatter.getvalue().rstrip("\n")
