"""``saap devices baseline`` and ``saap devices test``: what is asked, measured and said."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from saap.cli.bench import show_reasons
from saap.cli.console import Console, print_table
from saap.cli.remote import check_board_options
from saap.system.errors import UserError
from saap.system.interrupt import ended_as_by_a_person

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
    from bench.measure.plan import Plan

    _check(options)
    folder = checked_folder(folder_of(options))
    plan = Plan(
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
    with _one_board(options, console) as held:
        run = measure(bundle, held, console)
        kept = record(name_of(bundle, options["name"]), run, plan, options["runs"], console.say)
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
    from bench.report.verdicts import DEVICE, Case, device_junit, junit, sentence, verdict_table
    from devices.common.files import write_text
    from devices.probe.host import probe

    if not 0 < options["min_effect"] < 1:
        raise UserError(f"--min-effect {options['min_effect']} is no fraction: give e.g. 0.05 for 5 %")
    _check(options)
    name, junit_path = name_of(bundle, options["name"]), options["junit"]
    try:
        with _one_board(options, console) as held:
            test = retest(
                checked_folder(folder_of(options)),
                name,
                measure(bundle, held, console),
                on=held["url"],
                here=None if held["url"] else probe()["fingerprint"],
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


def measure(bundle: str, options: dict[str, Any], console: Console | None) -> Measured:
    """What makes a run of the bundle, here or on a board."""
    url: str | None = options.get("url")
    name = name_of(bundle, options.get("name"))
    progress, say = (console.report, console.say) if console else (None, None)

    def here(plan: Any) -> Any:
        from bench.measure.run import bench

        with ended_as_by_a_person():
            return bench([bundle], plan, names=[name], progress=progress)

    def there(plan: Any) -> Any:
        from bench.remote.bench import bench_on

        with ended_as_by_a_person():
            (answer,) = bench_on(
                [str(url)], [bundle], plan, wheels=options.get("wheels"), own=not options.get("board_packages"),
                progress=progress, say=say,
            )  # fmt: skip
        if answer.error is not None:
            raise answer.error
        return answer.result

    return here if url is None else there


@contextlib.contextmanager
def _one_board(options: dict[str, Any], console: Console) -> Iterator[dict[str, Any]]:
    """The options, with the address of a board that stays the same one for several runs."""
    if options["url"] is None:
        yield options
        return
    from bench.remote.ways import kept

    with ended_as_by_a_person(), kept(options["url"], console.say) as url:
        yield {**options, "url": url}


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


def _check(options: dict[str, Any]) -> None:
    if options["url"] is None and (options["wheels"] or options["board_packages"]):
        raise UserError("--wheels and --board-packages belong to --on: name a board")
    check_board_options(options)


def _path(bundle: str) -> Path:
    return Path(bundle.removeprefix("prepacked:"))
