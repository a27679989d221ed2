"""Kinds of options and commands."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from saap.base.errors import UserError


def offered(names: Collection[str], incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def device_names() -> Collection[str]:
    from devices.profiles.profile import profile_names  # here, since help needs none of it

    return profile_names()


def complete_model(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Offer the packaged models, and files and directories."""
    from saap.models.packaged import PACKAGED  # here, since help needs none of it

    # First, since bash forgets at a file what was offered before.
    return [CompletionItem(incomplete, type="file"), *offered(PACKAGED, incomplete)]


class _Place(click.Path):
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            raise UserError(f"{param.opts[0] if param else 'a path'} is empty: give the name of a place")
        return super().convert(value, param, ctx)


directory = _Place(path_type=Path)


def _write_over(context: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        from saap.base.outputs import writing_over  # here, since help needs none of it

        context.with_resource(writing_over())


force = click.option(
    "--force", is_flag=True, expose_value=False, callback=_write_over,
    help="Write over what saap did not write. An input never.",
)  # fmt: skip


class FieldOption(click.Option):
    """An option under a heading of help, with old spellings that help and messages do not show."""

    def __init__(self, *arguments: Any, section: str, old: tuple[str, ...] = (), **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.section, self.old = section, old

    def add_to_parser(self, parser: click.parser._OptionParser, ctx: click.Context) -> None:
        shown = self.opts
        self.opts = [*shown, *self.old]
        super().add_to_parser(parser, ctx)
        self.opts = shown


class Helpful(click.Command):
    """A command whose mistakes know where help is."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            if isinstance(error, click.NoSuchOption):
                from saap.base.options import refuse_removed  # here, since help needs none of it

                refuse_removed(error.option_name)
            error.ctx = error.ctx or ctx
            raise


class Sections(Helpful):
    """A command whose help has a section for each heading of its options."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sections in the order of their first options; options without a heading come last."""
        sections: dict[str, list[tuple[str, str]]] = {}
        options = [param for param in self.get_params(ctx) if isinstance(param, click.Option)]
        for param in sorted(options, key=lambda option: not isinstance(option, FieldOption)):
            if record := param.get_help_record(ctx):
                sections.setdefault(getattr(param, "section", "Options"), []).append(record)
        for heading, rows in sections.items():
            with formatter.section(heading):
                formatter.write_dl(rows, col_max=36)


class LazyGroup(Helpful, click.Group):
    """Commands whose modules (``module:function``, with what it is for) are imported when they are asked for."""

    def __init__(self, *arguments: Any, modules: Mapping[str, tuple[str, str]], **attributes: Any) -> None:
        super().__init__(*arguments, **attributes)
        self.modules = modules

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing:
            click.echo(ctx.get_help(), err=True)
            ctx.exit(2)
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in self.modules and not ctx.resilient_parsing:
            *others, last = self.modules
            ctx.fail(f"no such command {args[0]!r}: give {', '.join(others)} or {last}")
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.modules)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.modules:
            return None
        module, _, name = self.modules[cmd_name][0].partition(":")
        command: click.Command = getattr(import_module(f"saap.cli.{module}"), name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, about) for name, (_, about) in self.modules.items()])
