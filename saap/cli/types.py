"""Kinds of values on the command line."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import click

directory = click.Path(path_type=Path)


class LayerRange(click.ParamType):
    """Layers such as ``0-2,29``; ``none`` is None."""

    name = "layers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> frozenset[int] | None:
        """``0-2,29`` -> {0, 1, 2, 29}."""
        if isinstance(value, frozenset):
            return value
        if value == "none":
            return None
        layers: set[int] = set()
        try:
            for part in value.split(","):
                first, _, last = part.partition("-")
                layers.update(range(int(first), int(last or first) + 1))
        except ValueError:
            self.fail(f"{value!r} names no layers: write something like 0-2,29, or none", param, ctx)
        return frozenset(layers)


class CountOrAll(click.ParamType):
    """A number; ``all`` is None."""

    name = "count"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        """``160`` -> 160."""
        if value == "all":
            return None
        try:
            return int(value)
        except ValueError:
            self.fail(f"{value!r} is no number: write something like 160, or all", param, ctx)


class Counts(click.ParamType):
    """One number or a sweep, such as ``128,512``."""

    name = "counts"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """``128,512`` -> (128, 512)."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(int(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is no number and no list of them: write something like 128 or 128,512", param, ctx)


class PromptAndGenerated(Counts):
    """llama-bench's pair, such as ``512,128``."""

    name = "pp,tg"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """``512,128`` -> (512, 128)."""
        pair = super().convert(value, param, ctx)
        if len(pair) != 2:
            self.fail(f"{value!r} is no pair: write prompt and generated tokens, such as 512,128", param, ctx)
        return pair


class Amount(click.ParamType):
    """A count that may end with a unit, such as ``80MB``."""

    def __init__(self, name: str, units: dict[str, int], example: str) -> None:
        self.name, self.units, self.example = name, units, example

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """``1.5G`` -> 1500000000; upper and lower case are alike."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", value.strip().replace("_", "").lower())
        if match is None or match[2] not in self.units:
            self.fail(f"{value!r} is no number of {self.name}: write something like {self.example}", param, ctx)
        return int(Fraction(match[1]) * self.units[match[2]])


BYTE_UNITS = {"": 1, "b": 1}
for power, letter in enumerate("kmgt", 1):
    BYTE_UNITS |= {letter: 1000**power, f"{letter}b": 1000**power, f"{letter}ib": 1024**power}
BYTES = Amount("bytes", BYTE_UNITS, "80MB, 80MiB or 1.5G")
PARAMETERS = Amount("parameters", {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}, "100M or 1.5B")


class InSection(click.Option):
    """An option that help shows under a heading of its own."""

    def __init__(self, *arguments: Any, section: str, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.section = section


class Sections(click.Command):
    """A command whose help has a section for each heading of its options."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The sections in the order of their first options; options without a heading come last."""
        sections: dict[str, list[tuple[str, str]]] = {}
        options = [param for param in self.get_params(ctx) if isinstance(param, click.Option)]
        for param in sorted(options, key=lambda option: not isinstance(option, InSection)):
            if record := param.get_help_record(ctx):
                sections.setdefault(getattr(param, "section", "Options"), []).append(record)
        for heading, rows in sections.items():
            with formatter.section(heading):
                formatter.write_dl(rows, col_max=36)
