"""``saap tune``."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click

from saap.base.errors import UserError
from saap.base.options import Option, refuse_unused
from saap.cli.console import LOADING, Console, print_table
from saap.cli.options import OptionsCommand, options_of
from saap.cli.types import directory, force
from saap.tune.options import FEWEST_JUDGED, TuneOptions

if TYPE_CHECKING:
    from saap.tune.loop.steps import History

_TEXT = "Training text"


@dataclass(frozen=True)
class TuneCommand:
    """The request of ``saap tune``: options, teacher and text."""

    options: TuneOptions = field(default_factory=TuneOptions)
    teacher: Annotated[
        str | None, Option("The dense model, a directory or a name: its KL joins the loss.", _TEXT, metavar="MODEL")
    ] = None
    data: Annotated[
        str | None, Option("A text, .jsonl or .gz file, or a data set id; default: as saap prune.", _TEXT)
    ] = None

    def check(self) -> None:
        """Refuse values out of range, and what would have no effect. Raises UserError: names the option."""
        options, training = self.options, self.options.training
        options.check()
        if options.minutes is not None:
            refuse_unused(self, ("tokens",), "a run without --minutes")
        if self.teacher is None:
            refuse_unused(self, ("teacher_weight",), "--teacher", "name one")
        if options.max_bytes is not None:
            one = "one form of integers, and --max-bytes chooses one for each matrix"
            refuse_unused(self, ("bits", "head_bits", "group_size"), one)
        if options.held_out == 0:
            refuse_unused(self, ("patience",), "held-out text, and held_out is 0")
        least = training.rows_per_step * options.length
        if options.tokens < least:
            raise UserError(
                f"--tokens {options.tokens} is less than a step needs, {least} ({training.rows_per_step} sequences of "
                f"{options.length}): give --tokens {least} or more, or a smaller --batch or --length"
            )
        rows = options.tokens // options.length
        if options.held_out and not options.holds_out(rows):
            fewest = math.ceil(FEWEST_JUDGED / options.held_out) * options.length
            few = f"held-out text, and of {rows} sequences none are held out"
            refuse_unused(self, ("patience",), few, f"give --tokens {fewest} or more")
        if (training.patience or 0) > training.evaluations:
            most = f"at most the {training.evaluations} evaluations, and 0 never stops early"
            refuse_unused(self, ("patience",), most, f"give {training.evaluations} or fewer")


@click.command(cls=OptionsCommand)
@click.argument("slim", type=directory)
@options_of(TuneCommand)
@click.option("-o", "--out", type=directory, required=True, help="The directory with integer weights to write.")
@force
def tune(slim: Path, out: Path, options: TuneCommand) -> None:
    """Quantize in groups and tune the groups: the integers that the device will run.

    SLIM is what saap prune wrote, or a whole model. Killed and started again it continues. In several processes:
    accelerate launch --multi_gpu --num_processes 2 -m saap.cli tune ...

    \b
    Example:
      saap tune out/slim -o out/tuned --teacher smollm2-135m
      saap tune out/slim -o out/learnt --train weights --teacher smollm2-135m
    """
    with Console() as console:
        tune_model(slim, out, options, console)


def tune_model(slim: str | Path, out: Path, command: TuneCommand, console: Console) -> None:
    command.check()
    console.report(LOADING, 0, 0)
    from saap.system.processes import is_main_process
    from saap.tune.tuning import tune as tune_directory

    result = tune_directory(
        slim, command.options, output=out, teacher=command.teacher, data=command.data, progress=console
    )
    console.finish()
    if is_main_process():
        show_tuning(out, result.history)


def loss_in_words(name: str, weight: object) -> str:
    """Name the loss for a reader."""
    if name == "NLL+KL" and isinstance(weight, float):
        return f"{1 - weight:g} NLL + {weight:g} KL to the teacher"
    return "KL to the teacher" if name == "KL" else "NLL"


def show_tuning(out: Path, history: History) -> None:
    from saap.models.checkpoint import read_config
    from saap.models.record import read_record

    record, quant = read_record(out), read_config(out).get("slim_quant")
    tuning, learnt = record["tuning"] if quant else record["weights"], "scales and norms"
    options, rows = tuning["options"], list[list[str]]()
    if quant:
        others = {*quant.get("matrices", {}), *quant.get("blocks", {})}
        mixed = f", {len(others)} matrices other" if others else ""
        form = f"{quant['bits']} bit, groups of {quant['block']}, head {quant['embedding_bits']} bit{mixed}"
        rows.append(["integers", form])
    else:
        learnt = "all weights, as floats" if options["train"] == "all" else "weights and norms of the layers, as floats"
    rows += [
        ["trained", f"{learnt}, {tuning['trained_parameters']:,} parameters"],
        ["tokens", f"{history.tokens:,} in {history.precision}, {history.tokens / max(history.seconds, 1e-9):.0f} / s"],
        ["loss", loss_in_words(history.loss_name, options["teacher_weight"])],
    ]
    if history.held_out:
        best = min(loss for _, loss in history.held_out)
        first = history.held_out[0][1]
        rows.append([history.held_out_name, f"{first:.4f} -> {best:.4f} nats per token, at step {history.best_step}"])
    if history.stopped:
        rows.append(["stopped", history.stopped])
    print_table("", ["", "tuned"], rows)
