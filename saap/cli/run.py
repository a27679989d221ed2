"""``saap run``: every step from a model to a measured bundle and a page. Part of the command line's room.

``run.json`` in the output directory keeps, for every finished step, the hash of what went into it. Started again, a
step whose input is the same and whose output is there is not repeated.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from saap.cli.bench import keep, measured, show_result
from saap.cli.console import Console
from saap.cli.eval import quality_of, show_quality
from saap.cli.export import DEFAULTS, export_step
from saap.cli.prune import (
    prune_options_of,
    prune_step,
    say_text,
)
from saap.cli.report import read_run
from saap.cli.run_needs import check_run
from saap.cli.run_options import TUNE_LENGTH, RunOptions
from saap.cli.tune import tune_step
from saap.models import resolve as models
from saap.models.architectures import shape_of, traits_of
from saap.models.checkpoint import read_config, read_record
from saap.prune.pruning import budget_of
from saap.system.json_files import write_document
from saap.system.outputs import check_output
from saap.text.rows import evaluation_windows
from saap.text.windows import Cut, Windows

PROMPTS = (
    "Explain in two sentences why the sky is blue.",
    "Write a short note to a neighbour who lent you a ladder.",
    "Name three things that plants need to grow.",
)
BUNDLES = ("dense-int4", "slim-int4")


class _State:
    """``run.json``: what is finished, and what the report is made of."""

    def __init__(self, out: Path, model: str, console: Console) -> None:
        self.out, self.console, self.number, self.steps = out, console, 0, 0
        self.run: dict[str, Any] = {"model": model, "steps": []}
        if (out / "run.json").is_file():
            previous = read_run(out)
            if previous.get("model") == model:
                self.run = previous

    def step(
        self, name: str, command: str, inputs: Any, outputs: list[str], work: Callable[[], dict[str, Any] | None]
    ) -> str:
        """Do a step unless it was done with the same inputs.

        Args:
            command: what a person would type to do this step alone.
            inputs: everything the outcome depends on; earlier steps by the hash that this function returned.
            outputs: paths below the run's directory that must be there for the step to count as done.
            work: does it; what it returns is kept in ``run.json``.

        Returns:
            the hash of the inputs.
        """
        self.number += 1
        key = hashlib.sha256(json.dumps([name, inputs], sort_keys=True, default=str).encode()).hexdigest()[:16]
        done = next((s for s in self.run["steps"] if s["name"] == name), None)
        if done and done["key"] == key and all((self.out / path).exists() for path in outputs):
            self.console.say(f"[{self.number}/{self.steps}] {name}: done before ({done['seconds']:.0f} s)")
            return key
        self.console.say(f"[{self.number}/{self.steps}] {name} ...")
        start = time.monotonic()
        found = work() or {}
        entry = {"name": name, "key": key, "seconds": time.monotonic() - start, "command": command}
        self.run["steps"] = [s for s in self.run["steps"] if s["name"] != name] + [entry]
        self.run |= found
        write_document(self.out / "run.json", self.run)
        return key


def run_all(model: str, out: Path, options: RunOptions, console: Console) -> None:
    """Prune, tune, export dense and slim, evaluate, bench, write texts and the page."""
    settings = options.prune_settings()
    pruning = prune_options_of(settings)
    pruning.check_requirement()
    check_output(out)
    begun = time.monotonic()
    directory = models.resolve(model, progress=console.report)
    # What cannot be met or exported is refused before hours are spent.
    _check_exportable(directory)
    check_run(directory, out, budget_of(directory, pruning), pruning, options)
    evaluation = _evaluation(directory, options, console)
    say_text("evaluation", evaluation.protocol.text, evaluation.protocol.self_written, console)
    out.mkdir(parents=True, exist_ok=True)
    state = _State(out, model, console)
    write_document(out / "run.json", state.run)
    dense = _identity(directory)
    state.steps = 6 + len(thread_counts(options))

    pruned = _prune(state, model, directory, options, dense)
    tuned = _tune(state, model, directory, options, pruned)
    exported = [
        _export(state, BUNDLES[0], directory, model, dense, options),
        _export(state, BUNDLES[1], out / "tuned", f"{out}/tuned", tuned, options),
    ]
    _evaluate(state, directory, evaluation, [pruned, *exported], options)
    results = _bench(state, exported, options)
    state.step(
        "texts", f'saap generate {out}/slim-int4 "{PROMPTS[0]}"', exported, [], lambda: {"texts": _texts(out, console)}
    )
    _finish(state, results, begun)


def _check_exportable(directory: Path) -> None:
    from export.graph.decoder import check_attention

    config = read_config(directory)
    check_attention(shape_of(config), traits_of(config), {})


def _prune(state: _State, model: str, directory: Path, options: RunOptions, dense: Any) -> str:
    out = state.out

    def work() -> dict[str, Any]:
        prune_step(str(directory), out / "slim", options.prune_settings(), state.console, name=model)
        return {"plan": _plan(out / "slim")}

    command = options.prune_command(model, out / "slim")
    return state.step("prune", command, [dense, options.prune_inputs()], ["slim/saap.json"], work)


def _tune(state: _State, model: str, directory: Path, options: RunOptions, pruned: str) -> str:
    out = state.out
    settings = {
        "bits": "4",
        "group": "32",
        "teacher": str(directory),
        "data": options.data,
        "tokens": options.tokens,
        "length": TUNE_LENGTH,
        "seed": options.seed,
    }
    command = f"saap tune {out}/slim -o {out}/tuned --teacher {model} --tokens {options.tokens} --seed {options.seed}"
    return state.step(
        "tune", command, [pruned, settings], ["tuned/saap.json"],
        lambda: tune_step(out / "slim", out / "tuned", settings, state.console),
    )  # fmt: skip


def _export(state: _State, name: str, source: Path, shown: str, made_from: Any, options: RunOptions) -> str:
    from export.bundle.manifest import read_manifest

    def work() -> dict[str, Any]:
        settings = {**DEFAULTS, "text": options.calibration}
        export_step(source, state.out / name, settings, state.console)
        return {"parity": {**state.run.get("parity", {}), name: read_manifest(state.out / name).parity}}

    command = f"saap export {shown} -o {state.out}/{name}"
    return state.step(f"export {name}", command, made_from, [f"{name}/bundle.json"], work)


def _evaluate(state: _State, directory: Path, windows: Windows, made_from: list[str], options: RunOptions) -> None:
    out = state.out
    paths = {"dense fp32": directory, "slim fp32, untuned": out / "slim", **{name: out / name for name in BUNDLES}}
    command = (
        f"saap eval {out}/slim {out}/{BUNDLES[0]} {out}/{BUNDLES[1]} --reference {directory} "
        f"--chunk {options.chunk} --max-chunks {options.max_chunks}"
    )
    inputs = [made_from, windows.protocol.as_dict()]
    state.step(
        "evaluate", command, inputs, [], lambda: {"quality": quality_of(paths, windows, "dense fp32", state.console)}
    )


def thread_counts(options: RunOptions) -> list[int]:
    """What the bench runs at: what was asked for, else one thread and all physical cores."""
    from bench.measure.cores import physical_cores

    return [options.threads] if options.threads else sorted({1, physical_cores()})


def _bench(state: _State, made_from: list[str], options: RunOptions) -> list[Path]:
    """One result per thread count: small models gain from a second thread what their operators allow, so show both."""
    results = []
    for threads in thread_counts(options):
        results.append(state.out / f"bench-{threads}.json")
        state.step(
            f"bench with {threads} thread{'s' * (threads > 1)}",
            f"saap bench {state.out}/{BUNDLES[0]} {state.out}/{BUNDLES[1]} --threads {threads} "
            f"--repetitions {options.repetitions} --json {results[-1]}",
            [made_from, options.repetitions, threads],
            [results[-1].name],
            partial(_bench_once, state, threads, options.repetitions, results[-1]),
        )
    return results


def _bench_once(state: _State, threads: int, repetitions: int, result: Path) -> None:
    from bench.measure.plan import Plan

    specs = [str(state.out / name) for name in BUNDLES]
    plan = Plan(threads=threads, repetitions=repetitions)
    keep(measured(specs, plan, state.console, list(BUNDLES)), result)


def _evaluation(directory: Path, options: RunOptions, console: Console) -> Windows:
    """The evaluation text, checked against what the model will be calibrated and tuned on before hours are spent."""
    from saap.text.documents import load_documents
    from saap.text.overlap import refuse_overlap

    cut = Cut(options.chunk, max_chunks=options.max_chunks)
    windows, text = evaluation_windows(directory, options.text, cut, console.report)
    for source in (options.calibration, options.data):
        documents = load_documents(source, split="calibration", seed=options.seed)
        if documents is not None and text is not None:
            refuse_overlap(documents, text)
    return windows


def _identity(directory: Path) -> list[Any]:
    """What tells one model directory from another without reading its weights."""
    return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in sorted(directory.glob("*.safetensors"))]


def _plan(slim: Path) -> dict[str, Any]:
    """The plan as the report shows it: counts per layer."""
    plan = dict(read_record(slim)["plan"])
    plan["layers"] = [{key: len(kept) for key, kept in layer.items()} for layer in plan["layers"]]
    return plan


def _texts(out: Path, console: Console) -> list[dict[str, Any]]:
    """The same prompts to every bundle, greedy."""
    from bench.runtimes.onnxruntime import OrtDecoder
    from export.bundle.tokenizer import BundleTokenizer
    from export.generate.run import generate

    answers: list[dict[str, Any]] = [{"prompt": prompt, "outputs": {}} for prompt in PROMPTS]
    for number, name in enumerate(BUNDLES):
        tokenizer = BundleTokenizer(out / name)
        decoder = OrtDecoder(out / name, torch.get_num_threads(), 256)
        for index, answer in enumerate(answers):
            console.report("writing texts", number * len(answers) + index, len(BUNDLES) * len(answers))
            pieces = generate(decoder, tokenizer, answer["prompt"], max_tokens=96, chat=tokenizer.has_chat_template)
            answer["outputs"][name] = "".join(pieces)
    console.report("writing texts", len(BUNDLES) * len(answers), len(BUNDLES) * len(answers))
    return answers


def _finish(state: _State, results: list[Path], begun: float) -> None:
    """The page, and the tables at the end."""
    import platform

    import onnxruntime
    import transformers

    from bench.measure.store import read_result
    from bench.report.page import write_report
    from saap import __version__

    out = state.out
    state.run["versions"] = {
        "saap": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "onnxruntime": onnxruntime.__version__,
    }
    state.run["results"] = [path.name for path in results]
    write_document(out / "run.json", state.run)
    write_report(results, out / "report.html", run=state.run)
    click.echo()
    show_quality(state.run["quality"])
    for path in results:
        show_result(read_result(path))
    state.console.say(f"all of it took {time.monotonic() - begun:.0f} s; the page: {out / 'report.html'}")
