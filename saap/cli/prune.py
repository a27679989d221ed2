"""The commands that need torch, one function each. Part of the command line's room."""

from __future__ import annotations

import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from saap.cli.console import Console, plan_chart, print_table, speaks
from saap.models import resolve as models
from saap.models.architectures import shape_of
from saap.models.checkpoint import read_config, read_record
from saap.prune.options import REQUIREMENTS, AdaptiveOptions, FusionOptions, PruneOptions
from saap.prune.plan import Reasons
from saap.prune.pruning import budget_of, streamed
from saap.prune.pruning import prune as prune_model
from saap.prune.search.budget import Budget
from saap.prune.search.explain import layer_table, sentences
from saap.system.errors import UserError
from saap.system.json_files import read_object
from saap.system.outputs import check_output
from saap.text.rows import training_rows

NAMES = {"max_params": "parameters", "max_bytes": "bytes"}  # requirements whose numbers have another name
# Options that have the same name there.
PLAIN = (
    *REQUIREMENTS, "costs", "threads", "method", "compensate", "heads", "modules", "drop_layers", "keep_layers",
    "sequences", "length", "seed", "stream", "device",
)  # fmt: skip
REPORTED = (
    ("ratio", "layers' weights removed, %", 0.01, ".2f"),
    ("ratio_of_all", "all weights removed, %", 0.01, ".2f"),
    ("parameters", "parameters, M", 1e6, ".3f"),
    ("bytes", "weights file at {bits} bit, MB", 1e6, ".3f"),
    ("ms_per_token", "ms per token by the table", 1, ".3f"),
    ("speedup", "speed-up by the table", 1, ".3f"),
)


def prune_step(model: str, out: Path, options: dict[str, Any], console: Console, name: str | None = None) -> None:
    """``saap prune``."""
    prune_options = prune_options_of(options)
    prune_options.check_requirement()
    check_output(out)
    directory = models.resolve(model, progress=console.report)
    budget = budget_of(directory, prune_options)  # what cannot be met is refused before a text is read
    rows = training_rows(
        directory, options["calibration"], "calibration", options["sequences"], options["length"], options["seed"],
        console.report,
    )  # fmt: skip
    say_text("calibration", rows.source, rows.self_written, console)
    prune_options = replace(prune_options, stream=streamed(directory, budget, prune_options, *rows.ids.shape))
    if prune_options.stream:
        console.say("  the model is read layer by layer, one is in memory at a time")
    lineage = {"base": name or model, "calibration": rows.lineage()}
    plan = prune_model(directory, out, rows.ids, prune_options, lineage=lineage, progress=console.report)
    console.finish()
    if not speaks():
        return
    show_plan(out, budget)
    if options.get("explain") and plan.reasons:
        show_reasons(plan.reasons, prune_options)


def prune_options_of(options: dict[str, Any]) -> PruneOptions:
    """The options of ``saap prune``; what is missing is at its default."""
    fusion = {
        name: options[name] for name in ("score", "slices", "sigma", "stability", "layer_power") if name in options
    }
    chosen = {name: options[name] for name in ("c", "exact", "corrections", "prices") if name in options}
    costs = options.get("costs")
    onnxruntime = runtime_here(costs) if costs else None
    if options.get("here") and onnxruntime is None:
        refuse_elsewhere(costs)
    return PruneOptions(
        **{name: options[name] for name in PLAIN if name in options},
        bits=int(options.get("bits") or 4),  # type: ignore[arg-type]
        group_size=int(options["block"]),  # type: ignore[arg-type]
        onnxruntime=onnxruntime,
        stages=options.get("iterative_steps"),
        adaptive=AdaptiveOptions(fusion=FusionOptions(**fusion), **chosen),
    )


def runtime_here(costs: Path) -> str | None:
    """The version of ONNX Runtime here, if the table of costs was measured on this machine; else None.

    A table of another machine is taken as it is, since the device is rarely where the model is pruned. One of this
    machine has to be of the version that will run the bundle.
    """
    from devices.probe.host import fingerprint, probe

    try:
        device = read_object(costs, "").get("device")
        here = probe()
        versions = {name: here[name] for name in ("python", "onnxruntime")}
        same = fingerprint({**device, **versions}) == here["fingerprint"]  # type: ignore[dict-item]
    except (UserError, KeyError, TypeError):
        return None  # read_costs says what is wrong with the file
    return here["onnxruntime"] if same else None


def refuse_elsewhere(costs: Path | None) -> None:
    """Raise UserError for a table of costs of another machine; what is no table is left to who reads it."""
    from devices.probe.host import probe

    if costs is None:
        raise UserError("--here is about the table of --costs: give one, or leave --here out")
    try:
        there = read_object(costs, "")["device"]
        name = there.get("board") or there.get("cpu_model") or "an unnamed device"
        measured = f"{name} (fingerprint {there['fingerprint']})"
    except (UserError, KeyError, TypeError, AttributeError):
        return
    here = probe()
    raise UserError(
        f"{costs} was measured on {measured}, this machine is {here['board'] or here['cpu_model']} (fingerprint "
        f"{here['fingerprint']}): measure here with `saap devices probe --costs MODEL`, or leave --here out"
    )


def say_text(purpose: str, source: str, self_written: bool, console: Console) -> None:
    """Which text a step works on; where there was none, that the model wrote it."""
    why = "; no text was given and SAAP_DATA is not set" if self_written else ""
    console.say(f"  {purpose} text: {source}{why}")


def show_plan(slim: Path, budget: Budget) -> None:
    """The plan of a slim directory as a small chart, and what was asked, planned and achieved.

    What was achieved is counted from the directory as it was written.
    """
    plan, config = read_record(slim)["plan"], read_config(slim)
    click.echo(plan_chart(plan["dense_layers"], plan["layers"]))
    columns = [
        budget.report(budget.dense),
        {NAMES.get(kind, kind): value for kind, value in budget.asked.items()},
        plan["planned"],
        budget.report(shape_of(config), config),
    ]
    rows = [
        [title.format(bits=budget.bits), *("-" if c.get(key) is None else format(c[key] / unit, form) for c in columns)]
        for key, title, unit, form in REPORTED
        if key in columns[0]
    ]
    print_table("", ["", "dense", "asked", "planned", "achieved"], rows)
    if costs := budget.costs:
        threads = f"{costs['threads']} thread{'s' * (costs['threads'] > 1)}"
        click.echo(
            f"  times are by {costs['file']} ({costs['cpu_model'] or costs['board'] or 'an unnamed device'}, "
            f"ONNX Runtime {costs['onnxruntime']}, {threads}, {costs['depth']} tokens in the cache), not measured: "
            "export the model and its base, and `saap bench` them"
        )


def show_reasons(reasons: Reasons, options: PruneOptions) -> None:
    """Why each layer lost what it lost: a row each, then in words."""
    print_table(*layer_table(reasons))
    for sentence in sentences(reasons, options.method, options.keep_layers or frozenset()):
        click.echo(textwrap.fill(sentence, 98, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False))
