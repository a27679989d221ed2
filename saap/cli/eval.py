"""``saap eval``: perplexity, agreement with the dense model, and zero-shot tasks, of directories and bundles."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click

from saap.base.errors import UserError
from saap.base.options import Option
from saap.base.quality import QUALITY, Answers, Quality, TaskScore
from saap.cli.console import LOADING, Console, print_table
from saap.cli.options import OptionsCommand, options_of
from saap.cli.types import directory, force
from saap.evaluate.options import EvalOptions, check_options

if TYPE_CHECKING:
    import torch

    from bench.runtimes.peers import Peer
    from export.bundle.manifest import BundleManifest
    from export.engine.scoring import BundleScorer
    from export.engine.table import Row
    from saap.base.gguf_header import GgufHeader
    from saap.evaluate.answers import Writer
    from saap.evaluate.continuations import Scorer
    from saap.evaluate.evaluation import Subject
    from saap.evaluate.perplexity import Score

_TEXT = "Perplexity"


@dataclass(frozen=True)
class EvalCommand:
    """What ``saap eval`` is asked for: on which text, against whom, and how."""

    text: Annotated[
        str | None,
        Option("A text, .jsonl or .gz file, a data set id, or self; default: SAAP_DATA, else saap's sample.", _TEXT),
    ] = None
    reference: Annotated[
        Path | None, Option("The dense model directory that KL and top-1 are against.", _TEXT, metavar="MODEL")
    ] = None
    options: EvalOptions = field(default_factory=EvalOptions)


@click.command(name="eval", cls=OptionsCommand)
@click.argument("paths", type=directory, nargs=-1, required=True)
@options_of(EvalCommand)
@click.option("--json", "json_path", type=directory, help="Write the numbers here, for compare and report.")
@force
def evaluate(paths: tuple[Path, ...], json_path: Path | None, options: EvalCommand) -> None:
    """Perplexity, KL, top-1 agreement, zero-shot tasks and answers of model directories and bundles.

    llama.cpp:FILE.gguf and BUNDLE@llama.cpp run in llama.cpp, as `saap bench` takes them. A perplexity is told with its
    protocol; `saap compare` refuses two of different ones.

    \b
    Example:
      saap eval out/bundle --reference smollm2-135m --max-chunks 40
      saap eval out/slim --text wiki.test.raw --chunk 2048 --join wikitext --max-chunks all
      saap eval out/slim out/bundle --tasks piqa,arc_easy --task-dir tasks/ --json quality.json
      saap eval out/slim --reference smollm2-135m --answers 32
    """
    from export.engine.spec import BundleSpec, resolve
    from export.engine.table import ONNXRUNTIME
    from saap.base.outputs import QUALITY as OF_EVAL
    from saap.base.outputs import check_place
    from saap.models.resolve import kind_of

    console = Console.of_command()
    paths = tuple(path if is_for_llama_cpp(path) else Path(str(resolve(path, console))) for path in paths)
    for each in filter(None, (*paths, options.reference)):
        if not is_for_llama_cpp(each):
            kind_of(BundleSpec.of(each).bundle)  # before what takes seconds to import
    on_text = options.text is not None or not (options.options.tasks or options.options.answers)
    check_options(options.options, on_text=on_text)
    check_place(json_path, OF_EVAL, *paths, options.reference, options.text)
    asked = [name for name in ("tasks", "answers") if getattr(options.options, name)]
    if asked and (
        peers := [str(path) for path in paths if is_for_llama_cpp(path) or BundleSpec.of(path).row.name != ONNXRUNTIME]
    ):
        what = {"tasks": "asked zero-shot tasks", "answers": "given prompts"}[asked[0]]
        raise UserError(f"{peers[0]}: only ONNX Runtime is {what}: leave --{asked[0]} out, or give a bundle")
    console.report(LOADING, 0, 0)
    from saap.evaluate.evaluation import evaluate as evaluate_subjects
    from saap.evaluate.evaluation import subjects_of, windows_for
    from saap.text.encoding import head_words_of, long_spelling

    def keep(quality: Quality) -> None:
        """Before anything is shown, so that what took hours is there whatever happens then."""
        try:
            if json_path is not None:
                QUALITY.write(json_path, quality)
        finally:
            if quality.answers and not quality.tasks:
                show_answers(quality.answers)
            elif not quality.tasks:
                show_quality(quality)

    models, reference = [subject_of(path) for path in paths], options.reference and subject_of(options.reference)
    base, subjects = subjects_of(models, reference, console.report)
    windows = None
    if on_text:
        windows = windows_for(subjects, options.options, options.text, console.report)
        console.say_text("evaluation", windows.protocol.text)
        for note in filter(None, (long_spelling(each.path, windows.ids.flatten().tolist()) for each in subjects)):
            console.say(f"  {note}")
    if options.options.tasks:
        for subject in subjects:
            if head_words_of(subject.path) is not None:
                console.say(f"  {subject.name}: questions are read in all words, answers weighed in those it says")
    quality = evaluate_subjects(
        subjects, options.options, reference=base, text=windows, progress=console.report, keep=keep
    )
    if quality.tasks:
        show_tasks(quality)


def is_for_llama_cpp(path: Path) -> bool:
    """Whether it is ``llama.cpp:FILE``, as `saap bench` takes it."""
    from bench.runtimes.peers import LLAMA_CPP

    return str(path).startswith(LLAMA_CPP)


def subject_of(path: Path, name: str = "") -> Path | Subject:
    """A bundle in one of its engines, a GGUF file in llama.cpp, or a model by its directory or name."""
    from export.bundle.manifest import read_manifest
    from export.engine.spec import BundleSpec
    from export.engine.table import ONNXRUNTIME

    if is_for_llama_cpp(path):
        return GGUFInLlamaCpp.of(path, name)
    named = BundleSpec.of(path)
    if named.row.name != ONNXRUNTIME:
        named.source(read_manifest(named.bundle))  # before what takes long
        return BundleInEngine(name or str(path), named.bundle, row=named.row)
    path, name = named.bundle, name or (str(path) if named.engine else "")
    if (path / "bundle.json").is_file():
        return Bundle(name or str(path), path)
    if not name:
        return path
    from saap.evaluate.evaluation import Directory

    return Directory(name, path)


@dataclass(frozen=True)
class Bundle:
    """A bundle as what is evaluated (:class:`saap.evaluate.evaluation.Subject`), run by ONNX Runtime."""

    name: str
    path: Path
    writes: bool = False

    @property
    def manifest(self) -> BundleManifest:
        from export.bundle.manifest import read_manifest

        return read_manifest(self.path)

    def size(self) -> tuple[int, int]:
        """Parameters, and bytes of the graphs with their weights."""
        manifest = self.manifest
        return manifest.parameters, sum(entry.bytes for name, entry in manifest.files.items() if ".onnx" in name)

    def positions(self) -> int:
        return self.manifest.context_length

    def lineage(self) -> Mapping[str, object]:
        return self.manifest.lineage

    def scorer(self, device: torch.device) -> Score:
        import torch

        bundle = self._scorer(torch.get_num_threads())
        return lambda ids: torch.from_numpy(bundle.logits(ids.cpu().numpy()))

    def continuations(self, device: torch.device) -> tuple[Scorer, int]:
        """A thread per question instead of several for each."""
        import torch

        from saap.evaluate.continuations import cached_continuations

        return cached_continuations(self._scorer(1).read, torch.get_num_threads()), self.positions()

    def writer(self, device: torch.device, stops: Sequence[int]) -> Writer:
        import torch

        from export.generate.ort_model import BundleForCausalLM
        from saap.evaluate.answers import torch_writer

        return torch_writer(BundleForCausalLM.from_bundle(self.path, torch.get_num_threads()), stops)

    def _scorer(self, threads: int) -> BundleScorer:
        from export.bundle.manifest import verify_files
        from export.engine.scoring import BundleScorer

        verify_files(self.path)
        return BundleScorer(self.path, threads)


@dataclass(frozen=True)
class BundleInEngine(Bundle):
    """A bundle in another engine, in a process of its own."""

    row: Row = field(kw_only=True)

    def size(self) -> tuple[int, int]:
        """Parameters, and bytes of what the engine reads."""
        parameters, size = super().size()
        return parameters, self.manifest.files[self.row.file].bytes if self.row.file else size

    def scorer(self, device: torch.device) -> Score:
        import torch

        from export.bundle.manifest import verify_files
        from export.engine.opening import logits_in_process

        source = self.row.source(self.path, verify_files(self.path))
        logits = logits_in_process(self.row, source, torch.get_num_threads())
        return lambda ids: torch.from_numpy(logits(ids.cpu().numpy()))

    def continuations(self, device: torch.device) -> tuple[Scorer, int]:
        raise NotImplementedError(f"zero-shot tasks are not asked of {self.row.name}")

    def writer(self, device: torch.device, stops: Sequence[int]) -> Writer:
        raise NotImplementedError(f"{self.row.name} is given no prompts")


@dataclass(frozen=True)
class GGUFInLlamaCpp:
    """A GGUF file in llama.cpp as what is evaluated (:class:`saap.evaluate.evaluation.Subject`)."""

    name: str
    path: Path  # a directory with its tokenizer
    peer: Peer
    writes: bool = False

    @staticmethod
    def of(spec: str | Path, name: str = "", tokenizer: Path | None = None) -> GGUFInLlamaCpp:
        """What a spec names, with the tokenizer of the file where none is given. Raises UserError: it cannot run."""
        from bench.runtimes.peers import read_peers
        from saap.models.resolve import tokenizer_of_gguf

        (peer,) = read_peers([str(spec)], 1)
        return GGUFInLlamaCpp(name or str(spec), tokenizer or tokenizer_of_gguf(peer.path), peer)

    @property
    def header(self) -> GgufHeader:
        from saap.base.gguf_header import read_header

        return read_header(self.peer.path)

    def size(self) -> tuple[int, int]:
        """Parameters, and bytes of the file."""
        weights = sum(math.prod(tensor.shape) for tensor in self.header.tensors.values())
        return weights, self.peer.path.stat().st_size

    def positions(self) -> int:
        return self.header.context_length or 0

    def lineage(self) -> Mapping[str, object]:
        """What saap wrote into the file; nothing is known of others."""
        from saap.base.files import parse_json

        told = parse_json(str(self.header.metadata.get("saap.lineage", "{}")))
        return told if isinstance(told, dict) else {}

    def scorer(self, device: torch.device) -> Score:
        import torch

        from export.engine.opening import logits_in_process

        logits = logits_in_process(self.peer.row, self.peer.path, torch.get_num_threads())
        return lambda ids: torch.from_numpy(logits(ids.cpu().numpy()))

    def continuations(self, device: torch.device) -> tuple[Scorer, int]:
        raise NotImplementedError("zero-shot tasks are not asked of llama.cpp")

    def writer(self, device: torch.device, stops: Sequence[int]) -> Writer:
        raise NotImplementedError("llama.cpp is given no prompts")


def show_quality(quality: Quality) -> None:
    protocol = quality.protocol
    if protocol is None:
        return

    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    rows = [
        [
            row.name, cell(row.perplexity, ".2f"), cell(row.nll, ".4f"), cell(row.bits_per_byte, ".4f"),
            cell(row.kl, ".4f"), cell(row.top1, ".2%"), f"{row.parameters / 1e6:.1f}", f"{row.bytes / 1e6:.1f}",
        ]
        for row in quality.rows
    ]  # fmt: skip
    overlap = "no overlap" if protocol.stride == protocol.chunk else f"stride {protocol.stride}"
    title = (
        f"{protocol.text}: {protocol.chunks} chunks of {protocol.chunk} tokens, {overlap}, "
        f"{'BOS' if protocol.bos else 'no BOS'}, lines {protocol.join}, {protocol.predictions} predictions"
    )
    columns = ["model", "perplexity", "NLL", "bits/byte", "KL to dense", "top-1", "M params", "MB"]
    print_table(title, columns, rows, ("M params", "MB"))


def show_answers(answers: Answers) -> None:
    """Agreement and repetition, a row per model."""

    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    rows = [
        [score.model, cell(score.agreement, ".1%"), cell(score.same, ".1f"), f"{score.repetition:.1%}"]
        for score in answers.scores
    ]
    title = f"{answers.source}: greedy answers to {answers.prompts} prompts, {answers.tokens} tokens at most"
    print_table(title, ["model", "agreement", "same tokens", "repetition"], rows)


def show_tasks(quality: Quality) -> None:
    """Accuracies with their standard errors, a row per model, and the mean over the tasks."""
    names = list(dict.fromkeys(score.task for score in quality.tasks))
    models = list(dict.fromkeys(score.model for score in quality.tasks))
    found = {(score.model, score.task): score for score in quality.tasks}
    rows = []
    for model in models:
        scores = [found[model, task] for task in names]
        mean = sum(score.quoted or 0.0 for score in scores) / len(scores)
        rows.append([model, *map(_accuracy, scores), f"{mean:.1%}"])
    count = f"{quality.max_examples} examples each (seed {quality.task_seed})"
    title = f"zero-shot, {count if quality.max_examples else 'all examples'}: acc / acc_norm, +- standard error"
    print_table(title, ["model", *(f"{n} ({len(found[models[0], n].examples)})" for n in names), "mean"], rows)
    if found[models[0], names[0]].sha256 is None:
        print("  data sets: the harness's own")


def _accuracy(score: TaskScore) -> str:
    pairs = ((score.acc, score.acc_stderr), (score.acc_norm, score.acc_norm_stderr))
    return " / ".join(f"{value:.1%} +- {100 * (error or 0.0):.1f}" for value, error in pairs if value is not None)
