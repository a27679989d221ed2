"""``saap tune``: from options to a tuned directory, and what is said about it. The command line's room."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from saap.cli.console import Console, print_table
from saap.models import resolve as models
from saap.models.checkpoint import read_config, read_record
from saap.system.outputs import check_output, claimed
from saap.system.processes import is_main_process
from saap.text.tuning_rows import TuningRows, tuning_rows
from saap.tune.loop.options import History, TrainOptions
from saap.tune.options import TuneOptions
from saap.tune.tuning import tune as tune_model

DEFAULTS: dict[str, Any] = {"bits": "4", "group": "32", "kind": "auto"}


def tune_step(slim: Path, out: Path, options: dict[str, Any], console: Console) -> None:
    """``saap tune``; what is missing in ``options`` is at its default."""
    options = DEFAULTS | options
    check_output(out)
    slim = models.resolve(slim, progress=console.report)
    chosen = tune_options_of(options)
    chosen.check()
    length = options["length"]
    calibrated = read_record(slim).get("lineage", {}).get("calibration", {})
    # Rows that scored the structures are passed over: the same text twice teaches less.
    skip = math.ceil(calibrated.get("sequences", 0) * calibrated.get("tokens", 0) / length)
    # Text that the model writes itself comes from the teacher where there is one: the slim model knows less.
    teacher_dir = models.resolve(options["teacher"], progress=console.report) if options["teacher"] else None
    rows = tuning_rows(
        teacher_dir or slim, options["data"], max(1, options["tokens"] // length), length, options["seed"], skip=skip,
        kind=options["kind"], progress=console.report,
    )  # fmt: skip
    say_rows(rows, console)
    with claimed(out) if is_main_process() else nullcontext():
        history = tune_model(slim, out, rows, chosen, teacher_dir=teacher_dir, progress=console.report)
    console.finish()
    if is_main_process():
        show_tuning(out, history)


def tune_options_of(options: dict[str, Any]) -> TuneOptions:
    """The options of ``saap tune``."""
    names = ("max_bytes", "integers", "fold", "rank", "learning_rate", "teacher_weight", "temperature")
    given = {name: options[name] for name in names if name in options}
    running = {
        mine: options[theirs]
        for mine, theirs in (("rows_per_step", "batch"), ("micro_rows", "micro_batch"), ("precision", "precision"),
                             ("checkpointing", "checkpointing"), ("seed", "seed"))
        if theirs in options
    }  # fmt: skip
    if "patience" in options:
        running["patience"] = options["patience"] or None
    default = TuneOptions()
    training: TrainOptions = replace(default.training, **running)
    head_bits = int(options["head_bits"]) if options.get("head_bits") else None
    return TuneOptions(
        bits=int(options["bits"]), block=int(options["group"]), head_bits=head_bits,
        symmetric=not options.get("asymmetric", False), training=training, **given,
    )  # fmt: skip


def say_rows(rows: TuningRows, console: Console) -> None:
    """Which text is learnt, and what of it."""
    why = "; no text was given and SAAP_DATA is not set" if rows.self_written else ""
    part = "" if rows.kind == "text" else f", {rows.learnt} of {rows.ids.numel()} tokens are answers and learnt"
    console.say(f"  tuning text: {rows.source}{part}{why}")
    if rows.note:
        console.say(f"  {rows.note}")


def show_tuning(out: Path, history: History) -> None:
    """What was trained, and the losses before and after."""
    tuning, quant = read_record(out)["tuning"], read_config(out)["slim_quant"]
    options = tuning["options"]
    mixed = f", {len(quant['matrices'])} matrices other" if quant.get("matrices") else ""
    what = f"{options['fold']} fold" + (f", rank {options['rank']}" if options["rank"] else "")
    rows = [
        ["integers", f"{quant['bits']} bit, groups of {quant['block']}, head {quant['embedding_bits']} bit{mixed}"],
        ["trained", f"{what}, {tuning['trained_parameters']:,} parameters"],
        ["tokens", f"{history.tokens:,} in {history.precision}, {history.tokens / max(history.seconds, 1e-9):.0f} / s"],
        ["loss", _first_and_last(history.losses)],
    ]
    if history.held_out:
        best = min(loss for _, loss in history.held_out)
        rows.append(["held-out NLL", f"{history.held_out[0][1]:.4f} -> {best:.4f}, at step {history.best_step}"])
    if history.stopped:
        rows.append(["stopped", history.stopped])
    print_table("", ["", "tuned"], rows)


def _first_and_last(losses: list[float]) -> str:
    some = max(1, min(8, len(losses) // 2))
    first, last = (sum(part) / len(part) for part in (losses[:some], losses[-some:]))
    return f"{first:.4f} -> {last:.4f} (means of {some} steps)"
