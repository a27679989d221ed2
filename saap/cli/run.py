"""``saap run``: every step from a model to a measured bundle and a page.

``run.json`` in the output directory keeps, for every finished step, the hash of what went into it. Started again, a
step whose input is the same and whose output is there is not repeated. It also keeps the command that does each step
alone.
"""

from __future__ import annotations

import json
import math
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import click
from msgspec import Meta

from devices.fit.demands import Demands, DeviceOptions, demands_of
from export.options import LLAMA_CPP_TYPES, ExportOptions
from saap.base.errors import UserError
from saap.base.files import write_text
from saap.base.options import THREADS, Option, Part, arguments_of, refuse_unused, settings_of
from saap.base.outputs import is_forced
from saap.cli.console import LOADING, Console, heard_or_not, tell
from saap.cli.devices.fit import (
    Planned,
    amount,
    board_commands,
    check_costs,
    check_pruned,
    device_fit,
    fit_in_words,
    size_to_reach,
)
from saap.cli.options import OptionsCommand, options_of
from saap.cli.prune import PruneCommand, for_this_machine, show_pruned
from saap.cli.report import RUN, RunFile, Step, read_run
from saap.cli.tune import TuneCommand, tune_model
from saap.cli.types import directory, force
from saap.prune.options import MUST
from saap.system.device_names import AUTO
from saap.text.documents import SELF

if TYPE_CHECKING:
    from saap.base.needs import Needs
    from saap.evaluate.evaluation import Subject
    from saap.prune.options import PruneOptions
    from saap.prune.search.budget import Budget
    from saap.text.windows import Windows

DEFAULT_RATIO = 0.2
PROMPTS = (
    "Explain in two sentences why the sky is blue.",
    "Write a short note to a neighbour who lent you a ladder.",
    "Name three things that plants need to grow.",
)
ANSWER_TOKENS = 96
TUNED, DENSE_TUNED = "tuned", "dense-tuned"  # directories
QUICK_TOKENS = 8192
QUICK = {"max_chunks": 20, "repetitions": 3, "threads": 1}
RATIO_S = 15  # of turns for each model: of two, a ratio within about 1 %
_STEPS = "How each step is done"
_DEVICE = "The device that it is for"


@dataclass(frozen=True)
class RunOptions:
    """What ``saap run`` is asked for; what several steps take is given once."""

    made_for: Annotated[
        str | None,
        Option("A device of `saap devices list` that it must fit on.", _DEVICE, flags=("--for",), metavar="NAME"),
    ] = None
    device: Annotated[DeviceOptions, Part(flags=("memory",), headings={"Options": _DEVICE})] = field(
        default_factory=DeviceOptions
    )
    pruning: Annotated[
        PruneCommand,
        Part(
            flags=("ratio", "max_params", "max_bytes", "speedup", "ms_per_token", "costs", "method", "compensate",
                   "calibration", "seed"),
            without=("bits", "group_size", "threads", "here", "explain", "onnxruntime", "vocabulary",
                     "vocabulary_input"),
            headings={"What is planned for": MUST, "How it is chosen": _STEPS, "What may go": _STEPS},
        ),
    ] = field(default_factory=PruneCommand)  # fmt: skip
    tuning: Annotated[
        TuneCommand,
        Part(
            flags=("bits", "group_size", "teacher", "data", "tokens"),
            without=("max_bytes", "length", "skip", "seed", "minutes", "device"),
            headings={"The integers": _STEPS, "Training text": _STEPS},
        ),
    ] = field(default_factory=TuneCommand)
    text: Annotated[str | None, Option("Text for evaluation, likewise; never the same as the others.", _STEPS)] = None
    chunk: Annotated[int, Option("Evaluation: tokens per chunk.", _STEPS, shown=False), Meta(ge=2, le=1_000_000)] = 256
    max_chunks: Annotated[int, Option("Evaluation: chunks at most.", _STEPS, shown=False), Meta(ge=1)] = 40
    repetitions: Annotated[int, Option("Interleaved repetitions of the bench.", _STEPS), Meta(ge=1, le=10_000)] = 6
    threads: Annotated[
        int | None, Option("Threads of the bench; default: 1, and all physical cores.", _STEPS), THREADS
    ] = None
    quick: Annotated[bool, Option("A first look: less text, one thread count.", _STEPS)] = False

    @property
    def asked(self) -> RunOptions:
        """With less of everything where it is quick, but for what was asked for in numbers."""
        if not self.quick:
            return self
        plain, pruning, tuning = RunOptions(), self.pruning, self.tuning
        if tuning.options.tokens == plain.tuning.options.tokens:
            tuning = replace(tuning, options=replace(tuning.options, tokens=QUICK_TOKENS))
        fewer: dict[str, Any] = {
            name: few for name, few in QUICK.items() if getattr(self, name) == getattr(plain, name)
        }
        return replace(self, pruning=pruning, tuning=tuning, quick=False, **fewer)

    @property
    def demands(self) -> Demands | None:
        """What the device demands that the bundle is for. Raises UserError: no such device."""
        return None if self.made_for is None else demands_of(self.made_for, self.device)

    @property
    def prune(self) -> PruneCommand:
        """What the pruning step is asked for: a ratio of 0.2 where nothing else is."""
        tuned, options = self.tuning.options, self.pruning.options
        options = replace(
            options, bits=tuned.bits, group_size=tuned.group_size, threads=self.threads if options.costs else None,
            ratio=options.ratio if options.asked else DEFAULT_RATIO,
        )  # fmt: skip
        return replace(self.pruning, options=options)

    def tune(self, teacher: str, skip: int | None = None) -> TuneCommand:
        """What a tuning step is asked for, with the dense model as the teacher where no other is named."""
        options = replace(self.tuning.options, skip=skip)
        training = replace(options.training, seed=self.pruning.options.seed, device=self.pruning.options.device)
        return replace(self.tuning, options=replace(options, training=training), teacher=self.tuning.teacher or teacher)

    def export(self, *, tuned: bool) -> ExportOptions:
        """How the slim model, whose integers are tuned, or the dense one is exported."""
        calibration, quant, demands = self.pruning.calibration, self.tuning.options, self.demands
        options = ExportOptions(
            dotprod=demands is None or demands.dotprod, text=None if calibration == SELF else calibration,
            device=self.pruning.options.device,
        )  # fmt: skip
        if tuned:
            return options
        return replace(options, bits=quant.bits, group_size=quant.group_size, head_bits=quant.head_bits)

    @property
    def peer_export(self) -> ExportOptions:
        """How the dense model is written for llama.cpp, in as many bits, by its own quantizer."""
        return ExportOptions(target="gguf", bits=self.tuning.options.bits, integers="llama.cpp")

    @property
    def bundles(self) -> tuple[str, str]:
        return f"dense-int{self.tuning.options.bits}", f"slim-int{self.tuning.options.bits}"

    @property
    def peer(self) -> str:
        """The dense model's file for llama.cpp."""
        return f"dense-{LLAMA_CPP_TYPES[self.tuning.options.bits]}.gguf"

    @property
    def peer_name(self) -> str:
        """In the tables: as `saap bench` calls it."""
        return f"{Path(self.peer).stem} (llama.cpp)"


@click.command(cls=OptionsCommand)
@click.argument("model")
@click.option("-o", "--out", type=directory, required=True, help="Directory for everything that is made.")
@options_of(RunOptions)
@force
def run(model: str, out: Path, options: RunOptions) -> None:
    """All of it: prune, tune, export, evaluate, bench, report. Started again, it goes on where it was.

    \b
    Example:
      saap run smollm2-135m -o out/demo --ratio 0.2
      saap run smollm2-135m -o out/pi --for raspberry-pi-5 --memory 4GiB
    """
    from saap.base.writing import claimed

    with Console() as console, claimed(out):
        run_all(model, out, options.asked, console)


class _State:
    """``run.json``: what is finished, and what the report is made of."""

    def __init__(self, out: Path, model: str, options: RunOptions, console: Console) -> None:
        self.out, self.model, self.options, self.console = out, model, options, console
        self.number = self.steps = 0
        self.run: RunFile = {"model": model, "steps": []}
        if (out / "run.json").is_file():
            previous = read_run(out)
            if previous.get("model") == model:
                self.run = previous

    def step(
        self,
        name: str,
        command: Sequence[object],
        inputs: object,
        outputs: list[str],
        work: Callable[[], RunFile | None],
    ) -> str:
        """Do a step unless it was done with the same inputs.

        Args:
            command: what a person would type after `saap` to do this step alone.
            inputs: everything the outcome depends on; earlier steps by the hash that this function returned.
            outputs: paths below the run's directory that must be there for the step to count as done.
            work: does it; what it returns is kept in ``run.json``.

        Returns:
            the hash of the inputs.
        """
        import hashlib

        self.number += 1
        key = hashlib.sha256(json.dumps([name, inputs], sort_keys=True, default=str).encode()).hexdigest()[:16]
        done = next((s for s in self.run["steps"] if s["name"] == name), None)
        if done and done["key"] == key and all((self.out / path).exists() for path in outputs):
            self.console.say(f"[{self.number}/{self.steps}] {name}: done before ({done['seconds']:.0f} s)")
            return key
        self.console.say(f"[{self.number}/{self.steps}] {name} ...")
        start = time.monotonic()
        with heard_or_not():
            found: RunFile = work() or {}
        line = shlex.join(["saap", *map(str, command)])
        entry: Step = {"name": name, "key": key, "seconds": time.monotonic() - start, "command": line}
        self.run["steps"] = [s for s in self.run["steps"] if s["name"] != name] + [entry]
        self.run |= found
        RUN.write(self.out / "run.json", self.run)
        return key


def run_all(model: str, out: Path, options: RunOptions, console: Console) -> None:
    """Prune, tune, export dense and slim, evaluate, bench, write texts and the page."""
    from bench.runtimes.peers import LLAMA_CPP
    from saap.models.resolve import kind_of, resolve

    # What a later step would refuse is refused before hours are spent.
    kind_of(model)
    console.report(LOADING, 0, 0)
    check_options(options)
    check_place(out, model, options)
    from saap.prune.pruning import budget_of

    begun = time.monotonic()
    source = resolve(model, progress=console.report)
    check_model(source, options)
    options = fitted(source, options, console)
    pruning = for_this_machine(options.prune)
    budget = budget_of(source, pruning)
    left_out = check_peer(source)
    check_run(run_needs(source, budget, pruning, options, peer=left_out is None), out)
    check_texts(source, options, console)
    evaluation = _evaluation(source, options, console)
    console.say_text("evaluation", evaluation.protocol.text)
    out.mkdir(parents=True, exist_ok=True)
    state = _State(out, model, options, console)
    RUN.write(out / "run.json", state.run)
    state.steps = 7 + len(thread_counts(options)) + (left_out is None)
    if left_out:
        console.say(f"  llama.cpp is not compared with: {left_out}")

    # What tells one model directory from another without reading its weights.
    dense = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in sorted(source.glob("*.safetensors"))]
    pruned = _prune(state, dense)
    if demands := options.demands:
        check_pruned(demands, Planned.of(out / "slim", options.export(tuned=False)))
    tuned = _tune(state, "tune", out / "slim", TUNED, options.tune(model), [pruned])
    skip = _scored(options)  # the same text as for the slim model
    dense_tuned = _tune(state, "tune dense", source, DENSE_TUNED, options.tune(model, skip), [dense])
    exported = [
        _export(state, out / made, name, [made_from])
        for made, name, made_from in zip((DENSE_TUNED, TUNED), options.bundles, (dense_tuned, tuned), strict=True)
    ]
    peers = {}
    if not left_out and (written := _export_peer(state, source, dense)):
        peers = {options.peer_name: f"{LLAMA_CPP}{out / options.peer}"} | in_other_engines(out / options.bundles[1])
        exported.append(written)
    _evaluate(state, source, evaluation, [pruned, *exported], peers)
    results = [_bench(state, exported, threads, peers) for threads in thread_counts(options)]
    state.step(
        "texts", ["generate", out / options.bundles[1], PROMPTS[0], "--max-tokens", ANSWER_TOKENS], exported[:2], [],
        lambda: {"texts": _texts(state)},
    )  # fmt: skip
    _finish(state, source, results, begun)


def check_options(options: RunOptions) -> None:
    """Refuse what some step's options, this machine or its packages do not allow, whatever the model is."""
    from importlib.util import find_spec

    from export.engine.onnxruntime import check_threads

    options.prune.options.check()
    options.prune.options.check_used()
    check_device(options)
    options.tune("the dense model").check()
    for tuned in (False, True):
        options.export(tuned=tuned).check()
    for name in ("onnx", "onnx_ir", "onnxruntime", "tokenizers", "jinja2", "peft", "accelerate"):
        if find_spec(name) is None:
            raise ModuleNotFoundError(name=name)
    for threads in thread_counts(options):
        check_threads(threads)


def check_device(options: RunOptions) -> None:
    """Refuse what the device that the bundle is for does not allow, whatever the model is."""
    quant, demands, costs = options.tuning.options, options.demands, options.pruning.options.costs
    if demands is None or options.made_for is None:
        refuse_unused(options, settings_of(DeviceOptions), "the device of --for", "name one")
        return
    demands.check_bits(quant.bits, f"--bits {quant.bits}")
    demands.check_bits(quant.head_bits or quant.bits, f"head_bits {quant.head_bits}")
    if costs is not None:
        check_costs(options.made_for, costs)


def fitted(source: Path, options: RunOptions, console: Console) -> RunOptions:
    """The options with a requirement that fits on the device. Raises UserError: what was asked for does not fit."""
    from saap.prune.pruning import budget_of

    if (demands := options.demands) is None:
        return options
    asked = options.pruning.options

    def within(size: int) -> RunOptions:
        sized = replace(asked, ratio=None, max_params=None, speedup=None, ms_per_token=None, costs=None, max_bytes=size)
        return replace(options, pruning=replace(options.pruning, options=sized))

    def reachable(size: int) -> bool:
        try:
            budget_of(source, within(size).prune.options)
        except UserError:
            return False
        return True

    dense = Planned.of(source, options.export(tuned=False))
    size = size_to_reach(demands, dense, asked.asked, DEFAULT_RATIO, reachable)
    if size is None:
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
    for names, record in ((("slim", TUNED, DENSE_TUNED), RECORD), (options.bundles, MANIFEST)):
        for name in names:
            check_output(out / name, record=record)


def check_model(source: Path, options: RunOptions) -> None:
    """Refuse a model that some step cannot do what is asked with."""
    from bench.measure.options import BenchOptions
    from export.source import ModelSource
    from export.write import graph_writer
    from saap.models.architectures import positions_of, shape_of
    from saap.models.checkpoint import read_config
    from saap.models.resolve import resolve
    from saap.quantize.bundle_size import bundle_size
    from saap.tune.teacher import check_same_vocabulary

    config, quant = read_config(source), options.tuning.options
    graph_writer(ModelSource(source), options.export(tuned=False))
    bundle_size(config, quant.bits, quant.group).check(shape_of(config))
    if options.tuning.teacher:
        check_same_vocabulary(resolve(options.tuning.teacher), source)
    positions, needed = positions_of(config), BenchOptions().positions
    if options.chunk > positions:
        raise UserError(f"chunk {options.chunk} is more than the {positions} positions of {source}: set a smaller one")
    if needed > positions:
        raise UserError(
            f"a run measures {needed} tokens, and {source} has {positions} positions: "
            "call the commands one by one, with a smaller -p and -n of `saap bench`"
        )


def check_peer(source: Path) -> str | None:
    """Why the dense model is not measured in llama.cpp too; None where it is."""
    from export.gguf.families import open_source
    from export.gguf.llama_cpp import quantizer

    try:
        open_source(source, "F16", None)
        quantizer()
    except UserError as error:
        return str(error)
    return None


def check_texts(source: Path, options: RunOptions, console: Console) -> None:
    """Refuse a text that is too short for what is asked of it; one that the model will write is long enough."""
    from export.options import PARITY_ROWS
    from export.write import sample_rows
    from saap.prune.pruning import calibration_rows
    from saap.text.documents import Sequences
    from saap.text.rows import check_length, tuning_rows

    pruning, tuning, data = options.pruning.options, options.tuning.options, options.tuning.data
    for length in (pruning.length, tuning.length):
        check_length(source, length)
    skip = _scored(options)
    if options.pruning.calibration != SELF:
        calibration_rows(source, options.pruning.calibration, pruning, console.report)
    sample_rows(source, options.export(tuned=True).text, PARITY_ROWS)
    if data != SELF or tuning.kind == "chat":
        wanted = Sequences(tuning.tokens // tuning.length, tuning.length, pruning.seed, skip)
        tuning_rows(source, data, wanted, tuning.kind, console.report)


def run_needs(
    source: Path, budget: Budget, pruning: PruneOptions, options: RunOptions, *, peer: bool
) -> dict[str, Needs]:
    """Of each step that may be the largest, read layer by layer where it can be; the disk is that of all steps.

    ``peer``: the dense model is written for llama.cpp too.
    """
    from export.needs import PACKED, export_needs
    from export.options import PARITY_ROWS, PARITY_TOKENS
    from saap.base.needs import PROCESS, Needs
    from saap.models.architectures import shape_of
    from saap.models.checkpoint import read_config
    from saap.models.weight_files import weights_bytes
    from saap.prune.needs import prune_disk, prune_needs
    from saap.quantize.bundle_size import bundle_size
    from saap.tune.needs import tune_needs

    shape, floats, tuning = shape_of(read_config(source)), weights_bytes(source), options.tuning.options
    bundle = bundle_size(read_config(source), tuning.bits, tuning.group).total(shape)
    share, training = budget.share, tuning.training
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


def _prune(state: _State, dense: object) -> str:
    import hashlib

    from saap.base.costs import COSTS
    from saap.prune.pruning import prune

    asked, out = state.options.prune, state.out / "slim"

    def work() -> RunFile:
        options = for_this_machine(asked)
        result = prune(state.model, options, output=out, calibration=asked.calibration, progress=state.console)
        state.console.finish()
        show_pruned(result, asked)
        return {"plan": _plan(out)}

    inputs = _depends_on(replace(asked, options=replace(asked.options, costs=None)))
    if costs := asked.options.costs:
        inputs["costs"] = hashlib.sha256(COSTS.content(costs).encode()).hexdigest()
    command = ["prune", state.model, "-o", out, *arguments_of(asked)]
    return state.step("prune", command, [dense, inputs], ["slim/saap.json"], work)


def _depends_on(asked: object) -> dict[str, object]:
    """What the outcome of a step depends on: all that is asked for, but not where it is computed."""

    def made(pairs: list[tuple[str, object]]) -> dict[str, object]:
        return {name: value for name, value in pairs if name != "device"}

    return asdict(asked, dict_factory=made)  # type: ignore[call-overload, no-any-return]


def _scored(options: RunOptions) -> int:
    """Sequences of the tuning text that scored the structures, and those of the refit."""
    pruning, tuning = options.pruning.options, options.tuning.options
    return math.ceil(pruning.rows * pruning.length / tuning.length)


def _tune(state: _State, step: str, source: Path, name: str, asked: TuneCommand, made_from: list[object]) -> str:
    out = state.out / name
    given = source if source.parent == state.out else state.model
    command = ["tune", given, "-o", out, *arguments_of(asked)]
    return state.step(
        step, command, [*made_from, _depends_on(asked)], [f"{name}/saap.json"],
        lambda: tune_model(source, out, asked, state.console),
    )  # fmt: skip


def _export(state: _State, source: Path, name: str, made_from: list[object]) -> str:
    from export.bundle.manifest import read_manifest
    from saap.cli.export import export_model

    options = state.options.export(tuned=True)
    if name == state.options.bundles[1]:
        options = replace(options, engines=(AUTO,))  # the file that is fastest on some CPUs costs little

    def work() -> RunFile:
        export_model(source, state.out / name, options, state.console)
        parity = read_manifest(state.out / name).parity
        return {"parity": {**state.run.get("parity", {}), name: parity and asdict(parity)}}

    command = ["export", source, "-o", state.out / name, *arguments_of(options)]
    return state.step(f"export {name}", command, [*made_from, _depends_on(options)], [f"{name}/bundle.json"], work)


def in_other_engines(bundle: Path) -> dict[str, str]:
    """What else of a bundle is measured: name -> spec."""
    from export.bundle.manifest import read_manifest
    from export.engine.table import ONNXRUNTIME, engines_in

    others = [engine for engine in engines_in(read_manifest(bundle)) if engine != ONNXRUNTIME]
    return {f"{bundle.name}@{engine}": f"{bundle}@{engine}" for engine in others}


def _export_peer(state: _State, source: Path, dense: object) -> str | None:
    """What a user would otherwise take: the dense model as llama.cpp quantizes it. A failure is told, and no more."""
    import numpy as np

    from bench.runtimes.peers import LLAMA_CPP, read_peers
    from export.engine.table import LLAMA_CPP as LLAMA_CPP_ENGINE
    from export.engine.worker import logits_of
    from saap.cli.export import export_model

    options, out = state.options.peer_export, state.out / state.options.peer
    command = ["export", state.model, "-o", out, *arguments_of(options)]

    def work() -> None:
        export_model(source, out, options, state.console)
        (peer,) = read_peers([f"{LLAMA_CPP}{out}"], 1)
        one = np.zeros((1, 1), np.int64)
        logits_of(LLAMA_CPP_ENGINE, peer.path, peer.python, one, 1)  # fails here, before anything rests on it

    try:
        return state.step(f"export {out.name}", command, [dense, _depends_on(options)], [out.name], work)
    except UserError as error:
        state.console.say(f"  llama.cpp is not compared with: {error}")
        return None


def _evaluate(state: _State, source: Path, windows: Windows, made_from: list[str], peers: dict[str, str]) -> None:
    """``peers``: name -> spec of what else is measured."""
    from saap.cli.eval import GGUFInLlamaCpp, is_for_llama_cpp, subject_of
    from saap.evaluate.evaluation import evaluate
    from saap.evaluate.options import EvalOptions

    options, bundles = state.options, [state.out / name for name in state.options.bundles]
    paths = {"dense fp32": source, "slim fp32, untuned": state.out / "slim", **{path.name: path for path in bundles}}

    def work() -> RunFile:
        subjects: list[Path | Subject] = [subject_of(path, name) for name, path in paths.items()]
        for name, spec in peers.items():
            ours = not is_for_llama_cpp(Path(spec))
            subjects.append(subject_of(Path(spec), name) if ours else GGUFInLlamaCpp.of(spec, name, source))
        asked = EvalOptions(device=options.pruning.options.device)
        quality = evaluate(subjects, asked, reference=subjects[0], text=windows, progress=state.console.report)
        return {"quality": asdict(quality)}

    command = ["eval", state.out / "slim", *bundles, *peers.values(), "--reference", state.model]
    command += ["--chunk", options.chunk, "--max-chunks", options.max_chunks]
    command += ["--text", options.text] if options.text else []
    state.step("evaluate", command, [made_from, asdict(windows.protocol)], [], work)


def thread_counts(options: RunOptions) -> list[int]:
    """What the bench runs at: what was asked for, else one thread and all physical cores."""
    from saap.base.cores import physical_cores

    return [options.threads] if options.threads else sorted({1, physical_cores()})


def _bench(state: _State, made_from: list[str], threads: int, peers: dict[str, str]) -> Path:
    """With one thread count; what a small model gains from a second thread depends on its operators."""
    from bench.judge.comparison import LEAST_REPETITIONS
    from bench.judge.wording import threads as counted
    from bench.measure import BenchOptions, measure
    from saap.base.interrupt import ended_as_by_a_person
    from saap.cli.bench import keep, specs_here

    repetitions = state.options.repetitions
    specs = {name: str(state.out / name) for name in state.options.bundles} | peers
    result = state.out / f"bench-{counted(threads).replace(' ', '-')}.json"
    ratio_s = RATIO_S * len(specs) if repetitions >= LEAST_REPETITIONS else 0  # who asks for fewer wants a quick look

    def work() -> None:
        plan = BenchOptions(threads=threads, repetitions=repetitions, ratio_time_s=ratio_s)
        paths = specs_here([*specs.values()], state.console)
        with ended_as_by_a_person():
            keep(measure(paths, plan, names=[*specs], progress=state.console.report), result)
        state.console.finish()

    command = ["bench", *specs.values(), "--threads", threads, "--repetitions", repetitions, "--ratio-time", ratio_s,
               "--json", result]  # fmt: skip
    name = f"bench with {counted(threads)}"
    state.step(name, command, [made_from, repetitions, threads], [result.name], work)
    return result


def _evaluation(source: Path, options: RunOptions, console: Console) -> Windows:
    """The evaluation text, checked against what the model will be calibrated and tuned on before hours are spent."""
    from saap.models.architectures import positions_of
    from saap.models.checkpoint import read_config
    from saap.text.documents import load_documents
    from saap.text.overlap import refuse_overlap
    from saap.text.windows import Cut, evaluation_windows

    cut = Cut(options.chunk, max_chunks=options.max_chunks)
    windows, text = evaluation_windows(source, options.text, cut, console.report)
    if (tokens := windows.ids.shape[1]) > (positions := positions_of(read_config(source))):
        raise UserError(f"{source} holds {positions} tokens, a window has {tokens}: set a smaller chunk")
    for other in (options.pruning.calibration, options.tuning.data):
        documents = load_documents(other, split="calibration", seed=options.pruning.options.seed)
        if documents is not None and text is not None:
            refuse_overlap(documents, text)
    return windows


def _plan(slim: Path) -> dict[str, object]:
    """The plan as the report shows it: counts per layer."""
    from saap.models.record import read_record

    plan = read_record(slim)["plan"]
    counts = [{name: len(cast("list[int]", kept)) for name, kept in layer.items()} for layer in plan["layers"]]
    return {**plan, "layers": counts}


def _texts(state: _State) -> list[dict[str, object]]:
    """The same prompts to every bundle, greedy."""
    import torch

    from export.bundle.tokenizer import BundleTokenizer
    from export.engine.onnxruntime import OrtDecoder
    from export.generate.loop import AnswerSettings, begin_text

    bundles, report = state.options.bundles, state.console.report
    outputs: dict[str, dict[str, str]] = {prompt: {} for prompt in PROMPTS}
    settings = AnswerSettings(ANSWER_TOKENS)
    for number, name in enumerate(bundles):
        tokenizer = BundleTokenizer(state.out / name)
        decoder = OrtDecoder(state.out / name, torch.get_num_threads(), 256)
        for index, (prompt, written) in enumerate(outputs.items()):
            report("writing texts (answers)", number * len(outputs) + index, len(bundles) * len(outputs))
            pieces = begin_text(decoder, tokenizer, prompt, settings, chat=tokenizer.has_chat_template)
            written[name] = "".join(pieces)
    report("writing texts (answers)", len(bundles) * len(outputs), len(bundles) * len(outputs))
    return [{"prompt": prompt, "outputs": written} for prompt, written in outputs.items()]


def _finish(state: _State, source: Path, results: list[Path], begun: float) -> None:
    import platform

    import onnxruntime
    import torch
    import transformers

    from bench.judge.planned import planned_speed
    from bench.measure.result import read_result
    from bench.report import report
    from bench.report.headline import bought_by
    from saap import __version__
    from saap.base.quality import QUALITY
    from saap.cli.bench import show_result
    from saap.cli.eval import show_quality
    from saap.cli.model_card import model_card

    out = state.out
    state.run["versions"] = {
        "saap": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "onnxruntime": onnxruntime.__version__,
    }
    state.run["results"] = [path.name for path in results]
    slim = out / state.options.bundles[1]
    state.run.pop("device", None)
    state.run.pop("device_told", None)
    if demands := state.options.demands:
        state.run["device"] = device_fit(demands, slim)
        state.run["device_told"] = fit_in_words(state.run["device"], slim.name)
    RUN.write(out / "run.json", state.run)
    report(results, out / "report.html", run=state.run)
    benches = [read_result(path) for path in results]
    write_text(out / "README.md", model_card(source, state.run, benches, state.options.bundles))
    click.echo()
    show_quality(QUALITY.made(state.run["quality"]))
    for result in benches:
        show_result(result)
        for told in filter(None, (planned_speed(state.run["plan"], result), bought_by(result, state.run["quality"]))):
            tell(f"  {told}")
    if found := state.run.get("device"):
        tell(state.run["device_told"])
        for what, command in board_commands(found, slim):
            click.echo(f"  {what + ':':<22} {command}")
    state.console.say(f"all of it took {time.monotonic() - begun:.0f} s; the page: {out / 'report.html'}")
