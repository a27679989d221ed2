"""The command line: ``saap tune``. Heavy imports live inside the command."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from saap.cli.console import Console
from saap.cli.types import BYTES, InSection, Sections, directory

integers = partial(click.option, cls=InSection, section="The integers")
trained = partial(click.option, cls=InSection, section="What is trained")
learnt = partial(click.option, cls=InSection, section="What is learnt from")
running = partial(click.option, cls=InSection, section="How it runs")


@click.command(cls=Sections)
@click.argument("slim", type=directory)
@click.option("-o", "--out", type=directory, required=True, help="The directory with integer weights to write.")
@integers("--bits", type=click.Choice(["4", "8"]), default="4", show_default=True, help="Of the linears.")
@integers("--group", type=click.Choice(["32", "64", "128"]), default="32", show_default=True, help="Weights per scale.")
@integers("--head-bits", type=click.Choice(["4", "8"]), help="Of embedding and head; default: as --bits.")
@integers("--asymmetric", is_flag=True, help="Zero points per group: closer, and a little slower at run time.")
@integers(
    "--max-bytes", type=BYTES, metavar="SIZE",
    help="Largest weights file of the bundle, as 80MB: each matrix gets 4 or 8 bit, as loses least.",
)  # fmt: skip
@integers(
    "--integers", type=click.Choice(["gptq", "nearest"]), default="gptq", show_default=True,
    help="Error-compensating, or each weight by itself.",
)  # fmt: skip
@trained(
    "--fold", type=click.Choice(["scale", "zero-point"]), default="scale", show_default=True,
    help="What is trained of each group; zero-point costs time on the device.",
)  # fmt: skip
@trained("--rank", type=int, help="Of the fold's low-rank form; default: a free factor per group.")
@trained("--learning-rate", type=float, help="Peak; default: the fold's own.")
@learnt("--teacher", help="The dense model: a directory or a name; adds its KL to the loss.")
@learnt("--teacher-weight", type=float, default=0.5, show_default=True, help="Share of the loss that is the KL.")
@learnt("--temperature", type=float, default=1.0, show_default=True, help="Of teacher and model in the KL.")
@learnt("--data", help="A text, .jsonl or .gz file, or a data set id; conversations are chat; default: SAAP_DATA.")
@learnt(
    "--kind", type=click.Choice(["auto", "text", "chat"]), default="auto", show_default=True,
    help="chat: the model's template, only answers are learnt.",
)  # fmt: skip
@learnt("--tokens", type=int, default=24576, show_default=True, help="Training tokens.")
@learnt("--length", type=int, default=256, show_default=True, help="Tokens per sequence.")
@running("--seed", type=int, default=0, show_default=True)
@running("--batch", type=int, default=4, show_default=True, help="Sequences per step.")
@running("--micro-batch", type=int, default=2, show_default=True, help="Sequences at once; fewer take less memory.")
@running("--precision", type=click.Choice(["auto", "bf16", "fp32"]), default="auto", show_default=True)
@running("--checkpointing/--no-checkpointing", default=True, show_default=True, help="Less memory, a third more time.")
@running(
    "--patience", type=int, default=3, show_default=True,
    help="Evaluations on held-out text without a better one before it stops; ten are made. 0 never stops.",
)  # fmt: skip
def tune(slim: Path, out: Path, **options: Any) -> None:
    """Quantise in groups and tune the groups: the integers that the device will run.

    SLIM is what saap prune wrote; a model that nothing was removed from, by directory or name, is tuned as well.
    Killed and started again it continues. In several processes, also without GPUs:
    accelerate launch --multi_gpu --num_processes 2 -m saap.cli.main tune ... (or --use_fsdp --fsdp_version 2).

    \b
    Example:
      saap tune out/slim -o out/tuned --teacher smollm2-135m
      saap tune out/slim -o out/tuned --teacher smollm2-135m --data chats.jsonl --tokens 400000
    """
    from saap.cli.tune import tune_step

    with Console() as console:
        tune_step(slim, out, options, console)
