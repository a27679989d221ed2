"""Options of ``saap run``: what several steps take is given once."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from devices.fit.demands import Demands, DeviceOptions, demands_of
from export.options import LLAMA_CPP_TYPES, ExportOptions
from saap.base.options import THREADS, Option, Part, refuse_unused, settings_of
from saap.cli.devices.fit import check_costs
from saap.cli.prune import PruneCommand
from saap.cli.tune import TuneCommand
from saap.cli.types import device_names
from saap.prune.options import MUST, TIMED

DEFAULT_RATIO, DEFAULT_SPEEDUP = 0.2, 1.3  # of a run for a device, which has no table of costs, and for this machine
COSTS = "cost.json"
QUICK_TOKENS = 8192
QUICK = {"repetitions": 3, "threads": 1}
_STEPS = "How each step is done"
_DEVICE = "The device that it is for"


@dataclass(frozen=True)
class RunOptions:
    """Options of all steps."""

    profile: Annotated[
        str | None,
        Option(
            "A device of `saap devices list` that it must fit on.",
            _DEVICE,
            flags=("--for",),
            metavar="NAME",
            names=device_names,
        ),
    ] = None
    device: Annotated[DeviceOptions, Part(flags=("memory",), headings={"Options": _DEVICE})] = field(
        default_factory=DeviceOptions
    )
    pruning: Annotated[
        PruneCommand,
        Part(
            flags=("ratio", "max_params", "max_bytes", "speedup", "ms_per_token", "costs", "method", "compensate",
                   "calibration", "seed"),
            without=("bits", "group_size", "threads", "explain", "wide", "onnxruntime", "vocabulary",
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
    def shortened(self) -> RunOptions:
        """The options, with less of everything that has its default if they are ``quick``."""
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
        """Demands of the device that the bundle is for. Raises UserError: no such device."""
        return None if self.profile is None else demands_of(self.profile, self.device)

    @property
    def prune(self) -> PruneCommand:
        """Options of the pruning step: a ratio of 0.2 unless there is another requirement."""
        tuned, options = self.tuning.options, self.pruning.options
        options = replace(
            options, bits=tuned.bits, group_size=tuned.group_size, threads=self.threads if options.costs else None,
            ratio=options.ratio if options.asked else DEFAULT_RATIO,
        )  # fmt: skip
        return replace(self.pruning, options=options)

    def timed_here(self, costs: Path) -> RunOptions:
        """Return the options with the table ``costs`` if a speed is asked for, or nothing, and no table is named."""
        options = self.pruning.options
        if self.profile or options.costs or not options.asked.keys() <= set(TIMED):
            return self
        speedup = options.speedup if options.asked else DEFAULT_SPEEDUP
        return replace(self, pruning=replace(self.pruning, options=replace(options, speedup=speedup, costs=costs)))

    def tune(self, teacher: str, skip: int | None = None) -> TuneCommand:
        """Options of a tuning step; ``teacher`` teaches unless the user names another."""
        options = replace(self.tuning.options, skip=skip)
        training = replace(options.training, seed=self.pruning.options.seed, device=self.pruning.options.device)
        return replace(self.tuning, options=replace(options, training=training), teacher=self.tuning.teacher or teacher)

    def export(self, *, tuned: bool) -> ExportOptions:
        """Options of an export: of a tuned model, which has its integers, or of the dense one."""
        calibration, quant, demands = self.pruning.calibration, self.tuning.options, self.demands
        options = ExportOptions(
            dotprod=demands is None or demands.dotprod, text=calibration,
            device=self.pruning.options.device,
        )  # fmt: skip
        if tuned:
            return options
        return replace(options, bits=quant.bits, group_size=quant.group_size, head_bits=quant.head_bits)

    @property
    def peer_export(self) -> ExportOptions:
        """Options of the dense model's export for llama.cpp, in as many bits, by its own quantizer."""
        return ExportOptions(target="gguf", bits=self.tuning.options.bits, integers="llama.cpp")

    @property
    def bundles(self) -> tuple[str, str]:
        return f"dense-int{self.tuning.options.bits}", f"slim-int{self.tuning.options.bits}"

    @property
    def plain(self) -> str:
        """The dense bundle in the group size of the options, where another one is faster."""
        return f"{self.bundles[0]}-g{self.tuning.options.group}"

    @property
    def peer(self) -> str:
        """The dense model's file for llama.cpp."""
        return f"dense-{LLAMA_CPP_TYPES[self.tuning.options.bits]}.gguf"

    @property
    def peer_name(self) -> str:
        """Its name in the tables, as `saap bench` calls it."""
        return f"{Path(self.peer).stem} (llama.cpp)"

    @property
    def thread_counts(self) -> list[int]:
        """Threads of each bench: those of the options, else one and all physical cores."""
        from saap.base.cores import physical_cores

        return [self.threads] if self.threads else sorted({1, physical_cores()})

    def check(self) -> None:
        """Refuse what some step's options, this machine, its packages or the device do not allow."""
        from importlib.util import find_spec

        from export.engine.protocol import check_threads

        self.prune.options.check()
        self.prune.options.check_used()
        self.check_device()
        self.tune("the dense model").check()
        for tuned in (False, True):
            self.export(tuned=tuned).check()
        for name in ("onnx", "onnx_ir", "onnxruntime", "tokenizers", "jinja2", "accelerate"):
            if find_spec(name) is None:
                raise ModuleNotFoundError(name=name)
        for threads in self.thread_counts:
            check_threads(threads)

    def check_device(self) -> None:
        """Refuse what the device that the bundle is for does not allow, whatever the model is."""
        quant, demands, costs = self.tuning.options, self.demands, self.pruning.options.costs
        if demands is None or self.profile is None:
            refuse_unused(self, settings_of(DeviceOptions), "the device of --for", "name one")
            return
        demands.check_bits(quant.bits, f"--bits {quant.bits}")
        demands.check_bits(quant.head_bits or quant.bits, f"head_bits {quant.head_bits}")
        if costs is not None:
            check_costs(self.profile, costs)
