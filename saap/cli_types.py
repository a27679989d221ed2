"""Kinds of values on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

directory = click.Path(path_type=Path)


class LayerRange(click.ParamType):
    """Layers such as ``0-2,29``."""

    name = "layers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> frozenset[int]:
        """``0-2,29`` -> {0, 1, 2, 29}."""
        if isinstance(value, frozenset):
            return value
        layers: set[int] = set()
        try:
            for part in value.split(","):
                first, _, last = part.partition("-")
                layers.update(range(int(first), int(last or first) + 1))
        except ValueError:
            self.fail(f"{value!r} names no layers: write something like 0-2,29", param, ctx)
        return frozenset(layers)


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
