"""``saap devices baseline`` and ``saap devices test``: what is asked, measured and said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from saap.cli.bench import show_reasons
from saap.cli.console import Console, print_table
from saap.system.errors import UserError
from saap.system.interrupt import ended_as_by_a_person

if TYPE_CHECKING:
    from bench.remote.options import BoardOptions
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

Measured = Callable[[Any], Any]


def baseline_step(bundle: str, options: dict[str, Any], console: Console) -> None:
    """Record and keep."""
    from bench.judge.baselines import checked_folder, writable_folder, write_baseline
    from bench.judge.regression import record
    from bench.measure.options import BenchOptions
    from bench.remote.target import target

    board_options = _board_options(options)
    folder = checked_folder(folder_of(options))
    plan = BenchOptions(
        prompt=options["prompt"],
        generate=options["generate"],
        depth=options["depth"],
        threads=options["threads"],
        repetitions=options["repetitions"],
        max_time_s=options["max_time_s"],
        text=text_ids(_path(bundle), options["text"]),
        greedy=GREEDY,
    )
    writable_folder(folder)
    name = name_of(bundle, options["name"])
    with ended_as_by_a_person(), target(options["url"], board_options, console.say) as device:
        kept = record(name, measuring(device, bundle, name, console), plan, options["runs"], console.say)
    console.finish()
    path = write_baseline(folder, kept)
    for result in kept.results:
        show_reasons(result)
    click.echo(f"wrote {path}: {len(kept.pooled.measurements[0].samples)} repetitions in {len(kept.results)} runs")


def test_step(bundle: str, options: dict[str, Any], console: Console) -> int:
    """Measure again, show and judge; the exit code."""
    from bench.judge.baselines import OtherDeviceError, checked_folder
    from bench.judge.regression import Limits, retest
    from bench.judge.verdict import NOT_COMPARABLE, SAME
    from bench.remote.target import target
    from bench.report.verdicts import DEVICE, Case, device_junit, junit, sentence, verdict_table
    from devices.common.files import write_text
    from devices.probe.host import probe

    if not 0 < options["min_effect"] < 1:
        raise UserError(f"--min-effect {options['min_effect']} is no fraction: give e.g. 0.05 for 5 %")
    board_options = _board_options(options)
    name, junit_path = name_of(bundle, options["name"]), options["junit"]
    try:
        with ended_as_by_a_person(), target(options["url"], board_options, console.say) as device:
            test = retest(
                checked_folder(folder_of(options)),
                name,
                measuring(device, bundle, name, console),
                on=device.url,
                here=None if device.url else probe()["fingerprint"],
                limits=Limits(speed=options["min_effect"], max_time_s=options["max_time_s"]),
            )
    except OtherDeviceError as error:
        if junit_path is not None:
            case = Case(name, "error", NOT_COMPARABLE, str(error))
            write_text(junit_path, junit("saap devices test", [case]))
        raise
    console.finish()
    show_reasons(test.results[-1])
    (m,) = test.results[-1].measurements
    table = verdict_table(test.checks, DEVICE)
    title = f"{test.baseline.name}, {m.test}, {m.n_threads} threads, against its baseline"
    print_table(title, table.header, table.rows)
    for check in test.checks:
        if check.verdict != SAME or check.reason:
            click.echo(f"  {sentence(check)}")
    if junit_path is not None:
        write_text(junit_path, device_junit(test))
    return test.exit_code


def measuring(device: Target, bundle: str, name: str, console: Console) -> Measured:
    """What makes a run of the bundle on a device."""
    return lambda plan: device.bench([bundle], plan, names=[name], progress=console.report)


def folder_of(options: dict[str, Any]) -> Path:
    """Where the baselines are."""
    from bench.judge.baselines import DEFAULT

    return Path(options["baselines"] or DEFAULT)


def name_of(bundle: str, name: str | None) -> str:
    """What a model is called in its baselines."""
    return name or _path(bundle).resolve().name


def text_ids(bundle: Path, text: Path | None = None) -> tuple[int, ...]:
    """Token ids of the text that a model is asked about: as many as it holds beside the tokens it shall say.

    Random ids, always the same, where a bundle has no tokenizer.
    """
    from bench.measure.rounds import prompt_tokens
    from export.bundle.manifest import read_manifest
    from export.bundle.tokenizer import BundleTokenizer

    manifest = read_manifest(bundle)
    most = min(MOST_TEXT, manifest.context_length - GREEDY)
    if text is None and not (bundle / "tokenizer.json").is_file():
        return tuple(prompt_tokens(most, manifest.vocab_size, seed=0))
    try:
        words = TEXT if text is None else text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {text} ({error}): give a text file in UTF-8") from None
    return tuple(BundleTokenizer(bundle).tokenizer.encode(words).ids[:most])


def _board_options(options: dict[str, Any]) -> BoardOptions:
    from bench.remote.options import BoardOptions

    found = BoardOptions(options["wheels"], options["board_packages"])
    found.check(on_a_board=options["url"] is not None)
    return found


def _path(bundle: str) -> Path:
    return Path(bundle.removeprefix("prepacked:"))
