"""The commands of a board: measure, compare, report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from saap.cli.console import Console
from saap.cli.types import Counts, PromptAndGenerated, directory


def lengths(command: Any) -> Any:
    """Options that say what is timed, shared by bench and compare."""
    for option in reversed(
        (
            click.option("-p", "--prompt", type=Counts(), default="128", show_default=True, help="Prompt tokens."),
            click.option("-n", "--generate", type=Counts(), default="128", show_default=True, help="Generated tokens."),
            click.option("-d", "--depth", type=Counts(), default="0", show_default=True, help="Tokens before them."),
            click.option("-t", "--threads", type=Counts(), help="Default: all physical cores."),
            click.option(
                "-r", "--repetitions", type=int,
                help="Fresh processes per spec, interleaved; default: 10, then as --precision and --max-time say.",
            ),
            click.option(
                "--precision", type=float, default=0.02, show_default=True,
                help="Half width of the 95 % interval at which repetitions end.",
            ),
            click.option("--max-time", "max_time_s", type=float, default=120, show_default=True, help="Seconds."),
            click.option(
                "--time-limit", "timeout_s", type=float, default=600, show_default=True, help="Seconds of one process."
            ),
        )
    ):  # fmt: skip
        command = option(command)
    return command


@click.command()
@click.argument("specs", nargs=-1, required=True, metavar="A [B ...]")
@lengths
@click.option(
    "-pg", "pairs", type=PromptAndGenerated(), multiple=True, help="A pair beside -p and -n, such as 512,128."
)
@click.option(
    "--provider",
    type=click.Choice(["cpu", "cuda", "tensorrt"]),
    default="cpu",
    show_default=True,
    help="Of ONNX Runtime, for bundles.",
)
@click.option("--cuda-graph", is_flag=True, help="Replay decode steps as a CUDA graph.")
@click.option(
    "--cool-down",
    "cool_down_s",
    type=float,
    default=0,
    show_default=True,
    help="Seconds to wait at most before each run, until the cores are within 3 C of their start.",
)
@click.option("--cold/--no-cold", default=True, show_default=True, help="Also time a load from storage.")
@click.option("--noise-floor", is_flag=True, help="Measure A against itself too: what a ratio must exceed.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the prompt's tokens.")
@click.option(
    "--on",
    "urls",
    multiple=True,
    metavar="URL",
    help="Measure there: ssh://user@host[:port], adb://[serial], labgrid://PLACE or ?TAG=VALUE; several at once.",
)
@click.option("--wheels", type=directory, help="With --on: a folder of wheels for a board that reaches no index.")
@click.option("--board-packages", is_flag=True, help="With --on: use what the board's Python has, make no venv.")
@click.option("--quality", type=directory, help="What `saap eval --json` wrote, to go with the speeds.")
@click.option("--history", type=directory, help="A folder that keeps this result, for the report's history.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["md", "csv"]),
    help="Print this instead of tables.",
)
@click.option("--json", "json_path", type=directory, help="Write the result here, raw samples included; - prints it.")
def bench(specs: tuple[str, ...], urls: tuple[str, ...], **options: Any) -> None:
    """Measure bundles and other runtimes, interleaved, each run in a fresh process.

    A is a bundle, prepacked:BUNDLE (packed weights kept in the cache), torch:DIR, llama.cpp:FILE.gguf, genai:DIR or
    optimum:DIR. Peers need their packages, here or in the Python that SAAP_PEER_PYTHON names. Lengths and threads may
    be lists: -p 128,512 -d 0,1024 -t 1,2.

    \b
    Example:
      saap bench out/demo/dense-int4 out/demo/slim-int4 --threads 1 --json result.json
      saap bench out/demo/dense-int4 llama.cpp:smollm2-q4_0.gguf
      saap bench out/demo/slim-int4 --on ssh://pi@board
      saap bench out/demo/slim-int4 --on labgrid://pi5 --on 'labgrid://?board=jetson'
    """  # fmt: skip
    from saap.cli.bench import bench_step

    if urls:
        from saap.cli.remote import bench_on_step

        with Console() as console:
            sys.exit(bench_on_step(list(specs), urls, options, console))
    if options["wheels"] or options["board_packages"]:
        raise click.UsageError("--wheels and --board-packages belong to --on: name a board")
    with Console() as console:
        sys.exit(bench_step(list(specs), options, console))


@click.command()
@click.argument("old")
@click.argument("new")
@lengths
@click.option("--min-effect", type=float, default=0.02, show_default=True, help="Smallest change that counts.")
@click.option("--fail-on", type=click.Choice(["regression"]), help="Exit with 1 when something became slower.")
@click.option("--confirm/--no-confirm", default=True, show_default=True, help="Measure again before it says slower.")
@click.option("--junit", type=directory, help="Write JUnit XML here.")
@click.option("--json", "json_path", type=directory, help="Write the verdicts here; - prints them.")
def compare(old: str, new: str, **options: Any) -> None:
    """Is NEW faster or slower, or better or worse, than OLD? Exit 3 when they do not compare.

    Both are results of `saap bench --json`, or both are bundles, which are then measured, interleaved. A regression is
    measured a second time before it is said. In a GitHub workflow the table also goes to the step's summary. Two
    documents of `saap eval --json` are compared answer by answer, and only where they are of the same protocol and the
    same examples.

    \b
    Example:
      saap compare before.json after.json --fail-on regression
      saap compare out/demo/dense-int4 out/demo/slim-int4 -t 1
      saap compare flap-quality.json saap-quality.json
    """
    from saap.cli.bench import compare_step

    with Console() as console:
        sys.exit(compare_step(old, new, options, console))


@click.command()
@click.argument("results", type=directory, nargs=-1)
@click.option("-o", "--out", type=directory, required=True, help="The HTML file to write.")
@click.option(
    "--history", type=directory, help="A folder of `saap bench --history`: speeds over time, and their steps."
)
def report(results: tuple[Path, ...], out: Path, history: Path | None) -> None:
    """One self-contained page from files of `saap bench` and `saap eval`, a run's directory, or a history.

    \b
    Example:
      saap report out/demo -o report.html
      saap report bench.json quality.json -o report.html
      saap report --history results/ -o history.html
    """
    from saap.cli.report import make_report

    if not results and history is None:
        raise click.UsageError("give result files, the directory of a run, or --history FOLDER")
    make_report(list(results), out, history)
