"""Steps of ``saap run``: each knows its inputs, its outputs, the command that does it alone, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import math
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, cast

from msgspec import convert

from bench.costs.options import CostsOptions
from export.options import PARITY_ROWS
from saap.base.errors import UserError
from saap.base.options import arguments_of
from saap.cli.console import Console, heard_or_not
from saap.cli.devices.costs import CostsCommand, probe_costs
from saap.cli.devices.fit import Planned, check_pruned
from saap.cli.prune import for_this_machine, show_pruned
from saap.cli.report import RUN, FinishedStep, RunFile, read_run
from saap.cli.run.options import COSTS, DEFAULT_RATIO, RunOptions
from saap.cli.tune import tune_model
from saap.models.directory import weight_files
from saap.system.device_names import AUTO
from saap.tune.options import GroupSize

if TYPE_CHECKING:
    from saap.text.windows import Windows

SLIM, TUNED, DENSE_TUNED = "slim", "tuned", "dense-tuned"  # directories
PROMPTS = (
    "Explain in two sentences why the sky is blue.",
    "Write a short note to a neighbour who lent you a ladder.",
    "Name three things that plants need to grow.",
)
ANSWER_TOKENS = 96
REPEATS = 0.5  # most of an answer was in it before
RATIO_S = 15  # of turns for each model: of two, a ratio within about 1 %


class Run:
    """State that all steps share; ``file`` is ``run.json``: the finished steps, and what the report shows."""

    def __init__(self, model: str, source: Path, out: Path, options: RunOptions, console: Console) -> None:
        self.model, self.source, self.out, self.options, self.console = model, source, out, options, console
        # What tells one model directory from another without reading its weights.
        self.dense = [[file.name, (stat := file.stat()).st_size, stat.st_mtime_ns] for file in weight_files(source)]
        self.file: RunFile = {"model": model, "steps": []}
        if (out / "run.json").is_file() and (previous := read_run(out)).get("model") == model:
            self.file = previous

    @cached_property
    def dense_group_size(self) -> int:
        """The group size of the dense bundle that the slim one is compared with: the fastest by the table of costs."""
        from saap.prune.pruning import budget_of

        options = self.options.prune.options
        if options.costs is None:
            return self.options.tuning.options.group
        return budget_of(self.source, for_this_machine(options)).fastest_group_size

    def do(self, step: Step, place: str) -> None:
        """Do a step unless it was done with the same inputs, and its outputs are there."""
        step.prepare()
        if step.needless:
            return
        done = next((entry for entry in self.file["steps"] if entry["name"] == step.name), None)
        if done and done["key"] == step.key and all((self.out / path).exists() for path in step.outputs):
            self.console.say(f"{place} {step.name}: done before ({done['seconds']:.0f} s)")
            return
        self.console.say(f"{place} {step.name} ...")
        start = time.monotonic()
        with heard_or_not():
            result = step.work()
        line = shlex.join(["saap", *map(str, step.command)])
        entry: FinishedStep = {"name": step.name, "key": step.key, "seconds": time.monotonic() - start, "command": line}
        self.file["steps"] = [other for other in self.file["steps"] if other["name"] != step.name] + [entry]
        self.file |= result
        self.write()

    def write(self) -> None:
        RUN.write(self.out / "run.json", self.file)


class Step:
    """A step of a run.

    Attributes:
        inputs: everything the outcome depends on; earlier steps by their keys.
        outputs: paths below the run's directory that must be there for the step to count as done.
        command: the words after `saap` that do this step alone.
        needless: whether there is nothing to do, which is known once it is prepared.
        optional: whether a run goes on without it if it fails; ``failure`` says why it is left out.
    """

    name: str
    inputs: object
    outputs: tuple[str, ...] = ()
    command: list[object]
    needless = False
    optional = False
    failure: str | None = None

    def __init__(self, run: Run) -> None:
        self.run = run

    @property
    def key(self) -> str:
        """A hash of the inputs."""
        content = json.dumps([self.name, self.inputs], sort_keys=True, default=str)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def check(self) -> None:
        """Refuse, before hours are spent on earlier steps, what this one cannot do. Raises UserError."""

    def prepare(self) -> None:
        """Set inputs and command, once earlier steps are done."""

    def work(self) -> RunFile:
        """Do it; returns the fields of ``run.json`` that come of it."""
        raise NotImplementedError

    def attempt(self, work: Callable[[], None]) -> None:
        """Check or do this step; if an optional one fails, a line says why it is left out."""
        try:
            work()
        except UserError as error:
            if not self.optional:
                raise
            self.failure = str(error)
            self.run.console.say(f"  llama.cpp is not compared with: {error}")


def settings_in(options: object) -> dict[str, object]:
    """Return the fields of a step's options that its outcome depends on: all but the compute device."""

    def fields(pairs: list[tuple[str, object]]) -> dict[str, object]:
        return {name: value for name, value in pairs if name != "device"}

    return asdict(options, dict_factory=fields)  # type: ignore[call-overload, no-any-return]


class Time(Step):
    """A quick table of costs of this machine, for a run that asks for a speed and names no table."""

    name, outputs = "time the layers", (COSTS,)

    def __init__(self, run: Run) -> None:
        from devices.probe.host import probe

        super().__init__(run)
        quant, threads = run.options.tuning.options, run.options.thread_counts[-1]
        self.options = CostsCommand(CostsOptions((threads,)), quant.bits, quant.group_size, quick=True)
        self.inputs = [run.dense, probe()["fingerprint"], settings_in(self.options)]
        self.command = ["devices", "costs", run.model, "-o", run.out / COSTS, *arguments_of(self.options)]

    def work(self) -> RunFile:
        from bench.costs.measure import write_costs
        from bench.remote.target import target

        run, costs = self.run, self.run.out / COSTS
        here = target(None, self.options.board, run.console.say)
        for _ in range(2):
            table = probe_costs(run.source, costs, self.options.shortened, here, run.console.report)
            run.console.finish()
            if not table.reasons or run.options.pruning.options.accept_invalid:
                write_costs(costs, table)
                return {}
            run.console.say(f"  {table.status}: {'; '.join(table.reasons)}")
        raise UserError(
            "this machine is too busy to measure what a layer takes: end other programs and repeat the command, "
            f"or ask for a size: saap run {run.model} -o {run.out} --ratio {DEFAULT_RATIO}"
        )


class Prune(Step):
    """The slim model."""

    name, outputs = "prune", ("slim/saap.json",)

    def __init__(self, run: Run, timed: Time | None) -> None:
        from saap.base.costs import COSTS

        super().__init__(run)
        options = run.options.prune
        settings = settings_in(replace(options, options=replace(options.options, costs=None)))
        if timed:
            settings["costs"] = timed.key
        elif costs := options.options.costs:
            settings["costs"] = hashlib.sha256(COSTS.content(costs).encode()).hexdigest()
        self.inputs = [run.dense, settings]
        self.command = ["prune", run.model, "-o", run.out / SLIM, *arguments_of(options)]

    def check(self) -> None:
        from saap.prune.pruning import calibration_rows
        from saap.text.rows import check_length

        source, prune = self.run.source, self.run.options.prune
        check_length(source, prune.options.length)
        calibration_rows(source, prune.calibration, prune.options)

    def work(self) -> RunFile:
        from saap.models.record import read_record
        from saap.prune.pruning import prune

        run, command = self.run, self.run.options.prune
        options, slim = for_this_machine(command.options), run.out / SLIM
        result = prune(run.model, options, output=slim, calibration=command.calibration, progress=run.console)
        run.console.finish()
        show_pruned(result, command)
        plan = read_record(slim)["plan"]
        counts = [{name: len(cast("list[int]", kept)) for name, kept in layer.items()} for layer in plan["layers"]]
        return {"plan": {**plan, "layers": counts}}


class Tune(Step):
    """The slim model tuned, or the dense one, on the same text."""

    def __init__(self, run: Run, pruned: Prune | None) -> None:
        super().__init__(run)
        self.pruned, self.folder = pruned, TUNED if pruned else DENSE_TUNED
        self.name, self.outputs = "tune" if pruned else "tune dense", (f"{self.folder}/saap.json",)
        self.source = run.out / SLIM if pruned else run.source
        reader = run.options.pruning.options
        least = math.ceil(reader.rows * reader.length / run.options.tuning.options.length)
        self.options = run.options.tune(run.model, None if pruned else least)

    def check(self) -> None:
        from saap.models.resolve import resolve
        from saap.text.documents import Sequences
        from saap.text.rows import check_length, tuning_rows
        from saap.tune.teacher import check_same_vocabulary

        if self.pruned:  # it is not there yet, and its text is the dense model's
            return
        tuning, data = self.options.options, self.options.data
        if teacher := self.run.options.tuning.teacher:
            check_same_vocabulary(resolve(teacher), self.source)
        check_length(self.source, tuning.length)
        rows = Sequences(tuning.tokens // tuning.length, tuning.length, tuning.training.seed, tuning.skip or 0)
        tuning_rows(self.source, data, rows, tuning.kind)

    def prepare(self) -> None:
        from saap.tune.tuning import rows_read

        run, options = self.run, self.run.options
        if self.pruned and (demands := options.demands):  # before hours of tuning
            check_pruned(demands, Planned.of(self.source, options.export(tuned=False)))
        if not self.pruned:  # the dense model skips what pruning read, as the slim one does by its record
            self.options = options.tune(run.model, rows_read(run.out / SLIM, self.options.options.length))
            if run.dense_group_size != options.tuning.options.group:
                form = replace(self.options.options, group_size=convert(run.dense_group_size, GroupSize))
                self.options = replace(self.options, options=form)
        self.inputs = [self.pruned.key if self.pruned else run.dense, settings_in(self.options)]
        source = self.source if self.pruned else run.model
        self.command = ["tune", source, "-o", run.out / self.folder, *arguments_of(self.options)]

    def work(self) -> RunFile:
        tune_model(self.source, self.run.out / self.folder, self.options, self.run.console)
        return {}


class Export(Step):
    """A bundle of a tuned model."""

    def __init__(self, run: Run, tuned: Tune, bundle: str) -> None:
        super().__init__(run)
        self.tuned, self.bundle = tuned, run.out / bundle
        self.name, self.outputs = f"export {bundle}", (f"{bundle}/bundle.json",)
        self.options = run.options.export(tuned=True)
        if tuned.pruned:
            self.options = replace(self.options, engines=(AUTO,))  # the file that is fastest on some CPUs costs little
        self.command = ["export", run.out / tuned.folder, "-o", self.bundle, *arguments_of(self.options)]

    def prepare(self) -> None:
        self.inputs = [self.tuned.key, settings_in(self.options)]

    def check(self) -> None:
        from export.source import ModelSource
        from export.write import graph_writer, sample_rows
        from saap.models.architectures import shape_of
        from saap.models.checkpoint import read_config
        from saap.quantize.bundle_size import bundle_size

        if self.tuned.pruned:
            return
        source, quant = self.run.source, self.run.options.tuning.options
        config = read_config(source)
        graph_writer(ModelSource(source), self.run.options.export(tuned=False))
        bundle_size(config, quant.bits, quant.group).check(shape_of(config))
        sample_rows(source, self.options.text, PARITY_ROWS)

    def work(self) -> RunFile:
        from export.bundle.manifest import read_manifest
        from saap.cli.export import export_model

        export_model(self.run.out / self.tuned.folder, self.bundle, self.options, self.run.console)
        parity = read_manifest(self.bundle).parity
        return {"parity": {**self.run.file.get("parity", {}), self.bundle.name: parity and asdict(parity)}}


class Plain(Step):
    """The dense bundle in the group size of the options, where another one is faster: for its speed alone, so that its
    weights are rounded to the nearest integers.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.bundle = run.out / run.options.plain
        self.options = replace(run.options.export(tuned=False), parity="none", integers="nearest", text=None)
        self.name, self.outputs = f"export {self.bundle.name}", (f"{self.bundle.name}/bundle.json",)
        self.inputs = [run.dense, settings_in(self.options)]
        self.command = ["export", run.model, "-o", self.bundle, *arguments_of(self.options)]

    def prepare(self) -> None:
        self.needless = self.run.dense_group_size == self.run.options.tuning.options.group

    def work(self) -> RunFile:
        from saap.cli.export import export_model

        export_model(self.run.source, self.bundle, self.options, self.run.console)
        return {}

    @property
    def specs(self) -> dict[str, str]:
        return {} if self.needless else {self.bundle.name: str(self.bundle)}


class Peer(Step):
    """The dense model as llama.cpp quantizes it, which is what a user would otherwise run."""

    optional = True

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.file, self.options = run.out / run.options.peer, run.options.peer_export
        self.name, self.outputs = f"export {self.file.name}", (self.file.name,)
        self.inputs = [run.dense, settings_in(self.options)]
        self.command = ["export", run.model, "-o", self.file, *arguments_of(self.options)]

    def check(self) -> None:
        from export.gguf.families import open_source
        from export.gguf.llama_cpp import quantizer

        open_source(self.run.source, "F16", None)
        quantizer()

    def work(self) -> RunFile:
        import numpy as np

        from export.engine.opening import logits_in_process
        from export.engine.table import LLAMA_CPP, row_of
        from saap.cli.export import export_model

        export_model(self.run.source, self.file, self.options, self.run.console)
        logits = logits_in_process(row_of(LLAMA_CPP), self.file, 1)
        logits(np.zeros((1, 1), np.int64))  # fails before anything rests on it
        return {}

    @property
    def specs(self) -> dict[str, str]:
        """The models that are measured beside the bundles, by name: the peer, and the slim bundle's other engines."""
        from bench.runtimes.peers import LLAMA_CPP
        from export.bundle.manifest import read_manifest
        from export.engine.table import ONNXRUNTIME, engines_in

        if self.failure is not None:
            return {}
        bundle = self.run.out / self.run.options.bundles[1]
        others = [engine for engine in engines_in(read_manifest(bundle)) if engine != ONNXRUNTIME]
        return {self.run.options.peer_name: f"{LLAMA_CPP}{self.file}"} | {
            f"{bundle.name}@{engine}": f"{bundle}@{engine}" for engine in others
        }


class Evaluate(Step):
    """The quality of every model, by one text."""

    name = "evaluate"
    windows: Windows

    def __init__(self, run: Run, pruned: Prune, exports: list[Export], peer: Peer) -> None:
        super().__init__(run)
        self.pruned, self.exports, self.peer = pruned, exports, peer

    def prepare(self) -> None:
        run, options, peer = self.run, self.run.options, self.peer
        earlier = [self.pruned, *self.exports, *([peer] if peer.failure is None else [])]
        self.inputs = [[step.key for step in earlier], asdict(self.windows.protocol)]
        bundles = [export.bundle for export in self.exports]
        self.command = ["eval", run.out / SLIM, *bundles, *peer.specs.values(), "--reference", run.model]
        self.command += ["--chunk", options.chunk, "--max-chunks", options.max_chunks]
        self.command += ["--text", options.text] if options.text else []

    def check(self) -> None:
        """Refuse a text that the model is pruned or tuned on, or one that is too short."""
        from saap.models.architectures import positions_of
        from saap.models.checkpoint import read_config
        from saap.text.documents import load_documents
        from saap.text.overlap import refuse_overlap
        from saap.text.windows import Cut, evaluation_windows

        source, options = self.run.source, self.run.options
        positions = positions_of(read_config(source))
        cut = Cut(options.chunk, max_chunks=options.max_chunks)
        self.windows, text = evaluation_windows(source, options.text, cut)
        if self.windows.ids.shape[1] > positions:
            raise UserError(
                f"chunk {options.chunk} is more than the {positions} positions of {source}: set a smaller one"
            )
        for other in (options.pruning.calibration, options.tuning.data):
            refuse_overlap(load_documents(other, split="calibration", seed=options.pruning.options.seed), text)
        self.run.console.note(f"evaluation text: {self.windows.protocol.text}")

    def work(self) -> RunFile:
        from saap.evaluate.evaluation import evaluate
        from saap.evaluate.options import EvalOptions
        from saap.evaluate.subjects import GgufFile, subject_of

        source, out = self.run.source, self.run.out
        paths = {"dense fp32": source, "slim fp32, untuned": out / SLIM}
        paths |= {export.bundle.name: export.bundle for export in self.exports}
        models: dict[str, str | Path] = {**paths, **self.peer.specs}
        subjects = [subject_of(model, name) for name, model in models.items()]
        subjects = [replace(each, tokenizer=source) if isinstance(each, GgufFile) else each for each in subjects]
        options = EvalOptions(device=self.run.options.pruning.options.device)
        quality = evaluate(subjects, options, reference=subjects[0], text=self.windows, progress=self.run.console)
        return {"quality": asdict(quality)}


class Bench(Step):
    """Speeds with one thread count; what a small model gains from a second thread depends on its operators."""

    def __init__(self, run: Run, exports: list[Export], others: Sequence[Plain | Peer], threads: int) -> None:
        from bench.judge.wording import threads as counted

        super().__init__(run)
        self.exports, self.others, self.threads = exports, others, threads
        self.name = f"bench with {counted(threads)}"
        self.result = run.out / f"bench-{counted(threads).replace(' ', '-')}.json"
        self.outputs = (self.result.name,)

    def prepare(self) -> None:
        from bench.judge.comparison import LEAST_REPETITIONS
        from bench.measure.options import BenchOptions

        self.specs = {export.bundle.name: str(export.bundle) for export in self.exports}
        for other in self.others:
            self.specs |= other.specs
        repetitions = self.run.options.repetitions
        ratio_s = RATIO_S * len(self.specs) if repetitions >= LEAST_REPETITIONS else 0  # fewer are a quick look
        self.options = BenchOptions(threads=self.threads, repetitions=repetitions, ratio_time_s=ratio_s)
        earlier = [*self.exports, *(other for other in self.others if other.specs)]
        self.inputs = [[step.key for step in earlier], repetitions, self.threads]
        self.command = ["bench", *self.specs.values(), "--threads", self.threads, "--repetitions", repetitions,
                        "--ratio-time", ratio_s, "--json", self.result]  # fmt: skip

    def check(self) -> None:
        from bench.measure.options import BenchOptions
        from saap.models.architectures import positions_of
        from saap.models.checkpoint import read_config

        positions, tokens = positions_of(read_config(self.run.source)), BenchOptions().positions
        if tokens > positions:
            raise UserError(
                f"a run measures {tokens} tokens, and {self.run.source} has {positions} positions: "
                "call the commands one by one, with a smaller -p and -n of `saap bench`"
            )

    def work(self) -> RunFile:
        from bench.measure import measure
        from saap.base.interrupt import ended_as_by_a_person
        from saap.cli.bench import keep, verify_models

        console = self.run.console
        paths = [*self.specs.values()]
        verify_models(paths)
        with ended_as_by_a_person():
            keep(measure(paths, self.options, names=[*self.specs], progress=console), self.result)
        console.finish()
        return {}


class Texts(Step):
    """The same prompts to both bundles, greedy."""

    name = "texts"

    def __init__(self, run: Run, exports: list[Export]) -> None:
        super().__init__(run)
        self.exports = exports
        self.command = ["generate", exports[1].bundle, PROMPTS[0], "--max-tokens", ANSWER_TOKENS]

    def prepare(self) -> None:
        self.inputs = [export.key for export in self.exports]

    def work(self) -> RunFile:
        import torch

        from export.bundle.tokenizer import BundleTokenizer
        from export.engine.opening import open_engine
        from export.engine.protocol import EngineOptions
        from export.generate.loop import AnswerSettings, begin_text
        from saap.evaluate.answers import repetition

        bundles, report = [export.bundle for export in self.exports], self.run.console.report
        answers: dict[str, dict[str, str]] = {prompt: {} for prompt in PROMPTS}
        repeated: dict[str, list[float]] = {}
        count, settings = len(bundles) * len(answers), AnswerSettings(ANSWER_TOKENS)
        for number, bundle in enumerate(bundles):
            tokenizer = BundleTokenizer(bundle)
            engine = open_engine(bundle, EngineOptions(torch.get_num_threads(), 256))
            for index, (prompt, texts) in enumerate(answers.items()):
                report("writing texts (answers)", number * len(answers) + index, count)
                answer = begin_text(engine, tokenizer, prompt, settings, chat=tokenizer.has_chat_template)
                texts[bundle.name] = "".join(answer)
                words = repetition(answer.drawn) if texts[bundle.name].strip() else 1.0
                repeated.setdefault(bundle.name, []).append(words)
        report("writing texts (answers)", count, count)
        says = silence(*(repeated[bundle.name] for bundle in bundles))
        return {"texts": [{"prompt": prompt, "outputs": texts} for prompt, texts in answers.items()], "silence": says}


def silence(dense: list[float], slim: list[float]) -> str:
    """Say that the slim model does not answer any more; empty where it does.

    Args:
        dense, slim: of each answer the share of its 4-grams that were in it before; 1 where it is empty.
    """
    shares = [sum(some) / len(some) for some in (dense, slim)]
    if shares[1] <= REPEATS or shares[1] <= shares[0]:
        return ""
    return (
        f"the slim model does not answer any more: {shares[1]:.0%} of what it says was said before ({shares[0]:.0%} by "
        f"the dense one; {REPEATS:.0%} are the bound). Ask for less --speedup or --ratio, or tune with more --tokens"
    )


def steps_of(run: Run) -> list[Step]:
    """All steps in their order."""
    timed = Time(run) if run.options.prune.options.costs == run.out / COSTS else None
    pruned, peer, (dense, slim) = Prune(run, timed), Peer(run), run.options.bundles
    tuned, dense_tuned = Tune(run, pruned), Tune(run, None)
    exports = [Export(run, dense_tuned, dense), Export(run, tuned, slim)]
    plain = [Plain(run)] if run.options.prune.options.costs else []
    benches = [Bench(run, exports, (*plain, peer), threads) for threads in run.options.thread_counts]
    evaluated = Evaluate(run, pruned, exports, peer)
    first = [timed] if timed else []
    return [*first, pruned, tuned, dense_tuned, *exports, *plain, peer, evaluated, *benches, Texts(run, exports)]
