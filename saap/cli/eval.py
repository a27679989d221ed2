"""``saap eval``: perplexity, agreement with the dense model, and zero-shot tasks, of directories and bundles."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import click

from saap.base.options import Option
from saap.base.quality import QUALITY, Answers, Quality
from saap.cli.console import LOADING, Console, print_table, tell
from saap.cli.options import OptionsCommand, options_of
from saap.cli.types import complete_model, directory, force
from saap.evaluate.options import EvalOptions, check_options

_TEXT = "Perplexity"


@dataclass(frozen=True)
class EvalCommand:
    """The request of ``saap eval``: options, text and reference."""

    text: Annotated[
        str | None,
        Option("A text, .jsonl or .gz file, or a data set id; default: SAAP_DATA, else saap's sample.", _TEXT),
    ] = None
    reference: Annotated[
        Path | None, Option("The dense model directory that KL and top-1 are against.", _TEXT, metavar="MODEL")
    ] = None
    options: EvalOptions = field(default_factory=EvalOptions)


@click.command(name="eval", cls=OptionsCommand)
@click.argument("paths", type=directory, nargs=-1, required=True, shell_complete=complete_model)
@options_of(EvalCommand)
@click.option("--json", "json_path", type=directory, help="Write the numbers here, for compare and report.")
@force
def evaluate(paths: tuple[Path, ...], json_path: Path | None, options: EvalCommand) -> None:
    """Perplexity, KL, top-1 agreement, zero-shot tasks and answers of model directories and bundles.

    llama.cpp:FILE.gguf and BUNDLE@llama.cpp run in llama.cpp, as `saap bench` takes them. A perplexity is told with its
    protocol; `saap compare` refuses two of different ones.

    \b
    Example:
      saap eval out/bundle --reference smollm2-135m --max-chunks 40
      saap eval out/slim --text wiki.test.raw --chunk 2048 --join wikitext --max-chunks all
      saap eval out/slim out/bundle --tasks piqa,arc_easy --task-dir tasks/ --json quality.json
      saap eval out/slim --reference smollm2-135m --answers 32
    """
    from saap.base.outputs import QUALITY as OF_EVAL
    from saap.base.outputs import check_place

    check_options(options.options)  # a wrong option is refused before torch is loaded
    check_place(json_path, OF_EVAL, *paths, options.reference, options.text)
    console = Console.of_command()
    console.report(LOADING, 0, 0)
    from saap.evaluate.evaluation import evaluate as evaluate_models

    def keep(quality: Quality) -> None:
        """Write before anything is shown, so that what took hours is there whatever happens then."""
        try:
            if json_path is not None:
                QUALITY.write(json_path, quality)
        finally:
            if quality.answers and not quality.tasks:
                show_answers(quality.answers)
            elif not quality.tasks:
                show_quality(quality)

    quality = evaluate_models(
        paths, options.options, reference=options.reference, text=options.text, progress=console, keep=keep
    )
    if quality.tasks:
        show_tasks(quality)


def show_quality(quality: Quality) -> None:
    protocol = quality.protocol
    if protocol is None:
        return
    rows = [
        [
            row.name, _cell(row.perplexity, ".2f"), _cell(row.nll, ".4f"), _cell(row.bits_per_byte, ".4f"),
            _cell(row.kl, ".4f"), _cell(row.top1, ".2%"), f"{row.parameters / 1e6:.1f}", f"{row.bytes / 1e6:.1f}",
        ]
        for row in quality.rows
    ]  # fmt: skip
    overlap = "no overlap" if protocol.stride == protocol.chunk else f"stride {protocol.stride}"
    title = (
        f"{protocol.text}: {protocol.chunks} chunks of {protocol.chunk} tokens, {overlap}, "
        f"{'BOS' if protocol.bos else 'no BOS'}, lines {protocol.join}, {protocol.predictions} predictions"
    )
    columns = ["model", "perplexity", "NLL", "bits/byte", "KL to dense", "top-1", "M params", "MB"]
    print_table(title, columns, rows, ("M params", "MB"))


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def show_answers(answers: Answers) -> None:
    """Agreement and repetition, a row per model."""
    rows = [
        [score.model, _cell(score.agreement, ".1%"), _cell(score.same, ".1f"), f"{score.repetition:.1%}"]
        for score in answers.scores
    ]
    title = f"{answers.source}: greedy answers to {answers.prompts} prompts, {answers.tokens} tokens at most"
    print_table(title, ["model", "agreement", "same tokens", "repetition"], rows)


def show_tasks(quality: Quality) -> None:
    """Print accuracies with their standard errors, a row per task and model, and the models' means over the tasks."""
    order = list(dict.fromkeys(score.task for score in quality.tasks))
    scores = sorted(quality.tasks, key=lambda score: order.index(score.task))
    rows = [
        [
            score.task, score.model, str(len(score.examples)), _accuracy(score.acc, score.acc_stderr),
            _accuracy(score.acc_norm, score.acc_norm_stderr),
        ]
        for score in scores
    ]  # fmt: skip
    count = f"{quality.max_examples} examples each (seed {quality.task_seed})"
    title = f"zero-shot, {count if quality.max_examples else 'all examples'}: accuracy +- standard error"
    print_table(title, ["task", "model", "examples", "acc", "acc_norm"], rows)
    quoted: dict[str, list[float]] = {}
    for score in scores:
        quoted.setdefault(score.model, []).append(score.quoted or 0.0)
    means = ", ".join(f"{model} {sum(values) / len(values):.1%}" for model, values in quoted.items())
    tell(f"  mean over the tasks, of acc_norm where a task has it: {means}")
    if scores[0].sha256 is None:
        tell("  data sets: the harness's own")


def _accuracy(value: float | None, error: float | None) -> str:
    return "-" if value is None else f"{value:.1%} +- {100 * (error or 0.0):.1f}"
