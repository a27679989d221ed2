"""``saap prune``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click

from saap.base.errors import UserError
from saap.base.options import Option, refuse_unused
from saap.base.wording import counted
from saap.cli.console import LOADING, Console, plan_chart, print_table, tell
from saap.cli.options import OptionsCommand, options_of
from saap.cli.types import complete_model, directory, force
from saap.prune.options import PruneOptions

if TYPE_CHECKING:
    from saap.models.record import Trial
    from saap.prune.plan import Reasons
    from saap.prune.pruning import PruneResult
    from saap.prune.search.budget import Budget

PROSE = 98  # columns of reasons where there is no terminal
NAMES = {"max_params": "parameters", "max_bytes": "bytes"}  # requirements whose numbers have another name
REPORTED = (
    ("ratio", "layers' weights removed, %", 0.01, ".2f"),
    ("ratio_of_all", "all weights removed, %", 0.01, ".2f"),
    ("parameters", "parameters, M", 1e6, ".3f"),
    ("bytes", "weights file at {bits} bit, MB", 1e6, ".3f"),
    ("ms_per_token", "ms per token by the table", 1, ".3f"),
    ("speedup", "speed-up by the table", 1, ".3f"),
)


@dataclass(frozen=True)
class PruneCommand:
    """The options of ``saap prune``: how to prune, on which text, and what is shown."""

    options: PruneOptions = field(default_factory=PruneOptions)
    calibration: Annotated[
        str | None,
        Option(
            "For scoring: a text, .jsonl or .gz file, or a data set id; default: SAAP_DATA, else saap's samples.",
            section="How it is chosen",
        ),
    ] = None
    explain: Annotated[bool, Option("Say why each layer lost what it lost.", section="How it is chosen")] = False
    wide: Annotated[bool, Option("--explain with a row per layer.", section="How it is chosen")] = False

    def check(self) -> None:
        if not self.explain:
            refuse_unused(self, ("wide",), "--explain", "give both")
        if self.options.vocabulary is not None and not self.options.asked:
            return
        self.options.check()
        self.options.check_used()


@click.command(cls=OptionsCommand)
@click.argument("model", shell_complete=complete_model)
@options_of(PruneCommand)
@click.option("-o", "--out", type=directory, required=True, help="The slim directory to write.")
@force
def prune(model: str, out: Path, options: PruneCommand) -> None:
    """Remove the coupled structures that matter least.

    \b
    Example:
      saap prune smollm2-135m -o out/slim --ratio 0.2
      saap devices costs smollm2-135m -t 1 -o cost.json
      saap prune smollm2-135m -o out/slim --speedup 1.25 --costs cost.json
    """
    options.check()
    from saap.models.resolve import kind_of

    kind_of(model)  # before what takes seconds to import
    with Console() as console:
        console(LOADING, 0, 0)
        from saap.prune.pruning import prune as prune_model
        from saap.prune.vocabulary import trim_by_text

        asked = for_this_machine(options.options)
        if asked.vocabulary is not None and not asked.asked:
            trim_by_text(model, asked, output=out, calibration=options.calibration, progress=console)
            console.finish()
            return
        result = prune_model(model, asked, output=out, calibration=options.calibration, progress=console)
        console.finish()
        show_pruned(result, options)


def show_pruned(result: PruneResult, asked: PruneCommand) -> None:
    """Print a chart of the plan, and its reasons if ``explain`` is set."""
    show_plan(result.path, result.budget)
    if advice := table_advice(result):
        tell(f"  {advice}", otherwise=PROSE)
    if asked.explain and result.plan.reasons:
        show_reasons(result.plan.reasons, asked.wide)


def table_advice(result: PruneResult) -> str:
    """Say what holds the file back where it shrinks by less than half of the ratio; empty elsewhere."""
    from saap.models.architectures import shape_of
    from saap.models.checkpoint import read_config
    from saap.models.slim_quant import GROUP_SIZES
    from saap.prune.search.model_cost import FileSize

    budget, size, ratio = result.budget, result.achieved["bytes"], result.budget.asked.get("ratio")
    dense = budget.report_dense()["bytes"]
    if not ratio or budget.size is None or not size or not dense or 1 - size / dense >= ratio / 2:
        return ""
    shape, forms = shape_of(read_config(result.path)), result.plan.forms
    outside = FileSize(budget.size).outside(shape, forms.vocabulary if forms else None) - 2 * sum(budget.size.rotary)
    larger = [str(g) for g in GROUP_SIZES if budget.bits != 32 and g > budget.group_size and shape.hidden % g == 0]
    scales = f", and --group-size {' or '.join(larger)} takes fewer scales" if larger else ""
    return (
        f"The exported file shrinks by {1 - size / dense:.0%}, not {ratio:.0%}: {outside / size:.0%} of it "
        "is embedding and head, which pruning of layers leaves as they are. `saap prune --vocabulary COUNT "
        f"--vocabulary-input` removes rows of them{scales}."
    )


def for_this_machine(options: PruneOptions) -> PruneOptions:
    """Add the version of ONNX Runtime that a cost table from this machine must come from.

    A table of another machine is taken as it is, since the device is rarely where the model is pruned.
    """
    return replace(options, onnxruntime=_runtime_here(options.costs) if options.costs else None)


def _runtime_here(costs: Path) -> str | None:
    """Return the version of ONNX Runtime here if the cost table was measured on this machine, else None."""
    from devices.probe.host import fingerprint, probe
    from saap.base.costs import read_cost_file

    try:
        there = read_cost_file(costs).device
    except UserError:
        return None  # who reads the table says what is wrong with it
    ours = probe()
    versions = {name: ours[name] for name in ("python", "onnxruntime")}
    with suppress(KeyError, TypeError):  # it does not say what a host is
        if fingerprint({**there, **versions}) == ours["fingerprint"]:
            return ours["onnxruntime"]
    return None


def show_plan(slim: Path, budget: Budget) -> None:
    """Print a chart of the plan, and what was required, planned and achieved, counted from the written directory."""
    from saap.models.architectures import architecture_of
    from saap.models.checkpoint import read_config
    from saap.models.record import read_record
    from saap.prune.forms import in_words

    plan = read_record(slim)["plan"]
    click.echo(plan_chart(plan["dense_layers"], plan["layers"]))
    columns: list[Mapping[str, float | None]] = [
        budget.report_dense(),
        {NAMES.get(kind, kind): value for kind, value in budget.asked.items()},
        plan["planned"],
        plan["achieved"],
    ]
    rows = [
        [
            title.format(bits=budget.bits),
            *("-" if (value := c.get(key)) is None else format(value / unit, form) for c in columns),
        ]
        for key, title, unit, form in REPORTED
        if key in columns[0]
    ]
    print_table("", ["", "dense", "asked", "planned", "achieved"], rows)
    words = read_record(slim).get("vocabulary")
    if words and (plan["reasons"] or {}).get("words"):  # which the search chose
        kept = f"the head predicts {words['rows']:,} of {words['of']:,} tokens"
        tell(f"  vocabulary: {kept}; such text takes {100 * words['longer']:.1f}% more tokens")
    if budget.forms:
        tables = architecture_of(read_config(slim)).tables
        tell(f"  integers: {in_words(plan['bundle'], tables)}; saap tune and export will use these")
    if trials := plan.get("trials"):
        show_trials(trials)
    if gap := plan.get("gap"):
        tell(f"  the search ended at its limit: a plan whose price is up to {gap:.1%} less may exist")
    if costs := budget.costs:
        threads = counted(costs["threads"], "thread")
        tell(
            f"  times are by {costs['file']} ({costs['cpu_model'] or costs['board'] or 'an unnamed device'}, "
            f"ONNX Runtime {costs['onnxruntime']}, {threads}, {costs['depth']} tokens in the cache), not measured: "
            "export the model and its base, and `saap bench` them"
        )


def show_trials(trials: Sequence[Trial]) -> None:
    """Print the plans that were tuned to choose between them, the best last."""
    rounds = sorted({int(tokens) for trial in trials for tokens in trial["kl"]})
    if not rounds:
        tell("  there was only one plan, so none was tuned")
        return
    order = sorted(trials, key=lambda trial: [-len(trial["kl"]), *reversed(trial["kl"].values())], reverse=True)
    rows = [
        [str(trial["gone"]), *(f"{trial['kl'][str(n)]:.4f}" if str(n) in trial["kl"] else "-" for n in rounds)]
        for trial in order
    ]
    heads = ["blocks gone", *(f"after {tokens:,} tokens" for tokens in rounds)]
    print_table("Tuned a little: KL to dense", heads, rows)


def show_reasons(reasons: Reasons, wide: bool) -> None:
    """Print why each layer lost what it lost, in sentences; ``wide``: also a row for each layer and kind."""
    from saap.prune.search.explain import kinds_table, layer_table, next_step, summary

    for sentence in summary(reasons):
        tell(f"  {sentence}", otherwise=PROSE)
    if wide:
        print_table(*layer_table(reasons))
        if next_step(reasons):
            print_table(*kinds_table(reasons))
