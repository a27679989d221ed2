"""The commands that need torch, one function each. Part of the command line's room."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch

from saap import models
from saap.checkpoint import check_output, load_model, read_config, read_record
from saap.console import Console, plan_chart, print_table
from saap.errors import SaapError
from saap.eval import Score, evaluate, make_protocol, torch_scorer
from saap.json_files import write_json
from saap.prune import PruneOptions, Requirement
from saap.prune import prune as prune_model
from saap.rows import Rows, evaluation_rows, training_rows
from saap.tune import TuneOptions
from saap.tune import tune as tune_model


def prune_step(model: str, out: Path, options: dict[str, Any], console: Console, name: str | None = None) -> None:
    """``saap prune``."""
    requirement = Requirement(options["ratio"], options["max_params"])
    requirement.check()
    check_output(out)
    directory = models.resolve(model, progress=console.report)
    rows = training_rows(
        directory, options["calibration"], "calibration", options["sequences"], options["length"], options["seed"],
        console.report,
    )  # fmt: skip
    say_text("calibration", rows, console)
    prune_options = PruneOptions(
        requirement, int(options["block"]), None, options["keep_layers"], options["modules"], options["seed"]
    )
    lineage = {"base": name or model, "calibration": rows.lineage()}
    prune_model(directory, out, rows.ids, prune_options, lineage=lineage, progress=console.report)
    console.finish()
    show_plan(out)


def say_text(purpose: str, rows: Rows, console: Console) -> None:
    """Which text a step works on; where there was none, that the model wrote it."""
    why = "; no text was given and SAAP_DATA is not set" if rows.self_written else ""
    console.say(f"  {purpose} text: {rows.source}{why}")


def show_plan(slim: Path) -> None:
    """The plan of a slim directory as a small chart, and asked / planned / achieved."""
    plan = read_record(slim)["plan"]
    click.echo(plan_chart(plan["dense_layers"], plan["layers"]))
    achieved = plan["achieved"]
    asked = ", ".join(f"{k} {v:g}" for k, v in plan["asked"].items())
    click.echo(
        f"asked {asked}; planned {plan['planned']['ratio']:.2%}, "
        f"achieved {achieved['ratio']:.2%} of the layers' weights "
        f"({achieved['ratio_of_all']:.2%} of all): {achieved['dense_parameters'] / 1e6:.1f} M -> "
        f"{achieved['parameters'] / 1e6:.1f} M parameters"
    )


def tune_step(slim: Path, out: Path, options: dict[str, Any], console: Console) -> None:
    """``saap tune``."""
    check_output(out)
    read_config(slim)
    length = options["length"]
    options_ = TuneOptions(bits=int(options["bits"]), block=int(options["group"]))
    calibrated = read_record(slim).get("lineage", {}).get("calibration", {})
    # Rows that scored the structures are passed over: the same text twice teaches less.
    skip = math.ceil(calibrated.get("sequences", 0) * calibrated.get("tokens", 0) / length)
    # Text that the model writes itself comes from the teacher where there is one: the slim model knows less.
    teacher_dir = models.resolve(options["teacher"], progress=console.report) if options["teacher"] else None
    rows = training_rows(
        teacher_dir or slim, options["data"], "tuning", max(1, options["tokens"] // length), length, options["seed"],
        console.report, skip=skip,
    )  # fmt: skip
    say_text("tuning", rows, console)
    tune_model(
        slim, out, rows.ids, options_, teacher=load_model(teacher_dir) if teacher_dir else None,
        lineage={"text": rows.lineage()}, progress=console.report,
    )  # fmt: skip


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
    from saap.architectures import shape_of

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
