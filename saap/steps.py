"""The commands that need torch, one function each. Part of the command line's room."""

from __future__ import annotations

import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch

from saap import models
from saap.adaptive import AdaptiveOptions
from saap.architectures import shape_of
from saap.budget import Budget
from saap.checkpoint import check_output, load_model, read_config, read_record
from saap.console import Console, plan_chart, print_table
from saap.errors import SaapError
from saap.eval import Score, evaluate, make_protocol, torch_scorer
from saap.explain import Reasons
from saap.explain_words import layer_table, sentences
from saap.fusion import FusionOptions
from saap.json_files import read_object, write_json
from saap.prune import PruneOptions, budget_of
from saap.prune import prune as prune_model
from saap.requirement import KINDS, Requirement
from saap.rows import Rows, evaluation_rows, training_rows

NAMES = {"max_params": "parameters", "max_bytes": "bytes"}  # requirements whose numbers have another name
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
    requirement = requirement_of(options)
    requirement.check()
    check_output(out)
    directory = models.resolve(model, progress=console.report)
    prune_options = prune_options_of(options, requirement)
    budget = budget_of(directory, prune_options)  # what cannot be met is refused before a text is read
    rows = training_rows(
        directory, options["calibration"], "calibration", options["sequences"], options["length"], options["seed"],
        console.report,
    )  # fmt: skip
    say_text("calibration", rows, console)
    lineage = {"base": name or model, "calibration": rows.lineage()}
    plan = prune_model(directory, out, rows.ids, prune_options, lineage=lineage, progress=console.report)
    console.finish()
    show_plan(out, budget)
    if options.get("explain") and plan.reasons:
        show_reasons(plan.reasons, prune_options)


def prune_options_of(options: dict[str, Any], requirement: Requirement) -> PruneOptions:
    """The options of ``saap prune``; what is missing is at its default."""
    fusion = {
        name: options[name] for name in ("score", "slices", "sigma", "stability", "layer_power") if name in options
    }
    chosen = {
        mine: options[theirs]
        for mine, theirs in (("c", "c"), ("exact", "exact"), ("modules", "modules"), ("corrections", "corrections"))
        if theirs in options
    }  # fmt: skip
    rest = {name: options[name] for name in ("method", "compensate", "heads", "keep_layers", "seed") if name in options}
    adaptive = AdaptiveOptions(fusion=FusionOptions(**fusion), **chosen)
    return PruneOptions(
        requirement, block=int(options["block"]), adaptive=adaptive, steps=options.get("iterative_steps"), **rest
    )


def requirement_of(options: dict[str, Any]) -> Requirement:
    """The requirement among the options of ``saap prune``."""
    given = {kind: options.get(kind) for kind in KINDS}
    costs = options.get("costs")
    onnxruntime = runtime_here(costs) if costs else None
    if options.get("here") and onnxruntime is None:
        refuse_elsewhere(costs)
    return Requirement(
        **given, costs=costs, threads=options.get("threads"), bits=int(options.get("bits") or 4),
        block=int(options["block"]), onnxruntime=onnxruntime,
    )  # fmt: skip


def runtime_here(costs: Path) -> str | None:
    """The version of ONNX Runtime here, if the table of costs was measured on this machine; else None.

    A table of another machine is taken as it is, since the device is rarely where the model is pruned. One of this
    machine has to be of the version that will run the bundle.
    """
    from devices.probe import fingerprint, probe

    try:
        device = read_object(costs, "").get("device")
        here = probe()
        versions = {name: here[name] for name in ("python", "onnxruntime")}
        same = fingerprint({**device, **versions}) == here["fingerprint"]  # type: ignore[dict-item]
    except (SaapError, KeyError, TypeError):
        return None  # read_costs says what is wrong with the file
    return here["onnxruntime"] if same else None


def refuse_elsewhere(costs: Path | None) -> None:
    """Raise SaapError for a table of costs of another machine; what is no table is left to who reads it."""
    from devices.probe import probe

    if costs is None:
        raise SaapError("--here is about the table of --costs: give one, or leave --here out")
    try:
        there = read_object(costs, "")["device"]
        name = there.get("board") or there.get("cpu_model") or "an unnamed device"
        measured = f"{name} (fingerprint {there['fingerprint']})"
    except (SaapError, KeyError, TypeError, AttributeError):
        return
    here = probe()
    raise SaapError(
        f"{costs} was measured on {measured}, this machine is {here['board'] or here['cpu_model']} (fingerprint "
        f"{here['fingerprint']}): measure here with `saap devices probe --costs MODEL`, or leave --here out"
    )


def say_text(purpose: str, rows: Rows, console: Console) -> None:
    """Which text a step works on; where there was none, that the model wrote it."""
    why = "; no text was given and SAAP_DATA is not set" if rows.self_written else ""
    console.say(f"  {purpose} text: {rows.source}{why}")


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


def scorer_of(path: Path, threads: int) -> Score:
    """Score with a model directory or a bundle."""
    if (path / "bundle.json").is_file():
        from export.bundle import verify_files
        from export.run import BundleScorer

        verify_files(path)
        bundle = BundleScorer(path, threads)
        return lambda ids: torch.from_numpy(bundle.logits(ids.numpy()))
    return torch_scorer(load_model(path, materialise=True))


def eval_step(paths: list[Path], options: dict[str, Any], console: Console) -> None:
    """``saap eval``."""
    reference = options["reference"]
    base = reference or next((p for p in paths if not (p / "bundle.json").is_file()), paths[0])
    if options["text"] is None and (base / "bundle.json").is_file():
        from saap.text import load_documents

        if load_documents(None, split="evaluation") is None:
            raise SaapError("there is no text to evaluate on: give --text FILE, or --reference MODEL to write some")
    rows = evaluation_rows(base, options["text"], options["chunk"], options["max_chunks"], [], console.report)
    say_text("evaluation", rows, console)
    everything = ([reference] if reference else []) + [p for p in paths if p != reference]
    quality = quality_of({str(p): p for p in everything}, rows, str(reference) if reference else None, console)
    show_quality(quality)
    if options["json_path"] is not None:
        write_json(options["json_path"], quality)


def quality_of(paths: dict[str, Path], rows: Rows, reference: str | None, console: Console) -> dict[str, Any]:
    """Evaluate directories and bundles over the same chunks: the protocol and one row per name."""
    threads = torch.get_num_threads()
    scorers = {name: scorer_of(path, threads) for name, path in paths.items()}
    results = evaluate(scorers, rows.ids, reference=reference, progress=console.report)
    protocol = make_protocol(rows.source, rows.sha256 or "", rows.ids)
    table = []
    for result in results:
        row = result.as_dict()
        if rows.self_written:  # a model's own text says nothing about how well it models language
            row |= {"nll": None, "perplexity": None}
        table.append(row | _size_of(paths[result.name]))
    return {"protocol": {**asdict(protocol), "self_written": rows.self_written}, "reference": reference, "rows": table}


def _size_of(path: Path) -> dict[str, Any]:
    if (path / "bundle.json").is_file():
        from export.bundle import read_manifest

        manifest = read_manifest(path)
        size = sum(entry.bytes for name, entry in manifest.files.items() if ".onnx" in name)
        return {"parameters": manifest.parameters, "bytes": size}
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    return {"parameters": shape_of(read_config(path)).parameters, "bytes": size}


def show_quality(quality: dict[str, Any]) -> None:
    """The quality table with its protocol."""
    protocol = quality["protocol"]

    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    rows = [
        [
            r["name"],
            cell(r["perplexity"], ".2f"),
            cell(r["nll"], ".4f"),
            cell(r["kl"], ".4f"),
            cell(r["top1"], ".2%"),
            f"{r['parameters'] / 1e6:.1f}",
            f"{r['bytes'] / 1e6:.1f}",
        ]
        for r in quality["rows"]
    ]  # fmt: skip
    title = (
        f"{protocol['text']}: {protocol['chunks']} chunks of {protocol['chunk']} tokens, no overlap, no BOS, "
        f"{protocol['chunk'] - 1} predictions each"
    )
    print_table(title, ["model", "perplexity", "NLL", "KL to dense", "top-1", "M params", "MB"], rows)
