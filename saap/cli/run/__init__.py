"""``saap run``: every step from a model to a measured bundle and a page.

``run.json`` in the output directory keeps, for every finished step, the hash of what went into it. Started again, a
step whose input is the same and whose output is there is not repeated. It also keeps the command that does each step
alone.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from saap.base.errors import UserError
from saap.base.files import write_text
from saap.base.outputs import is_forced
from saap.cli.console import LOADING, Console, tell
from saap.cli.devices.fit import Planned, amount, board_commands, device_fit, fit_in_words, size_to_reach
from saap.cli.options import OptionsCommand, options_of
from saap.cli.prune import for_this_machine
from saap.cli.report import read_run
from saap.cli.run.options import COSTS, DEFAULT_RATIO, DEFAULT_SPEEDUP, RunOptions
from saap.cli.run.steps import DENSE_TUNED, SLIM, TUNED, Bench, Run, steps_of
from saap.cli.types import complete_model, directory, force

if TYPE_CHECKING:
    from saap.base.needs import Needs


@click.command(cls=OptionsCommand)
@click.argument("model", shell_complete=complete_model)
@click.option("-o", "--out", type=directory, required=True, help="Directory for everything that is made.")
@options_of(RunOptions)
@force
def run(model: str, out: Path, options: RunOptions) -> None:
    """All of it: prune, tune, export, evaluate, bench, report. Started again, it goes on where it was.

    \b
    Example:
      saap run smollm2-135m -o out/demo --speedup 1.3
      saap run smollm2-135m -o out/pi --for raspberry-pi-5 --memory 4GiB
    """
    from saap.base.writing import claimed

    with Console() as console, claimed(out):
        run_all(model, out, options.shortened, console)


def run_all(model: str, out: Path, options: RunOptions, console: Console) -> None:
    """Check all steps, then do them, and write the page."""
    from saap.models.resolve import kind_of, resolve

    kind_of(model)
    console.report(LOADING, 0, 0)
    named = options.pruning.options.asked or options.profile
    check_place(out, model, options)  # whose table is none of the inputs, if the first step measures one
    options = options.timed_here(out / COSTS)
    options.check()
    begun = time.monotonic()
    source = resolve(model, progress=console.report)
    if not named:
        console.say(f"no requirement is given: the model is pruned to {DEFAULT_SPEEDUP} times its speed here")
    job = Run(model, source, out, fitted(source, options, console), console)
    steps = steps_of(job)
    for step in sorted(steps, key=lambda step: not step.optional):  # what needs no text first
        step.attempt(step.check)
    steps = [step for step in steps if step.failure is None]
    check_run(run_needs(source, job.options, peer=any(step.optional for step in steps)), out)
    out.mkdir(parents=True, exist_ok=True)
    job.write()
    for number, step in enumerate(steps, 1):
        step.attempt(lambda step=step, number=number: job.do(step, f"[{number}/{len(steps)}]"))  # type: ignore[misc]
    finish(job, [step.result for step in steps if isinstance(step, Bench)], begun)


def fitted(source: Path, options: RunOptions, console: Console) -> RunOptions:
    """Return options with a requirement that fits on the device. Raises UserError: what was asked for does not fit."""
    from saap.prune.pruning import budget_of

    if (demands := options.demands) is None:
        return options
    pruning = options.pruning.options

    def within(size: int) -> RunOptions:
        sized = replace(
            pruning, ratio=None, max_params=None, speedup=None, ms_per_token=None, costs=None, max_bytes=size
        )
        return replace(options, pruning=replace(options.pruning, options=sized))

    def reachable(size: int) -> bool:
        try:
            budget_of(source, within(size).prune.options)
        except UserError:
            return False
        return True

    dense = Planned.of(source, options.export(tuned=False))
    size = size_to_reach(demands, dense, pruning.asked, DEFAULT_RATIO, reachable)
    if size is None:
        if not pruning.asked:
            console.say(f"{demands.device.name} has no table of costs: the model is pruned by a ratio, {DEFAULT_RATIO}")
        return options
    console.say(f"{demands.device.name} has room for a weights file of {amount(size)}: the model is pruned to that")
    return within(size)


def check_place(out: Path, model: str, options: RunOptions) -> None:
    """Refuse a directory that is not a new one or that of an earlier run of this model."""
    from export.bundle.manifest import MANIFEST
    from saap.base.writing import RECORD, RUN, check_output

    pruning, tuning = options.pruning, options.tuning
    inputs = (model, tuning.teacher, tuning.data, pruning.calibration, pruning.options.costs, options.text)
    check_output(out, *inputs, record=RUN)
    if is_forced() or not (out / RUN).is_file():
        return
    if (other := read_run(out).get("model")) != model:
        raise UserError(f"{out} holds a run of {other}, not of {model}: give another directory, or --force")
    for names, record in (((SLIM, TUNED, DENSE_TUNED), RECORD), (options.bundles, MANIFEST)):
        for name in names:
            check_output(out / name, record=record)


def run_needs(source: Path, options: RunOptions, *, peer: bool) -> dict[str, Needs]:
    """Memory of each step that may be the largest, read layer by layer where it can be, and the disk of all steps.

    ``peer``: the dense model is written for llama.cpp too.
    """
    from export.needs import PACKED, export_needs
    from export.options import PARITY_ROWS, PARITY_TOKENS
    from saap.base.needs import PROCESS, Needs
    from saap.models.architectures import shape_of
    from saap.models.checkpoint import read_config
    from saap.models.weight_files import weights_bytes
    from saap.prune.needs import prune_disk, prune_needs
    from saap.prune.pruning import budget_of
    from saap.quantize.bundle_size import bundle_size
    from saap.tune.needs import tune_needs

    shape, floats, tuning = shape_of(read_config(source)), weights_bytes(source), options.tuning.options
    bundle = bundle_size(read_config(source), tuning.bits, tuning.group).total(shape)
    pruning = for_this_machine(options.prune.options)
    if pruning.costs and not pruning.costs.is_file():  # the first step measures it; a guess is enough for sums
        share = 1 - 1 / (pruning.speedup or DEFAULT_SPEEDUP)
    else:
        share = budget_of(source, pruning).share
    training = tuning.training
    tokens = (training.micro_rows or training.rows_per_step) * tuning.length
    disk = prune_disk(shape, floats, share)
    disk |= {"the tuned model": round((1 - share) * bundle), "the tuned dense model": bundle,
             "two bundles": round((2 - share) * bundle)}  # fmt: skip
    if peer:
        disk |= {"the dense model for llama.cpp": bundle, "its floats": 2 * shape.parameters}
    element = pruning.adaptive.element if pruning.method == "saap" else "none"
    steps = {
        "pruning": prune_needs(shape, pruning.sequences, pruning.length, floats, streamed=True, element=element),
        "tuning": tune_needs(shape, tuning.bits, tuning.group, tokens, streamed=True),
        "exporting": export_needs(shape, bundle, PARITY_ROWS * PARITY_TOKENS),
        "evaluating": Needs({"the process": PROCESS, "both bundles, packed": round((2 - share) * PACKED * bundle)}),
    }
    return {name: Needs(needs.memory, disk) for name, needs in steps.items()}


def check_run(steps: dict[str, Needs], out: Path) -> None:
    """Refuse what memory or disk is too small for; the UserError names the step, the sum, and what there is."""
    from saap.base.needs import check_disk, check_memory, gigabytes

    name = max(steps, key=lambda step: steps[step].memory_bytes)
    others = ", ".join(f"{step} {gigabytes(needs.memory_bytes)}" for step, needs in steps.items() if step != name)
    advice = f"the other steps need {others}: call the commands one by one, or use a machine with more memory"
    check_memory(steps[name], f"a run, in its step {name},", advice)
    if not (out / "run.json").is_file():  # of a run that goes on, part lies there already; each step asks for its own
        check_disk(steps[name], out, "a run")


def finish(job: Run, results: list[Path], begun: float) -> None:
    """Write the page and the model card, and show the tables."""
    import platform

    import onnxruntime
    import torch
    import transformers

    from bench.judge.planned import integers_alone, planned_speed
    from bench.measure.result import read_result
    from bench.report.headline import bought_by
    from bench.report.page import report
    from saap import __version__
    from saap.base.quality import QUALITY
    from saap.cli.bench import show_result
    from saap.cli.eval import show_quality
    from saap.cli.model_card import model_card

    out = job.out
    job.file["versions"] = {
        "saap": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "onnxruntime": onnxruntime.__version__,
    }
    job.file["results"] = [path.name for path in results]
    slim = out / job.options.bundles[1]
    job.file.pop("device", None)
    job.file.pop("device_told", None)
    if demands := job.options.demands:
        job.file["device"] = device_fit(demands, slim)
        job.file["device_told"] = fit_in_words(job.file["device"], slim.name)
    job.write()
    report(results, out / "report.html", run=job.file)
    benches = [read_result(path) for path in results]
    write_text(out / "README.md", model_card(job.source, job.file, benches, job.options.bundles))
    click.echo()
    show_quality(QUALITY.convert(job.file["quality"]))
    for result in benches:
        show_result(result)
        lines = integers_alone(result), planned_speed(job.file["plan"], result), bought_by(result, job.file["quality"])
        for line in filter(None, lines):
            tell(f"  {line}")
    if device := job.file.get("device"):
        tell(job.file["device_told"])
        for what, command in board_commands(device, slim):
            click.echo(f"  {what + ':':<22} {command}")
    if silence := job.file.get("silence"):
        tell(f"  {silence}")
    click.echo("  what it keeps for the next run: saap cache (--clear removes it)")
    job.console.say(f"all of it took {time.monotonic() - begun:.0f} s; the page: {out / 'report.html'}")
