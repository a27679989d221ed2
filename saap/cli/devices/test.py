"""``saap devices baseline`` and ``saap devices test``: what is asked, measured and said."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click
from msgspec import Meta

from bench.measure.options import BenchOptions
from bench.remote.options import BoardOptions
from export.engine.spec import BundleSpec
from saap.base.options import Option, Part
from saap.base.values import parse_duration
from saap.base.wording import counted
from saap.cli.bench import check_ending, keep, show_reasons
from saap.cli.console import Console, print_table, tell
from saap.cli.options import OptionsCommand, options_of
from saap.cli.types import force

if TYPE_CHECKING:
    from bench.judge.baselines import Baseline
    from bench.judge.regression import DeviceTest, Measure
    from bench.remote.target import Target

GREEDY = 16
MOST_TEXT = 128
# Ours, so that a baseline holds nobody else's text; words, numbers and code, as models are used.
TEXT = (
    "The bridge over the river was closed on the 3rd of May, because the water had risen by 12 centimetres in a night. "
    "Engineers measured it every hour and wrote the level into a book. Nobody crossed before noon.\n\n"
    "def mean(values):\n    return sum(values) / len(values)\n\n"
    "A model is small when it fits into the memory of the device, and it is fast when that memory can feed it. "
    "Everything else is a question of how carefully it was measured, and by whom."
)


@dataclass(frozen=True)
class DeviceOptions:
    """The device to measure, and the folder of its baselines."""

    baselines: Annotated[Path | None, Option("Folder of baselines; default: devices/baselines, below this one.")] = None
    name: Annotated[str | None, Option("Of the model; default: the bundle's folder.")] = None
    on: Annotated[
        str | None, Option("A board: ssh://user@host[:port], adb://[serial], labgrid://PLACE.", metavar="URL")
    ] = None
    board: BoardOptions = field(default_factory=BoardOptions)
    max_time_s: Annotated[float, Option("Seconds a run.", flags=("--max-time",)), Meta(gt=0)] = 120

    @property
    def folder(self) -> Path:
        from bench.judge.baselines import DEFAULT

        return Path(self.baselines or DEFAULT)

    def check(self) -> None:
        self.board.check(on_a_board=self.on is not None)


@dataclass(frozen=True)
class BaselineCommand:
    """The options of ``saap devices baseline``."""

    options: Annotated[
        BenchOptions,
        Part(
            ("prompt", "generate", "depth", "threads", "repetitions", "provider"),
            without=("precision", "max_time_s", "ratio_time_s", "timeout_s", "warmup", "seed", "cold", "choice"),
        ),
    ] = field(default_factory=BenchOptions)
    sessions: Annotated[int, Option("What differs between them is taken for noise."), Meta(ge=1, le=100)] = 5
    spread: Annotated[
        float,
        Option("Begin them evenly over this time, such as 30m or 1h.", parse=parse_duration, metavar="TIME"),
        Meta(ge=0, le=604_800),
    ] = 0.0
    min_effect: Annotated[float, Option("Change of speed that it must be able to show."), Meta(gt=0, lt=100)] = 0.05
    add: Annotated[bool, Option("Add the sessions to the baseline that is there.")] = False
    device: DeviceOptions = field(default_factory=DeviceOptions)


@dataclass(frozen=True)
class TestCommand:
    """The options of ``saap devices test``."""

    min_effect: Annotated[float, Option("Smallest change of speed that counts."), Meta(gt=0, lt=1)] = 0.05
    junit: Annotated[Path | None, Option("Write JUnit XML here.")] = None
    history: Annotated[Path | None, Option("A folder that keeps every run, for `saap report --history`.")] = None
    device: DeviceOptions = field(default_factory=DeviceOptions)


@click.command(cls=OptionsCommand)
@click.argument("bundle")
@options_of(BaselineCommand)
@force
def baseline(bundle: str, options: BaselineCommand) -> None:
    """Record what BUNDLE is on this device, or on a board: speed, memory, load, energy, answers.

    Several sessions tell how much sessions differ here, and so which change a test can see. Exit 3 when that is none of
    --min-effect: then nothing is recorded.

    \b
    Example:
      saap devices baseline out/demo/slim-int4 -t 4 --baselines ours/baselines
      saap devices baseline out/demo/slim-int4 --on ssh://pi@board --spread 1h
      saap devices baseline out/demo/slim-int4 --add
    """
    from bench.judge.baselines import checked_folder, name_of, writable_folder, write_baseline
    from bench.judge.regression import Recording, plan_of, record, visible_changes
    from bench.remote.target import target
    from saap.base.interrupt import ended_as_by_a_person

    console = Console.of_command()
    device_options = options.device
    device_options.check()
    check_ending(options, options.options.repetitions)
    folder = checked_folder(device_options.folder)
    text = text_ids(BundleSpec.of(bundle).bundle)
    plan = replace(options.options, max_time_s=device_options.max_time_s, text=text, greedy=GREEDY)
    name = device_options.name or name_of(bundle)
    writable_folder(folder, name)
    there = _baseline_there(folder, name, device_options.on) if options.add else None
    how = Recording(options.sessions, options.spread, there, None if there else options.min_effect, say=console.say)
    with ended_as_by_a_person():
        device = target(device_options.on, device_options.board, console.say)
        if there is None:
            plan = replace(plan, choice=fastest_setting(device, bundle, plan, console))
        kept = record(name, measuring(device, bundle, name, console), plan_of(there) if there else plan, how)
    console.finish()
    path = write_baseline(folder, kept)
    show_reasons(*kept.results[-options.sessions :])
    tell(f"wrote {path}: {counted(kept.repetitions, 'repetition')} in {counted(len(kept.results), 'session')}")
    for what, change in visible_changes(kept).items():
        tell(f"  {what}: one session of a test would show {change:.1%} (8 times of 10)")


def _baseline_there(folder: Path, name: str, on: str | None) -> Baseline:
    """Return the baseline of this device, to which sessions are added."""
    from bench.judge.baselines import NoBaselineError, read_baselines
    from devices.probe.host import probe

    recorded = read_baselines(folder, name)
    here = None if on else probe()["fingerprint"]
    there = next((b for b in recorded if (b.on == on if on else b.fingerprint == here)), None)
    if there is None:
        raise NoBaselineError(f"{folder} holds no baseline of {name} of this device: record one first, without --add")
    return there


@click.command(cls=OptionsCommand)
@click.argument("bundle")
@options_of(TestCommand)
@force
def test(bundle: str, options: TestCommand) -> None:
    """Measure BUNDLE again and say what became worse than the baseline of this device.

    What is not clear is measured up to three times. Exit 1 when something is worse, 3 when there is no baseline of this
    device, a run is INVALID, or a change of --min-effect cannot be told from noise. A good test joins the baseline.

    \b
    Example:
      saap devices test out/demo/slim-int4 --baselines ours/baselines --junit devices.xml
    """
    from bench.judge.baselines import checked_folder, name_of
    from bench.judge.regression import keep_tested
    from bench.report.verdicts import device_junit
    from saap.base.files import write_text
    from saap.base.outputs import JUNIT, RESULT, check_folder, check_place

    console = Console.of_command()
    check_place(options.junit, JUNIT, bundle)
    if options.history is not None:
        check_folder(options.history, RESULT, "--history")
    options.device.check()
    folder, name = checked_folder(options.device.folder), options.device.name or name_of(bundle)
    outcome = _measured_again(bundle, folder, name, options, console)
    console.finish()
    if options.junit is not None:
        write_text(options.junit, device_junit(outcome))
    for result in outcome.results:
        keep(result, None, options.history)
    keep_tested(folder, outcome)
    _show(outcome)
    sys.exit(outcome.exit_code)


def _measured_again(bundle: str, folder: Path, name: str, options: TestCommand, console: Console) -> DeviceTest:
    """Test a bundle; where it has no baseline, JUnit says so too."""
    from bench.judge.baselines import NoBaselineError, read_baselines
    from bench.judge.regression import Limits, retest
    from bench.judge.verdict import NOT_COMPARABLE
    from bench.remote.target import target
    from bench.report.verdicts import Case, junit
    from devices.probe.host import probe
    from saap.base.files import write_text
    from saap.base.interrupt import ended_as_by_a_person

    try:
        with ended_as_by_a_person():
            device = target(options.device.on, options.device.board, console.say)
            return retest(
                read_baselines(folder, name),
                measuring(device, bundle, name, console),
                on=device.url,
                here=None if device.url else probe()["fingerprint"],
                limits=Limits(speed=options.min_effect, max_time_s=options.device.max_time_s),
                beside=lambda old, plan: device.bench(
                    [old, bundle], plan, names=["then", "now"], progress=console.report
                ),
            )
    except NoBaselineError as error:
        if options.junit is not None:
            case = Case(name, "error", NOT_COMPARABLE, str(error))
            write_text(options.junit, junit("saap devices test", [case]))
        raise


def _show(outcome: DeviceTest) -> None:
    from bench.judge.verdict import SAME
    from bench.judge.wording import threads
    from bench.report.verdicts import DEVICE, LEAST, sentence, verdict_table

    show_reasons(outcome.results[-1])
    (m,) = outcome.results[-1].measurements
    table = verdict_table(outcome.checks, DEVICE)
    title = f"{outcome.baseline.name}, {m.test}, {threads(m.n_threads)}, against its baseline"
    print_table(title, table.header, table.rows, LEAST)
    for check in outcome.checks:
        if check.verdict != SAME or check.reason:
            tell(f"  {sentence(check)}")


def measuring(device: Target, bundle: str, name: str, console: Console) -> Measure:
    return lambda plan: device.bench([bundle], plan, names=[name], progress=console.report)


def text_ids(bundle: Path) -> tuple[int, ...]:
    """Return token ids of the text that a model is asked about: as many as it holds beside the tokens that it writes.

    Random ids, always the same, where a bundle has no tokenizer.
    """
    from export.bundle.manifest import read_manifest
    from export.bundle.tokenizer import BundleTokenizer
    from export.engine.turns import random_tokens

    manifest = read_manifest(bundle)
    most = min(MOST_TEXT, manifest.context_length - GREEDY)
    if not (bundle / "tokenizer.json").is_file():
        return tuple(random_tokens(most, manifest.vocab_size, seed=0))
    return tuple(BundleTokenizer(bundle).encode(TEXT)[:most])


def fastest_setting(device: Target, bundle: str, plan: BenchOptions, console: Console) -> str | None:
    """Return the engine's setting that is fastest in decode, for a baseline; None: the bundle names no engine."""
    if BundleSpec.of(bundle).engine is None:
        return None
    tried = device.bench([bundle], replace(plan, repetitions=1, greedy=0), progress=console.report)
    return tried.measurements[0].choice
