"""The terminal: progress with the time left, tables, errors of one line. Everything that uses rich is here."""

from __future__ import annotations

import math
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, TextIO, cast

import click

from saap.base.progress import Label

if TYPE_CHECKING:
    from rich.progress import Progress

    from saap.models.record import Counts, Kept

WIDTH, MOST_WIDE = 120, 60  # of a table where there is no terminal, and of a column
BAR = 24
LOADING = "loading PyTorch and the model"
PLAIN_EVERY = 15.0  # seconds between two lines where there is no terminal


def speaks() -> bool:
    """Whether this process talks to the person; of those that ``accelerate launch`` started, the first does."""
    return int(os.environ.get("WORLD_SIZE", "1")) < 2 or os.environ.get("RANK", "0") == "0"


class Console:
    """Progress of one command: a bar with the time left on a terminal, plain lines elsewhere.

    Use as a context manager and pass it to the libraries as their ``progress``.
    """

    def __init__(self) -> None:
        self._stream = sys.stderr  # where libraries are silenced, progress is still shown
        self._terminal = self._stream.isatty()
        self._bars: Progress | None = None
        self._label = Label("")
        self._started = self._printed = self._first = 0.0
        self._finished = False

    def __enter__(self) -> Console:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.finish()

    @classmethod
    def of_command(cls) -> Console:
        """Return the console of the command that runs; it is closed with it."""
        return click.get_current_context().with_resource(cls())

    def report(self, label: str, done: float, total: float) -> None:
        """``done`` of ``total`` of what ``label`` names is finished; a label that begins otherwise starts a new bar.

        A total of 0 is not known: a terminal then shows how long it has taken, and no line is printed elsewhere.
        """
        if not speaks():
            return
        parsed, finished = Label.of(label), 0 < total <= done
        fresh = parsed.what != self._label.what or (self._finished and not finished)
        if fresh:
            self.finish()
            self._started = self._printed = time.monotonic()
            self._first = done  # a run that was continued after a kill did not do these now
        if self._finished and not fresh:
            return
        self._label, self._finished = parsed, finished
        with suppress(OSError):  # nobody reads any more; the work goes on
            (self._bar if self._terminal else self._line)(parsed, done, total, fresh)

    __call__ = report

    def note(self, text: str) -> None:
        """Print a sentence of a library's, indented as its progress is."""
        self.say(f"  {text}")

    def finish(self) -> None:
        """End the bar, so that what follows is printed below it."""
        self._end_bar()
        self._label, self._finished = Label(""), False

    def say(self, text: str) -> None:
        self.finish()
        if speaks():
            with suppress(OSError):
                tell(text, self._stream)

    def _bar(self, label: Label, done: float, total: float, fresh: bool) -> None:
        if fresh or self._bars is None:
            self._bars = progress_bar(self._stream)
            self._bars.add_task(label.shown, total=total or None, unit=label.unit, until=None)
            self._bars.start()
        (task,) = self._bars.task_ids
        left = self._left(done, total)
        until = None if left is None else time.monotonic() + left
        self._bars.update(
            task, description=label.shown, completed=done, total=total or None, unit=label.unit, until=until
        )
        if self._finished:
            self._end_bar()

    def _line(self, label: Label, done: float, total: float, fresh: bool) -> None:
        now = time.monotonic()
        if not total or not (fresh or self._finished or now - self._printed >= PLAIN_EVERY):
            return
        self._printed = now
        left = self._left(done, total)
        ending = "" if left is None else f", {left:.0f} s left"
        count = f"{done:.0f}/{total:.0f} {label.unit}".rstrip()
        tell(f"  {label.shown}: {count}, {now - self._started:.0f} s{ending}", self._stream)

    def _left(self, done: float, total: float) -> float | None:
        """Seconds until all is done, at the speed so far; None where that is not known."""
        fresh = done - self._first
        return (time.monotonic() - self._started) / fresh * (total - done) if fresh > 0 and done < total else None

    def _end_bar(self) -> None:
        if self._bars is not None:
            self._bars.live.transient = self._bars.tasks[0].total is None  # a line that says nothing need not stay
            with suppress(OSError):
                self._bars.stop()
            self._bars = None


def progress_bar(stream: TextIO) -> Progress:
    """Return a bar that fits the screen: label, bar, done of total, time taken and time left."""
    from rich.console import Console as RichConsole
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TimeElapsedColumn
    from rich.table import Column
    from rich.text import Text

    class What(ProgressColumn):
        """Shortened where the screen is too narrow for all columns, which only a column without ``no_wrap`` is."""

        def render(self, task: Task) -> Text:
            return Text(f"  {task.description}", no_wrap=True, overflow="ellipsis")

    class Count(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text("" if task.total is None else f"{task.completed:.0f}/{task.total:.0f} {task.fields['unit']}")

    class Left(ProgressColumn):
        def render(self, task: Task) -> Text:
            until = task.fields["until"]
            left = 0.0 if until is None else until - time.monotonic()
            return Text(f"{_clock(math.ceil(left))} left" if left > 0 else "")  # what takes longer is not "0 s left"

    return Progress(
        What(), BarColumn(None, table_column=Column(max_width=BAR)), Count(Column(no_wrap=True)),
        TimeElapsedColumn(Column(no_wrap=True)), Left(Column(no_wrap=True)), console=RichConsole(file=stream),
    )  # fmt: skip


def _clock(seconds: int) -> str:
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


class _Unheard:
    """A stream that takes all: what the one behind it does not take is lost."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    buffer = None  # whoever writes bytes would write past this

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()


@contextmanager
def heard_or_not() -> Iterator[None]:
    """Let a step's tables be lost inside the block, so that the steps after it are done."""
    with redirect_stdout(cast("TextIO", _Unheard(sys.stdout))):
        yield


def tell(text: str, stream: TextIO | None = None, otherwise: int = 0) -> None:
    """Print sentences on standard output, or a stream, in lines as long as ``COLUMNS`` or the terminal allows.

    ``otherwise``: the width where neither says one; 0: each sentence stays a line.
    """
    width = shutil.get_terminal_size((otherwise, 0)).columns
    lines = shown(text).split("\n")
    if width:
        lines = [part for line in lines for part in _wrapped(line, width)]
    click.echo("\n".join(lines), stream)


def _wrapped(line: str, width: int) -> list[str]:
    indent = line[: len(line) - len(line.lstrip())]
    if len(line) <= width:
        return [line]
    return textwrap.wrap(
        line, width, subsequent_indent=f"{indent}  ", break_on_hyphens=False, break_long_words=False,
        replace_whitespace=False, drop_whitespace=True,
    )  # fmt: skip


def shown(text: str) -> str:
    """Text without what would steer a terminal or turn its lines around: names come from files of others."""
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)


def print_table(title: str, columns: list[str], rows: list[list[str]], least: Sequence[str] = ()) -> None:
    """Print a table for people on standard output; columns of numbers are aligned on the right.

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
        cells = [shown(cell) for cell in cells]
        return cls(name, cells, all(cell == "-" or cell[:1].isdigit() for cell in cells))

    @property
    def heading(self) -> str:
        return self.name.replace(" ", "\n") if self.numeric else self.name  # in lines it keeps a column narrow

    @property
    def width(self) -> int:
        return min(MOST_WIDE, max(map(len, [*self.heading.split("\n"), *self.cells])))


def plan_chart(dense: Sequence[Counts], kept: Sequence[Kept]) -> str:
    """Draw a small picture of a plan: per layer what is left of KV groups, query heads and the FFN.

    Where a layer has a convolution or a delta net instead of attention, its channels or key heads.
    """
    wide, narrow = (9, 5) if any(sizes.get("conv") or sizes.get("delta") for sizes in dense) else (6, 3)
    lines = [f"layer {'heads':>{wide}} {'kv':>{narrow}}  FFN kept"]
    for index, (sizes, layer) in enumerate(zip(dense, kept, strict=True)):
        share = len(layer["ffn"]) / sizes["ffn"] if sizes["ffn"] else 0.0
        bar = "█" * round(24 * share) + "·" * (24 - round(24 * share))
        heads = f"{len(layer['query_heads'])}/{sizes['query_heads']}"
        groups = f"{len(layer['kv_heads'])}/{sizes['kv_heads']}"
        if channels := sizes.get("conv"):
            heads, groups = f"{len(layer.get('conv', []))}/{channels}", "conv"
        if key_heads := sizes.get("delta"):
            heads, groups = f"{len(layer.get('delta', []))}/{key_heads}", "delta"
        lines.append(f"{index:>5} {heads:>{wide}} {groups:>{narrow}}  {bar} {len(layer['ffn'])}")
    return "\n".join(lines)
