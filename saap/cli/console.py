"""What a person sees: progress with the time left, errors of one line. Everything rich lives here."""

from __future__ import annotations

import io
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

import click

if TYPE_CHECKING:
    from saap.models.record import Counts, Kept

WIDTH, MOST_WIDE = 120, 60  # of a table where there is no terminal, and of a column
PLAIN_EVERY = 15.0  # seconds between two lines where there is no terminal


def speaks() -> bool:
    """Whether this process talks to the person; of those that ``accelerate launch`` started, the first does."""
    return int(os.environ.get("WORLD_SIZE", "1")) < 2 or os.environ.get("RANK", "0") == "0"


class Console:
    """Progress of one command: a bar with the time left on a terminal, plain lines elsewhere.

    Use as a context manager and pass :meth:`report` to the libraries as their ``progress``.
    """

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._bars: object | None = None
        self._task: object | None = None
        self._label = ""
        self._started = self._printed = self._first = 0.0
        self._finished = False

    def __enter__(self) -> Console:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop()

    @classmethod
    def of_command(cls) -> Console:
        """The console of the command that runs; it is closed with it."""
        return click.get_current_context().with_resource(cls())

    def report(self, label: str, done: float, total: float) -> None:
        """``done`` of ``total`` of what ``label`` names is finished; a new first word of a label starts a new bar."""
        if not speaks():
            return
        fresh = label.split(",")[0] != self._label.split(",")[0]
        if fresh:
            self._stop()
            self._started = self._printed = time.monotonic()
            self._first = done  # a run that was continued after a kill did not do these now
            self._finished = False
        self._label = label
        with suppress(OSError):  # nobody reads any more; the work goes on
            (self._bar if self._terminal else self._line)(label, done, total, fresh)

    def finish(self) -> None:
        """End the bar, so that what follows is printed below it."""
        self._stop()

    def say(self, text: str) -> None:
        self.finish()
        if speaks():
            with suppress(OSError):
                click.echo(shown(text), err=True)

    def say_text(self, purpose: str, source: str) -> None:
        """Which text a command works on."""
        self.say(f"  {purpose} text: {source}")

    def _bar(self, label: str, done: float, total: float, fresh: bool) -> None:
        from rich.console import Console as RichConsole
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        if fresh or self._bars is None:
            self._bars = Progress(
                TextColumn("  {task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
                TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=RichConsole(stderr=True),
            )  # fmt: skip
            self._bars.start()
            self._task = self._bars.add_task(label, total=total)
        self._bars.update(self._task, description=label, completed=done, total=total)  # type: ignore[attr-defined]

    def _line(self, label: str, done: float, total: float, fresh: bool) -> None:
        now = time.monotonic()
        whole = done >= total
        if self._finished or not (fresh or whole or now - self._printed >= PLAIN_EVERY):
            return
        self._printed, self._finished = now, whole
        spent = now - self._started
        fresh_done = done - self._first
        left = f", {spent / fresh_done * (total - done):.0f} s left" if fresh_done > 0 and done < total else ""
        click.echo(f"  {label}: {done:.0f}/{total:.0f}, {spent:.0f} s{left}", err=True)

    def _stop(self) -> None:
        if self._bars is not None:
            with suppress(OSError):
                self._bars.stop()  # type: ignore[attr-defined]
            self._bars = None
        self._label = ""


class _Unheard(io.TextIOBase):
    """A stream that takes all: what the one behind it does not take is lost."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    def isatty(self) -> bool:
        return self._stream.isatty()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()


@contextmanager
def heard_or_not() -> Iterator[None]:
    """Within the block a step's tables may be lost; the steps after it are done."""
    with redirect_stdout(_Unheard(sys.stdout)):
        yield


def shown(text: str) -> str:
    """Text without what would steer a terminal or turn its lines around: names come from files of others."""
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)


def print_table(title: str, columns: list[str], rows: list[list[str]], least: Sequence[str] = ()) -> None:
    """A table for people on standard output; columns of numbers stand on the right.

    Numbers do not break into lines: one in two pieces cannot be read. Where a terminal (or ``COLUMNS``) is too narrow,
    columns go in the order of ``least`` and are named below. Cells are shown as they are: brackets, such as those of an
    address of IPv6, are no markup.
    """
    from rich import box
    from rich.console import Console as RichConsole
    from rich.table import Table

    width = shutil.get_terminal_size((WIDTH, 0)).columns
    shown_columns = [_Column.of(name, [row[index] for row in rows]) for index, name in enumerate(columns)]
    left_out = []
    for name in least:
        if sum(column.width + 1 for column in shown_columns) < width:
            break
        left_out += [column.name for column in shown_columns if column.name == name]
        shown_columns = [column for column in shown_columns if column.name != name]
    table = Table(title=shown(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=0)
    for column in shown_columns:
        table.add_column(
            column.heading, justify="right" if column.numeric else "left", overflow="fold", no_wrap=column.numeric,
            max_width=MOST_WIDE,
        )  # fmt: skip
    for cells in zip(*(column.cells for column in shown_columns), strict=True):
        table.add_row(*map(shown, cells))
    console = RichConsole(width=width, markup=False, highlight=False)
    console.print(table)
    if left_out:
        console.print(f"  not shown at {width} columns: {', '.join(left_out)}")


@dataclass(frozen=True)
class _Column:
    name: str
    cells: list[str]
    numeric: bool

    @classmethod
    def of(cls, name: str, cells: list[str]) -> _Column:
        return cls(name, cells, all(cell == "-" or cell[:1].isdigit() for cell in cells))

    @property
    def heading(self) -> str:
        return self.name.replace(" ", "\n") if self.numeric else self.name  # in lines it keeps a column narrow

    @property
    def width(self) -> int:
        return min(MOST_WIDE, max(map(len, [*self.heading.split("\n"), *self.cells])))


def plan_chart(dense: Sequence[Counts], kept: Sequence[Kept]) -> str:
    """A small picture of a plan: per layer the KV groups, query heads and FFN channels that are left."""
    lines = ["layer  heads  kv  FFN kept"]
    for index, (sizes, layer) in enumerate(zip(dense, kept, strict=True)):
        share = len(layer["ffn"]) / sizes["ffn"] if sizes["ffn"] else 0.0
        bar = "█" * round(24 * share) + "·" * (24 - round(24 * share))
        heads = f"{len(layer['query_heads'])}/{sizes['query_heads']}"
        groups = f"{len(layer['kv_heads'])}/{sizes['kv_heads']}"
        lines.append(f"{index:>5} {heads:>6} {groups:>3}  {bar} {len(layer['ffn'])}")
    return "\n".join(lines)
