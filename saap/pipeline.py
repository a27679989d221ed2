"""The steps behind the torch commands, and ``saap run``, which chains them. Part of the command line's room.

``run`` keeps ``run.json`` in its directory: for every finished step the hash of what went into it. Started again, a
step whose input is the same and whose output is there is not repeated.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch

from saap import models
from saap.board import bench_specs, read_run, write_json
from saap.checkpoint import check_output, load_model, read_config, read_record
from saap.console import Console, plan_chart, print_table
from saap.errors import SaapError
from saap.eval import Score, evaluate, make_protocol, torch_scorer
from saap.prune import PruneOptions, Requirement
from saap.prune import prune as prune_model
from saap.rows import Rows, evaluation_rows, training_rows
from saap.tune import TuneOptions
from saap.tune import tune as tune_model

TUNE_LENGTH = 256
PARITY_ROWS, PARITY_TOKENS = 4, 256
PROMPTS = (
    "Explain in two sentences why the sky is blue.",
    "Write a short note to a neighbour who lent you a ladder.",
    "Name three things that plants need to grow.",
)


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
    prune_options = PruneOptions(
        requirement, int(options["block"]), None, options["keep_layers"], options["modules"], options["seed"]
    )
    lineage = {"base": name or model, "calibration": rows.lineage()}
    prune_model(directory, out, rows.ids, prune_options, lineage=lineage, progress=console.report)
    console.finish()
    show_plan(out)


def show_plan(slim: Path) -> None:
    """The plan of a slim directory as a small chart, and asked / planned / achieved."""
    plan = read_record(slim)["plan"]
    click.echo(plan_chart(plan["dense_layers"], plan["layers"]))
    achieved = plan["achieved"]
    asked = ", ".join(f"{k} {v:g}" for k, v in plan["asked"].items())
    click.echo(
        f"asked {asked}; planned {plan['planned']['ratio']:.2%} and achieved {achieved['ratio']:.2%} of the layers' weights "
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
    tune_model(
        slim, out, rows.ids, options_, teacher=load_model(teacher_dir) if teacher_dir else None,
        lineage={"text": rows.lineage()}, progress=console.report,
    )  # fmt: skip


def export_step(path: Path, out: Path, options: dict[str, Any], console: Console) -> None:
    """``saap export``."""
    check_output(out)
    bits = int(options["bits"]) if options["bits"] else None
    block = int(options["group"]) if options["group"] else None
    if options["target"] == "portable":
        if bits not in (None, 32) or block:
            raise SaapError("the portable target is fp32: leave --bits and --group out")
        from export.portable import export_portable

        export_portable(path, out, parity=_parity(path, options["text"], console), progress=console.report)
    else:
        from export.export import export_bundle

        export_bundle(
            path, out, bits=bits, block=block, parity=_parity(path, options["text"], console), progress=console.report
        )
    console.finish()
    show_bundle(out)


def _parity(path: Path, text: str | None, console: Console) -> Callable[[Path], dict[str, Any]]:
    from export.verify import check_parity

    def check(bundle: Path) -> dict[str, Any]:
        console.report("checking parity", 0, 1)
        ids, sample = parity_sample(path, text)
        report = check_parity(bundle, path, ids, sample)
        console.report("checking parity", 1, 1)
        return report

    return check


def parity_sample(path: Path, text: str | None) -> tuple[torch.Tensor, str]:
    """Rows to compare graphs on: real text where there is some, else random tokens."""
    from saap.text import load_documents, pack

    documents = load_documents(text, split="calibration")
    config = read_config(path)
    length = min(PARITY_TOKENS, config["max_position_embeddings"])
    if documents is not None:
        return pack(documents.texts, models.load_tokenizer(path), length, PARITY_ROWS, 1), documents.source
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config["vocab_size"], (PARITY_ROWS, length), generator=generator), "random tokens"


def show_bundle(bundle: Path) -> None:
    """One paragraph about a bundle."""
    from export.bundle import read_manifest

    manifest = read_manifest(bundle)
    size = sum(entry.bytes for name, entry in manifest.files.items() if ".onnx" in name)
    parity = manifest.parity or {}
    click.echo(
        f"{bundle}: {manifest.parameters / 1e6:.1f} M parameters, {manifest.bits} bit, {size / 1e6:.1f} MB, "
        f"{manifest.weight_bytes_per_token / 1e6:.1f} MB read per token\n"
        f"  parity on {parity.get('tokens')} tokens: logit difference {parity.get('max_abs_logit_difference', math.nan):.2g}, "
        f"top-1 agreement {parity.get('top1_agreement', math.nan):.2%}, "
        f"perplexity x {parity.get('perplexity_ratio', math.nan):.4f}"
    )


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
            r["name"], cell(r["perplexity"], ".2f"), cell(r["nll"], ".4f"), cell(r["kl"], ".4f"), cell(r["top1"], ".2%"),
            f"{r['parameters'] / 1e6:.1f}", f"{r['bytes'] / 1e6:.1f}",
        ]
        for r in quality["rows"]
    ]  # fmt: skip
    title = (
        f"{protocol['text']}: {protocol['chunks']} chunks of {protocol['chunk']} tokens, no overlap, no BOS, "
        f"{protocol['chunk'] - 1} predictions each"
    )
    print_table(title, ["model", "perplexity", "NLL", "KL to dense", "top-1", "M params", "MB"], rows)


@dataclass(frozen=True)
class RunOptions:
    """``saap run``."""

    ratio: float = 0.2
    calibration: str | None = None
    data: str | None = None
    text: str | None = None
    tokens: int = 24576
    repetitions: int = 5
    threads: int | None = None
    seed: int = 0
    sequences: int = 64
    length: int = 128
    chunk: int = 256
    max_chunks: int = 40


class _State:
    """``run.json``: what is finished, and what the report is made of."""

    def __init__(self, out: Path, model: str) -> None:
        self.out = out
        self.run: dict[str, Any] = {"model": model, "steps": []}
        if (out / "run.json").is_file():
            previous = read_run(out)
            if previous.get("model") == model:
                self.run = previous

    def step(
        self, name: str, inputs: Any, outputs: list[str], console: Console, work: Callable[[], dict[str, Any] | None]
    ) -> str:
        """Do a step unless it was done with the same inputs; returns the hash of its inputs.

        What ``work`` returns is kept in ``run.json``.
        """
        key = hashlib.sha256(json.dumps([name, inputs], sort_keys=True, default=str).encode()).hexdigest()[:16]
        done = next((s for s in self.run["steps"] if s["name"] == name), None)
        if done and done["key"] == key and all((self.out / path).exists() for path in outputs):
            console.say(f"{name}: done before ({done['seconds']:.0f} s)")
            return key
        console.say(f"{name} ...")
        start = time.monotonic()
        found = work() or {}
        entry = {"name": name, "key": key, "seconds": time.monotonic() - start, "command": inputs["command"]}
        self.run["steps"] = [s for s in self.run["steps"] if s["name"] != name] + [entry]
        self.run |= found
        write_json(self.out / "run.json", self.run)
        return key


def run_all(model: str, out: Path, options: RunOptions, console: Console) -> None:
    """Prune, tune, export dense and slim, evaluate, bench, write texts and the page."""
    requirement = Requirement(ratio=options.ratio)
    requirement.check()
    check_output(out)
    begun = time.monotonic()
    directory = models.resolve(model, progress=console.report)
    out.mkdir(parents=True, exist_ok=True)
    state = _State(out, model)
    write_json(out / "run.json", state.run)
    opts = asdict(options)
    evaluation = _evaluation(directory, options, console)

    prune_options = {
        "ratio": options.ratio, "max_params": None, "calibration": options.calibration, "sequences": options.sequences,
        "length": options.length, "block": "32", "keep_layers": frozenset(), "modules": False, "seed": options.seed,
    }  # fmt: skip
    key = state.step(
        "prune",
        {"command": f"saap prune {model} -o {out}/slim --ratio {options.ratio} --seed {options.seed}",
         "options": {k: str(v) for k, v in prune_options.items()}, "model": _identity(directory)},
        ["slim/saap.json"], console,
        lambda: prune_step(str(directory), out / "slim", prune_options, console, name=model) or {"plan": _plan(out / "slim")},
    )  # fmt: skip
    tune_options = {
        "bits": "4",
        "group": "32",
        "teacher": str(directory),
        "data": options.data,
        "tokens": options.tokens,
        "length": TUNE_LENGTH,
        "seed": options.seed,
    }
    tuned_key = state.step(
        "tune",
        {"command": f"saap tune {out}/slim -o {out}/tuned --teacher {model} --tokens {options.tokens}", "from": key,
         "options": tune_options},
        ["tuned/saap.json"], console, lambda: tune_step(out / "slim", out / "tuned", tune_options, console),
    )  # fmt: skip
    export_options = {"target": "cpu", "bits": None, "group": None, "text": options.calibration}
    bundles = {"dense-int4": directory, "slim-int4": out / "tuned"}
    keys = [
        state.step(
            f"export {name}",
            {"command": f"saap export {source if source != directory else model} -o {out}/{name}", "from": tuned_key if source != directory else _identity(directory)},
            [f"{name}/bundle.json"], console,
            lambda name=name, source=source: export_step(source, out / name, export_options, console) or _parity_of(out, state, name),
        )
        for name, source in bundles.items()
    ]  # fmt: skip
    compared = {"dense fp32": directory, "slim fp32, untuned": out / "slim", **{n: out / n for n in bundles}}
    state.step(
        "evaluate",
        {"command": f"saap eval {out}/slim {out}/dense-int4 {out}/slim-int4 --reference {directory} --max-chunks {options.max_chunks}",
         "from": keys, "options": [opts["text"], opts["chunk"], opts["max_chunks"]], "text": evaluation.sha256},
        [], console, lambda: {"quality": quality_of(compared, evaluation, "dense fp32", console)},
    )  # fmt: skip
    state.step(
        "bench",
        {"command": f"saap bench {out}/dense-int4 {out}/slim-int4 --repetitions {options.repetitions} --json {out}/bench.json",
         "from": keys, "options": [options.repetitions, options.threads]},
        ["bench.json"], console, lambda: _bench(out, list(bundles), options, console),
    )  # fmt: skip
    state.step(
        "texts", {"command": f'saap generate {out}/slim-int4 "{PROMPTS[0]}"', "from": keys}, [], console,
        lambda: {"texts": _texts(out, list(bundles), console)},
    )  # fmt: skip
    _finish(state, out, begun, console)


def _evaluation(directory: Path, options: RunOptions, console: Console) -> Rows:
    """The evaluation text, checked against what the model will be calibrated and tuned on before hours are spent."""
    from saap.text import load_documents, refuse_overlap

    rows = evaluation_rows(directory, options.text, options.chunk, options.max_chunks, [], console.report)
    for source in (options.calibration, options.data):
        documents = load_documents(source, split="calibration", seed=options.seed)
        if documents is not None and rows.documents is not None:
            refuse_overlap(documents, rows.documents)
    return rows


def _identity(directory: Path) -> list[Any]:
    """What tells one model directory from another without reading its weights."""
    return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in sorted(directory.glob("*.safetensors"))]


def _plan(slim: Path) -> dict[str, Any]:
    """The plan as the report shows it: counts per layer."""
    plan = dict(read_record(slim)["plan"])
    plan["layers"] = [{key: len(kept) for key, kept in layer.items()} for layer in plan["layers"]]
    return plan


def _parity_of(out: Path, state: _State, name: str) -> dict[str, Any]:
    from export.bundle import read_manifest

    return {"parity": {**state.run.get("parity", {}), name: read_manifest(out / name).parity}}


def _bench(out: Path, names: list[str], options: RunOptions, console: Console) -> dict[str, Any]:
    bench_specs(
        [str(out / name) for name in names], names=names, prompt=128, generate=128, threads=options.threads,
        repetitions=options.repetitions, json_path=out / "bench.json", console=console,
    )  # fmt: skip
    return {"results": ["bench.json"]}


def _texts(out: Path, names: list[str], console: Console) -> list[dict[str, Any]]:
    """The same prompts to every bundle, greedy."""
    from bench.runtime import OrtDecoder
    from export.run import generate
    from export.tokenizer import BundleTokenizer

    answers: list[dict[str, Any]] = [{"prompt": prompt, "outputs": {}} for prompt in PROMPTS]
    for number, name in enumerate(names):
        tokenizer = BundleTokenizer(out / name)
        decoder = OrtDecoder(out / name, torch.get_num_threads(), 256)
        for index, answer in enumerate(answers):
            console.report("writing texts", number * len(answers) + index, len(names) * len(answers))
            pieces = generate(decoder, tokenizer, answer["prompt"], max_tokens=96, chat=tokenizer.has_chat_template)
            answer["outputs"][name] = "".join(pieces)
    console.report("writing texts", 1, 1)
    return answers


def _finish(state: _State, out: Path, begun: float, console: Console) -> None:
    """The table at the end and the page."""
    import platform

    import onnxruntime
    import transformers

    from bench.report import write_report
    from bench.result import read_result
    from saap import __version__
    from saap.board import show_result

    state.run["versions"] = {
        "saap": __version__, "python": platform.python_version(), "torch": torch.__version__,
        "transformers": transformers.__version__, "onnxruntime": onnxruntime.__version__,
    }  # fmt: skip
    write_json(out / "run.json", state.run)
    write_report([out / "bench.json"], out / "report.html", run=state.run)
    click.echo()
    show_quality(state.run["quality"])
    show_result(read_result(out / "bench.json"))
    console.say(f"all of it took {time.monotonic() - begun:.0f} s; the page: {out / 'report.html'}")
