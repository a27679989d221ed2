"""``saap eval``: perplexity, agreement with the dense model, and zero-shot tasks, of directories and bundles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import click
from msgspec import Meta

from devices.common.options import Option
from devices.common.progress import Progress
from devices.common.values import parse_count
from saap.cli.console import Console, print_table
from saap.cli.options import OptionsCommand, options_of
from saap.cli.types import directory
from saap.system.errors import UserError

if TYPE_CHECKING:
    from saap.evaluate.perplexity import Score
    from saap.evaluate.tasks import ContinuationModel, TaskOptions
    from saap.text.windows import Windows

STREAMED_TOKENS = 4096  # of one pass over a model that is read layer by layer
_TEXT, _TASKS = "Perplexity", "Zero-shot tasks"


@dataclass(frozen=True)
class EvalOptions:
    """What models are evaluated on."""

    text: Annotated[
        str | None,
        Option("A text, .jsonl or .gz file, or a data set id; default: SAAP_DATA, else self-written.", _TEXT),
    ] = None
    chunk: Annotated[int, Option("Tokens per chunk.", _TEXT)] = 256
    stride: Annotated[int | None, Option("Tokens from one chunk's start to the next's; default: the chunk.", _TEXT)] = (
        None
    )
    bos: Annotated[
        bool | None, Option("A beginning-of-sequence token before each chunk; default: as the tokenizer.", _TEXT)
    ] = None
    join: Annotated[
        Literal["raw", "paragraphs", "wikitext", "spaces"],
        Option("Lines as they are, by blank lines, or as papers join them: wikitext, and PTB by spaces.", _TEXT),
    ] = "raw"
    max_chunks: Annotated[int | None, Option("Chunks at most, or all.", _TEXT, metavar="N", parse=parse_count)] = 160
    reference: Annotated[
        Path | None, Option("The dense model directory that KL and top-1 are against.", _TEXT, metavar="MODEL")
    ] = None
    tasks: Annotated[
        str | None,
        Option("Such as piqa,arc_easy; with them perplexity only where --text is given.", _TASKS),
    ] = None
    task_dir: Annotated[
        Path | None, Option("Folder of the tasks' .jsonl files; default: the harness downloads.", _TASKS)
    ] = None
    max_examples: Annotated[
        int | None, Option("Of each task, drawn with --seed; default: all.", _TASKS), Meta(ge=1)
    ] = None
    seed: Annotated[int, Option("Of the examples that are drawn.", _TASKS)] = 0


@click.command(name="eval", cls=OptionsCommand)
@click.argument("paths", type=directory, nargs=-1, required=True)
@options_of(EvalOptions)
@click.option("--json", "json_path", type=directory, help="Write the numbers here, for compare and report.")
def evaluate(paths: tuple[Path, ...], json_path: Path | None, options: EvalOptions) -> None:
    """Perplexity, KL, top-1 agreement and zero-shot tasks of model directories and bundles.

    A perplexity is told with its protocol; `saap compare` refuses two of different ones.

    \b
    Example:
      saap eval out/bundle --reference smollm2-135m --max-chunks 40
      saap eval out/slim --text wiki.test.raw --chunk 2048 --join wikitext --max-chunks all
      saap eval out/slim out/bundle --tasks piqa,arc_easy --task-dir tasks/ --json quality.json
    """
    with Console() as console:
        evaluate_models(list(paths), options, json_path, console)


def evaluate_models(paths: list[Path], options: EvalOptions, json_path: Path | None, console: Console) -> None:
    """Evaluate, show, and write the document that ``saap compare`` and ``saap report`` read."""
    from bench.judge.quality import KIND, VERSION
    from saap.models.resolve import resolve
    from saap.system.files import check_place

    if json_path is not None:
        check_place(json_path)
    reference, tasks = options.reference, _task_options(options)
    everything = ([reference] if reference else []) + [p for p in paths if p != reference]
    named = {str(path): path if path.is_dir() else resolve(str(path), progress=console.report) for path in everything}
    document: dict[str, Any] = {"kind": KIND, "version": VERSION}
    if tasks is None or options.text is not None:
        windows = _windows(named, options, console)
        document |= quality_of(named, windows, str(reference) if reference else None, console)
        _keep(document, json_path)
        show_quality(document)
    else:
        rows = [{"name": name, **_size_of(path)} for name, path in named.items()]
        document |= {"protocol": None, "reference": str(reference) if reference else None, "rows": rows}
    if tasks is not None:
        for scores in tasks_of(named, tasks, console):
            document |= scores
            _keep(document, json_path)
        show_tasks(document)


def _keep(document: dict[str, Any], path: Path | None) -> None:
    """Before anything is shown, so that what took hours is there whatever happens then."""
    from saap.system.files import write_document

    if path is not None:
        write_document(path, document)


def scorer_of(path: Path, threads: int) -> Score:
    """Score with a model directory or a bundle."""
    import torch

    from saap.evaluate.perplexity import torch_scorer
    from saap.models.streaming import open_model

    if is_bundle(path):
        bundle = _bundle_scorer(path, threads)
        return lambda ids: torch.from_numpy(bundle.logits(ids.numpy()))
    return torch_scorer(open_model(path))


def quality_of(paths: dict[str, Path], windows: Windows, reference: str | None, console: Console) -> dict[str, Any]:
    """Evaluate directories and bundles over the same windows: the protocol and one row per name."""
    import torch

    from saap.evaluate.perplexity import evaluate as evaluate_scorers
    from saap.models.architectures import shape_of
    from saap.models.checkpoint import read_config
    from saap.models.needs import eval_needs
    from saap.models.streaming import whole_needs
    from saap.system.needs import check_memory, fits
    from saap.system.precision import fast_float32

    threads = torch.get_num_threads()
    large = [path for path in paths.values() if not is_bundle(path) and not fits(whole_needs(path))]
    batch = max(1, STREAMED_TOKENS // windows.ids.shape[1]) if large else None
    for config in map(read_config, large):
        if not config.get("slim_quant"):  # integers are small
            needs = eval_needs(shape_of(config), windows.ids[:batch].numel(), streamed=True)
            check_memory(needs, "evaluating", "give a smaller --chunk or fewer --max-chunks")
    with fast_float32():
        scorers = {name: scorer_of(path, threads) for name, path in paths.items()}
        results = evaluate_scorers(
            scorers, windows.ids, windows.counted, reference=reference, batch=batch, progress=console.report
        )
    table = []
    for result in results:
        row = result.as_dict()
        if windows.protocol.self_written:  # a model's own text says nothing about how well it models language
            row |= {"nll": None, "perplexity": None, "window_nll": None}
        table.append(row | _size_of(paths[result.name]))
    return {"protocol": windows.protocol.as_dict(), "reference": reference, "rows": table}


def tasks_of(paths: dict[str, Path], options: TaskOptions, console: Console) -> Iterator[dict[str, Any]]:
    """Zero-shot tasks of directories and bundles, one model in memory at a time; after each what is known by then."""
    from saap.evaluate.tasks import run_tasks, task_files
    from saap.models.resolve import load_tokenizer
    from saap.system.precision import fast_float32

    task_files(options)  # what is wrong with a file or a tokenizer is said before a model is loaded
    for path in paths.values():
        load_tokenizer(path)
    rows = []
    for name, path in paths.items():
        say = console.report if len(paths) == 1 else _named(name, console.report)
        with fast_float32():
            rows += [{"model": name, **row} for row in run_tasks(continuation_model(path), options, say)]
        yield {"tasks": rows, "task_seed": options.seed, "max_examples": options.max_examples}


def continuation_model(path: Path) -> Callable[[Progress | None], ContinuationModel]:
    """What makes the harness's model out of a directory or a bundle."""
    import torch

    from saap.evaluate.continuations import cached_continuations, torch_continuations
    from saap.evaluate.tasks import ContinuationModel
    from saap.models.resolve import load_tokenizer
    from saap.models.streaming import open_model

    def make(progress: Progress | None) -> ContinuationModel:
        tokenizer = load_tokenizer(path)
        if is_bundle(path):
            bundle = _bundle_scorer(path, 1)  # a thread per question instead of several for each
            scorer = cached_continuations(bundle.read, torch.get_num_threads())
            return ContinuationModel(scorer, tokenizer, bundle.manifest.context_length, progress)
        model = open_model(path)
        return ContinuationModel(
            torch_continuations(model), tokenizer, int(model.config.max_position_embeddings), progress
        )

    return make


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
    overlap = "no overlap" if protocol["stride"] == protocol["chunk"] else f"stride {protocol['stride']}"
    title = (
        f"{protocol['text']}: {protocol['chunks']} chunks of {protocol['chunk']} tokens, {overlap}, "
        f"{'BOS' if protocol['bos'] else 'no BOS'}, lines {protocol['join']}, {protocol['predictions']} predictions"
    )
    print_table(title, ["model", "perplexity", "NLL", "KL to dense", "top-1", "M params", "MB"], rows)


def show_tasks(document: dict[str, Any]) -> None:
    """Accuracies with their standard errors, a row per model, and the mean over the tasks."""
    from bench.judge.quality import metric_of

    names = list(dict.fromkeys(row["task"] for row in document["tasks"]))
    models = list(dict.fromkeys(row["model"] for row in document["tasks"]))
    found = {(row["model"], row["task"]): row for row in document["tasks"]}
    rows = []
    for model in models:
        cells = [_accuracy(found[model, task]) for task in names]
        scores = [found[model, task] for task in names]
        mean = sum(float(row[metric_of(row)]) for row in scores) / len(scores)
        rows.append([model, *cells, f"{mean:.1%}"])
    first = found[models[0], names[0]]
    count = f"{document['max_examples']} examples each (seed {document['task_seed']})"
    title = f"zero-shot, {count if document['max_examples'] else 'all examples'}: acc / acc_norm, +- standard error"
    print_table(title, ["model", *(f"{n} ({len(found[models[0], n]['examples'])})" for n in names), "mean"], rows)
    if first["sha256"] is None:
        print("  data sets: the harness's own")


def is_bundle(path: Path) -> bool:
    """Whether a directory is a bundle."""
    return (path / "bundle.json").is_file()


def _accuracy(row: dict[str, Any]) -> str:
    return " / ".join(
        f"{row[metric]:.1%} +- {100 * row[f'{metric}_stderr']:.1f}"
        for metric in ("acc", "acc_norm")
        if row.get(metric) is not None
    )


def _task_options(options: EvalOptions) -> TaskOptions | None:
    names = [name.strip() for name in (options.tasks or "").split(",") if name.strip()]
    if not names:
        if options.task_dir or options.max_examples:
            raise UserError("--task-dir and --max-examples belong to --tasks: name some, as piqa,arc_easy")
        return None
    from saap.evaluate.tasks import TaskOptions

    return TaskOptions(tuple(dict.fromkeys(names)), options.task_dir, options.max_examples, options.seed)


def _windows(named: dict[str, Path], options: EvalOptions, console: Console) -> Windows:
    from saap.text.overlap import refuse_seen
    from saap.text.windows import Cut, evaluation_windows

    paths = list(named.values())
    base = next((p for p in paths if not is_bundle(p)), paths[0])  # the reference comes first
    if options.text is None and is_bundle(base):
        from saap.text.documents import load_documents

        if load_documents(None, split="evaluation") is None:
            raise UserError("there is no text to evaluate on: give --text FILE, or --reference MODEL to write some")
    cut = Cut(options.chunk, options.stride, options.bos, options.join, options.max_chunks)
    windows, text = evaluation_windows(base, options.text, cut, console.report)
    if text is not None:
        for name, path in named.items():
            refuse_seen(name, _lineage_of(path), text)
    for name, path in named.items():
        _check_reads(name, path, windows)
    console.say_text("evaluation", windows.protocol.text, windows.protocol.self_written)
    return windows


def _check_reads(name: str, path: Path, windows: Windows) -> None:
    """Raise UserError where a model would read other ids than it knows, or more of them than it holds."""
    from saap.models.resolve import load_tokenizer
    from saap.text.windows import tokenizer_hash

    if tokenizer_hash(load_tokenizer(path)) != windows.protocol.tokenizer_sha256:
        raise UserError(f"{name} has another tokenizer than the first model: evaluate them one at a time")
    positions, tokens = _positions(path), windows.ids.shape[1]
    if tokens > positions:
        raise UserError(f"{name} holds {positions} tokens, a window has {tokens}: give a smaller --chunk")


def _positions(path: Path) -> int:
    if is_bundle(path):
        from export.bundle.manifest import read_manifest

        return read_manifest(path).context_length
    from saap.models.architectures import positions_of
    from saap.models.checkpoint import read_config

    return positions_of(read_config(path))


def _lineage_of(path: Path) -> dict[str, Any]:
    if is_bundle(path):
        from export.bundle.manifest import read_manifest

        return read_manifest(path).lineage
    from saap.models.checkpoint import read_record

    record = read_record(path)
    return record.get("lineage", {}) | {"tuning": record.get("tuning", {}).get("text")}


def _bundle_scorer(path: Path, threads: int) -> Any:
    from export.bundle.manifest import verify_files
    from export.generate.scoring import BundleScorer

    verify_files(path)
    return BundleScorer(path, threads)


def _named(name: str, report: Progress) -> Progress:
    return lambda label, done, total: report(f"{label}, {name}", done, total)


def _size_of(path: Path) -> dict[str, Any]:
    if is_bundle(path):
        from export.bundle.manifest import read_manifest

        manifest = read_manifest(path)
        size = sum(entry.bytes for name, entry in manifest.files.items() if ".onnx" in name)
        return {"parameters": manifest.parameters, "bytes": size}
    from saap.models.architectures import shape_of
    from saap.models.checkpoint import read_config
    from saap.models.weight_files import weights_bytes

    return {"parameters": shape_of(read_config(path)).parameters, "bytes": weights_bytes(path)}
