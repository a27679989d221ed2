"""The command line: ``saap prune``. Heavy imports live inside the command."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click

from saap.cli.console import Console
from saap.cli.types import BYTES, PARAMETERS, InSection, LayerRange, Sections, directory

required = partial(click.option, cls=InSection, section="What the model must meet (one of these)")
planned = partial(click.option, cls=InSection, section="What is planned for")
removed = partial(click.option, cls=InSection, section="What may go")
how = partial(click.option, cls=InSection, section="How it is chosen")
scored = partial(click.option, cls=InSection, section="What is scored on")
ours = partial(click.option, cls=InSection, section="How SAAP scores (the defaults are the ablation's)")
memory = partial(click.option, cls=InSection, section="How it is loaded")
Command = TypeVar("Command", bound=Callable[..., Any])
METHODS = (
    "saap", "random", "magnitude", "vector", "param_first", "param_second", "param_mix", "wanda_sp", "flap", "shortgpt",
)  # fmt: skip


REQUIREMENTS = (
    required(
        "--max-params", type=PARAMETERS, metavar="COUNT", help="Most parameters, with the embedding, such as 100M."
    ),
    required("--max-bytes", type=BYTES, metavar="SIZE", help="Largest weights file of the bundle, as 80MB or 80MiB."),
    required(
        "--speedup", type=float, metavar="FACTOR", help="Times as many tokens per second, such as 1.25; with --costs."
    ),
    required("--ms-per-token", type=float, metavar="MS", help="Longest decode step in milliseconds; with --costs."),
)
COSTS = planned(
    "--costs", type=directory, metavar="FILE", help="What `saap devices probe --costs` measured on the device."
)
CHOICE = (
    how("--method", type=click.Choice(METHODS), default="saap", show_default=True, help="SAAP, or a baseline."),
    how(
        "--compensate",
        type=click.Choice(["none", "bias", "refit"]),
        help="How what stays makes up for what goes; default: refit for saap, bias for flap, none for others.",
    ),
)

DROPPED = removed(
    "--drop-layers",
    type=int,
    metavar="N",
    default=0,
    show_default=True,
    help="So many whole layers first, those that change least what passes through; the rest in width (saap).",
)


def together(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several options as one decorator, in the order of help."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


@click.command(cls=Sections)
@click.argument("model")
@required("--ratio", type=float, metavar="SHARE", help="Share of the decoder layers' weights to remove, such as 0.2.")
@together(*REQUIREMENTS, COSTS)
@planned("--here", is_flag=True, help="The bundle is for this machine: refuse a table of costs of another one.")
@planned("--threads", type=int, metavar="N", help="Which of the table's thread counts; default: its only one.")
@planned(
    "--bits",
    type=click.Choice(["4", "8", "32"]),
    default="4",
    show_default=True,
    help="Of the bundle, for its size and time.",
)
@planned(
    "--group",
    "block",
    type=click.Choice(["32", "64", "128"]),
    default="32",
    show_default=True,
    help="Its weights per scale; every width is a multiple of it.",
)
@together(*CHOICE)
@how(
    "--iterative-steps",
    type=int,
    metavar="N",
    help="Prune in so many steps, each scored anew (saap); default: one for every 15 % of the layers' cost.",
)
@how(
    "--prices",
    type=click.Choice(["silenced", "compensated"]),
    default="silenced",
    show_default=True,
    help="Prices of what goes, or of what compensation leaves of that (saap; slower).",
)
@how("--corrections", type=int, metavar="N", default=0, show_default=True, help="Correct prices by loss (saap).")
@how("--explain", is_flag=True, help="Say why each layer lost what it lost.")
@removed(
    "--heads/--no-heads",
    default=None,
    help="Query heads and KV groups too; default: where measured to pay; not by baselines of models with GQA.",
)
@removed("--modules", is_flag=True, help="Whole attention and FFN blocks too (each is measured: slower).")
@DROPPED
@removed(
    "--keep-layers", type=LayerRange(), default=frozenset(), help="Not from these, such as 0-2,29; none: from all."
)
@scored("--calibration", help="A text, .jsonl or .gz file, or a data set id; default: SAAP_DATA, else self-written.")
@scored("--sequences", type=int, default=64, show_default=True, help="Calibration sequences.")
@scored("--length", type=int, default=256, show_default=True, help="Tokens per sequence.")
@scored("--seed", type=int, default=0, show_default=True)
@ours(
    "--score",
    type=click.Choice(["vector", "element", "token", "fused", "vector-token", "fused-token"]),
    default="vector-token",
    show_default=True,
    help="What enters: fused is vector and element; token is ours.",
)
@ours("--c", type=float, help="Weight of the second-order term; default: tokens per sequence; papers print 1.")
@ours("--exact", is_flag=True, help="The exact element score: two more numbers per weight in memory.")
@ours("--slices", type=click.Choice(["all", "output"]), default="all", help="Slices of a structure that are summed.")
@ours("--sigma", type=click.Choice(["type", "layer"]), default="type", help="Structures that share a sigma.")
@ours("--stability", type=float, default=0.0, help="Lambda: below 0 prunes what fluctuates, above keeps it.")
@ours(
    "--layer-power",
    type=float,
    default=1.0,
    show_default=True,
    help="Gamma: how much its layer counts in an FFN channel.",
)
@memory(
    "--stream/--no-stream",
    default=None,
    help="Read the model layer by layer; default: where it does not fit into memory as a whole.",
)
@memory("--device", metavar="NAME", default="cpu", show_default=True, help="That computes: cpu, or a GPU as cuda:0.")
@click.option("-o", "--out", type=directory, required=True, help="The slim directory to write.")
def prune(model: str, out: Path, **options: Any) -> None:
    """Remove the coupled structures that matter least.

    A time is met by the table of costs, which may have been measured on another device than this one; what the slim
    model takes in truth, `saap bench` measures.

    \b
    Example:
      saap prune smollm2-135m -o out/slim --ratio 0.2
      saap prune smollm2-135m -o out/slim --max-bytes 60MB
      saap devices probe --costs smollm2-135m -t 1 -o cost.json
      saap prune smollm2-135m -o out/slim --speedup 1.25 --costs cost.json
    """
    from saap.cli.prune import prune_step

    with Console() as console:
        prune_step(model, out, options, console)
