"""``saap bench``: measure here or on a board, print and keep the result."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import click

from bench.measure.options import BenchOptions
from bench.remote.options import BoardOptions
from saap.base.errors import UserError
from saap.base.options import Option, refuse_unused
from saap.cli.console import Console, print_table, tell
from saap.cli.options import OptionsCommand, options_of
from saap.cli.types import directory, force

if TYPE_CHECKING:
    from bench.measure.result import Result

STDOUT = Path("-")
NOTHING_MEASURED = 3


@dataclass(frozen=True)
class BenchCommand:
    """The options of ``saap bench``: which models, where, and which outputs."""

    options: BenchOptions = field(default_factory=BenchOptions)
    noise_floor: Annotated[bool, Option("Measure A against itself too: what a ratio must exceed.")] = False
    on: Annotated[
        tuple[str, ...],
        Option(
            "A board: ssh://user@host[:port], adb://[serial], labgrid://PLACE.",
            metavar="URL",
        ),
    ] = ()
    board: BoardOptions = field(default_factory=BoardOptions)
    history: Annotated[Path | None, Option("A folder that keeps this result, for the report's history.")] = None
    wide: Annotated[bool, Option("Print a second table: loads, single steps, and where the memory is.")] = False
    form: Annotated[Literal["md"] | None, Option("Print this instead of tables.", flags=("--format",))] = None

    def check(self) -> None:
        if len(self.on) > 1:
            raise UserError(
                "--on takes one board: run the command once for each, such as "
                "`for board in pi jetson; do saap bench BUNDLE --on ssh://$board --json $board.json; done`"
            )
        self.board.check(on_a_board=bool(self.on))
        check_ending(self, self.options.repetitions)

    @property
    def board_url(self) -> str | None:
        """The board's URL; None for this host."""
        return next(iter(self.on), None)

    def specs(self, specs: Sequence[str]) -> list[str]:
        """Return the models to measure; the first one twice where the noise floor is asked for."""
        return [*specs, *specs[: int(self.noise_floor)]]


def check_ending(options: object, repetitions: int | None) -> None:
    """Refuse what says when to stop repeating where the number of repetitions is given."""
    if repetitions is not None:
        refuse_unused(options, ("precision", "max_time_s"), "an open number of runs", "leave --repetitions out")


def check_turns(options: object, plan: BenchOptions) -> None:
    """Refuse what says when to stop repeating where several models take turns, whose ratio is known by these."""
    if plan.adaptive and plan.turns_s > 0:
        turns = "one model, and turns tell the ratio of several"
        refuse_unused(options, ("precision",), turns, "give --ratio-time 0")
        if plan.ratio_time_s is not None:
            refuse_unused(options, ("max_time_s",), f"{turns} within --ratio-time")


@click.command(cls=OptionsCommand)
@click.argument("specs", nargs=-1, required=True, metavar="A [B ...]")
@options_of(BenchCommand)
@click.option("--json", "json_path", type=directory, help="Write the result here, raw samples included; - prints it.")
@force
def bench(specs: tuple[str, ...], json_path: Path | None, options: BenchCommand) -> None:
    """Measure bundles and other runtimes, interleaved, each run in a fresh process.

    A is a bundle, BUNDLE@llama.cpp, BUNDLE@fastest, torch:DIR, llama.cpp:FILE.gguf, genai:DIR or
    optimum:DIR. Peers need their packages, here or in the Python that SAAP_PEER_PYTHON names. Lengths and threads may
    be lists: -p 128,512 -d 0,1024 -t 1,2.

    \b
    Example:
      saap bench out/demo/dense-int4 out/demo/slim-int4 --threads 1 --json result.json
      saap bench out/demo/dense-int4 llama.cpp:smollm2-q4_0.gguf
      saap bench out/demo/slim-int4 --on ssh://pi@board
    """
    from bench.measure import measure
    from bench.measure.result import RESULT
    from bench.remote.target import target
    from saap.base.interrupt import ended_as_by_a_person
    from saap.base.outputs import RESULT as OF_BENCH
    from saap.base.outputs import check_folder, check_place

    options.check()
    check_place(json_path, OF_BENCH, *specs)
    if options.history is not None:
        check_folder(options.history, OF_BENCH, "--history")
    if len(options.specs(specs)) == 1:
        refuse_unused(options, ("ratio_time_s",), "the ratio of two models or more", "give another")
    else:
        check_turns(options, options.options)
    plan = options.options
    with Console() as console, ended_as_by_a_person():
        if options.board_url is None:
            verify_models(specs)
            result = measure(options.specs(specs), plan, progress=console)
        else:
            board = target(options.board_url, options.board, console.say)
            result = board.bench(options.specs(specs), plan, progress=console.report)
    try:
        keep(result, json_path, options.history)  # first: a terminal may be gone
    finally:  # as may the room for a file
        _show(result, options)
    if json_path == STDOUT:
        click.echo(RESULT.text(result, indent=None))
    sys.exit(0 if any(m.samples for m in result.measurements) else NOTHING_MEASURED)


def _show(result: Result, command: BenchCommand) -> None:
    from bench.report.tables import detail_table, main_table, markdown

    if command.form:
        tables = [main_table(result), *([detail_table(result)] if command.wide else [])]
        click.echo("\n".join(map(markdown, tables)), nl=False)
        show_reasons(result, to_stderr=True)
    else:
        show_result(result, command.noise_floor, command.wide)


def verify_models(specs: Sequence[str]) -> None:
    """Hold the files of directories for torch against their hashes: within a run that would count as loading."""
    from saap.models.integrity import check_directory

    for spec in specs:
        if spec.startswith("torch:"):
            check_directory(spec.removeprefix("torch:"))


def keep(result: Result, json_path: Path | None, history: Path | None = None) -> None:
    """Write the files that are asked for."""
    from bench.measure.result import write_result

    try:
        if history is not None:
            from bench.report.history import add

            add(history, result)
    finally:
        if json_path not in (None, STDOUT):
            write_result(json_path, result)


def show_result(result: Result, noise_floor: bool = False, wide: bool = False) -> None:
    """Print sentences and tables of a bench result, the reasons behind a status, and each spec against the first."""
    from bench.report.sentences import sentences
    from bench.report.tables import LEAST, detail_table, energy_notes, main_table, peer_notes

    counts = sorted({len(m.samples) for m in result.measurements})
    first = result.measurements[0]
    several = len({m.key[1:4] for m in result.measurements}) > 1
    what = "" if several else f"{first.test}, "
    for sentence in sentences(result):
        tell(sentence)
    tables = [(main_table(result), f"{what}{of_runs(counts)}"), *([(detail_table(result), "")] if wide else [])]
    for table, title in tables:
        print_table(title, table.header, table.rows, LEAST)
    for note in (*peer_notes(result), *energy_notes(result)):
        tell(f"  {note}")
    show_reasons(result)
    names = list(dict.fromkeys(m.name for m in result.measurements))
    floor = _noise_floor(result, names) if noise_floor else None
    for other in names[1:]:
        _show_against(result, names[0], other, floor)


def of_runs(counts: Sequence[int]) -> str:
    """Name the runs of a table of medians; ``counts`` are the runs of its rows, in order."""
    if counts[-1] == 1:
        return "1 run"
    return f"medians of {'-'.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} interleaved runs"


def show_reasons(*results: Result, to_stderr: bool = False) -> None:
    """Print why measurements are WARN or INVALID, and the last lines of workers that failed.

    A reason that several results give, with other numbers or not, is printed once with their count.
    """
    measurements, stream = [m for result in results for m in result.measurements], sys.stderr if to_stderr else None
    reasons: dict[tuple[str, ...], list[str]] = {}
    for m in measurements:
        for reason in m.reasons:
            reasons.setdefault((m.name, m.test, m.status, re.sub(r"\d", "", reason)), []).append(reason)
    for (name, test, status, _), some in reasons.items():
        count = f", in {len(some)} of {len(results)} runs" if len(results) > 1 else ""
        tell(f"  {name}, {test}: {status}: {some[0]}{count}", stream)
    for line in (line for m in measurements for line in m.stderr[:-1]):
        tell(f"    | {line}", stream)


def _show_against(result: Result, base: str, other: str, floor: float | None) -> None:
    from bench.judge.comparison import DECODE, compare_within
    from bench.judge.wording import threads

    for row in compare_within(result, base, other).rows:
        if row.ratio is None or not row.low or not row.high:
            tell(f"  {other}, {row.setting}: not comparable with {base}: {row.reason}")
            continue
        speed = f"{1 / row.ratio:.3f}x as fast as {base} (95 %: {1 / row.high:.3f} to {1 / row.low:.3f})"
        within = floor is not None and abs(row.ratio - 1) <= floor
        verdict = "within the noise floor" if within else row.reason or row.verdict
        if row.what == DECODE and (longer := _longer(result, base, other)) != 1:
            speed += f", {1 / row.ratio / longer:.3f}x per character"
        tell(f"  {other}, {row.setting}, {threads(row.n_threads)}: {row.what} {speed}: {verdict}")
    _show_turns(result, base, other)


def _longer(result: Result, base: str, other: str) -> float:
    """Return the ratio of two models' tokens for the same text; 1 where it is not known."""
    spellings = [next(result.of(name)).model.spelling for name in (base, other)]
    known = [each.characters_per_token for each in spellings if each]
    return known[0] / known[1] if len(known) == len(spellings) else 1.0


def _show_turns(result: Result, base: str, other: str) -> None:
    """Prefill's ratio, where decode's is what they are compared by, and why there are no turns."""
    from bench.judge.wording import threads

    bases = {m.key[1:]: m for m in result.of(base)}
    for m in result.of(other):
        turns = result.ratio(bases[m.key[1:]], m, "prefill") if m.n_gen and m.n_prompt and m.key[1:] in bases else None
        if turns:
            speed = f"{1 / turns.ratio:.3f}x as fast as {base} (95 %: {1 / turns.high:.3f} to {1 / turns.low:.3f})"
            tell(f"  {other}, {m.test}, {threads(m.n_threads)}: prefill {speed}")
    for bursts in result.bursts:
        if bursts.failure and {base, other} <= {*bursts.names}:
            tell(f"  {other} and {base} took no turns, their repetitions are pairs: {bursts.failure}")


def _noise_floor(result: Result, names: list[str]) -> float | None:
    """Say how far the first spec is from itself; it was measured twice, the second time under the last name."""
    from bench.judge.comparison import CompareError, noise_floor

    try:
        floor = noise_floor(result, names[0], names[-1])
    except CompareError as error:
        tell(f"  {error}")
        return None
    tell(f"  noise floor: {names[0]} against itself is within {floor:.1%} (95 %)")
    return floor
