"""The options of ``saap eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from saap.cli.console import Console
from saap.cli.types import CountOrAll, Sections, directory


@click.command(name="eval", cls=Sections)
@click.argument("paths", type=directory, nargs=-1, required=True)
@click.option("--text", help="A text, .jsonl or .gz file, or a data set id; default: SAAP_DATA, else self-written.")
@click.option("--chunk", type=int, default=256, show_default=True, help="Tokens per chunk.")
@click.option("--stride", type=int, help="Tokens from one chunk's start to the next's; default: the chunk.")
@click.option(
    "--bos/--no-bos", default=None, help="A beginning-of-sequence token before each chunk; default: as the tokenizer."
)
@click.option(
    "--join",
    type=click.Choice(["raw", "paragraphs", "wikitext", "spaces"]),
    default="raw",
    show_default=True,
    help="Lines as they are, by blank lines, or as papers join them: wikitext, and PTB by spaces.",
)
@click.option("--max-chunks", type=CountOrAll(), default=160, show_default=True, help="At most, or all.")
@click.option("--tasks", help="Zero-shot tasks, as piqa,arc_easy; with them perplexity only where --text is given.")
@click.option("--task-dir", type=directory, help="Folder of the tasks' .jsonl files; default: the harness downloads.")
@click.option("--max-examples", type=int, help="Of each task, drawn with --seed; default: all.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the examples that are drawn.")
@click.option("--reference", type=directory, help="The dense model directory that KL and top-1 are against.")
@click.option("--json", "json_path", type=directory, help="Write the numbers here, for compare and report.")
def evaluate(paths: tuple[Path, ...], **options: Any) -> None:
    """Perplexity, KL, top-1 agreement and zero-shot tasks of model directories and bundles.

    A perplexity is told with its protocol; `saap compare` refuses two of different ones.

    \b
    Example:
      saap eval out/bundle --reference smollm2-135m --max-chunks 40
      saap eval out/slim --text wiki.test.raw --chunk 2048 --join wikitext --max-chunks all
      saap eval out/slim out/bundle --tasks piqa,arc_easy --task-dir tasks/ --json quality.json
    """
    from saap.cli.eval import eval_step

    with Console() as console:
        eval_step(list(paths), options, console)
