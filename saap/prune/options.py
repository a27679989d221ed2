"""Options of ``saap prune`` and :func:`saap.prune.prune`. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

from msgspec import Meta

from saap.base.errors import UserError
from saap.base.options import COMPUTE, COUNT, THREADS, Option, check_values, refuse_unused, settings_of
from saap.base.values import parse_bytes, parse_layers, parse_parameters
from saap.system.device_names import check_device_is_there

if TYPE_CHECKING:
    from saap.models.shape import ModelShape

Method = Literal["saap", "vector", "param_mix", "wanda_sp", "flap", "shortgpt"]
METHODS: tuple[Method, ...] = get_args(Method)
TAYLOR = ("vector", "param_mix")  # methods that hold the gradients of all weights
Compensation = Literal["none", "bias", "refit"]
COMPENSATIONS: tuple[Compensation, ...] = get_args(Compensation)
OWN_COMPENSATION: dict[str, Compensation] = {"saap": "refit", "flap": "bias"}
Element = Literal["none", "streamed", "exact"]  # forms of the element-wise score
Slices = Literal["all", "output"]
Term = Literal["vector", "element", "token"]
Score = Literal["vector", "element", "token", "fused", "vector-token", "fused-token"]
FUSIONS: dict[Score, tuple[Term, ...]] = {
    "vector": ("vector",),
    "element": ("element",),
    "token": ("token",),
    "fused": ("vector", "element"),
    "vector-token": ("vector", "token"),
    "fused-token": ("vector", "element", "token"),
}
Effort = Literal["quick", "normal", "thorough"]
Kept = Literal["blocks", "heads", "ffn"]  # kinds of structures that may be left as they are
REQUIREMENTS = ("ratio", "max_params", "max_bytes", "speedup", "ms_per_token")
TIMED = ("speedup", "ms_per_token")

MUST = "What the model must meet (one of these)"
_FOR = "What is planned for"
_GOES = "What may go"
_HOW = "How it is chosen"
_SCORES = "How SAAP scores (the defaults are the ablation's)"
_RUNS = "How it runs"


@dataclass(frozen=True)
class FusionOptions:
    """Options for one score per structure; :mod:`saap.prune.scores.fusion` has the formulas."""

    score: Annotated[
        Score, Option("Which scores enter: fused is vector and element; token is ours.", section=_SCORES, shown=False)
    ] = "vector-token"
    slices: Annotated[
        Slices, Option("Slices of a structure that are summed: all, or those of the output side.", _SCORES, shown=False)
    ] = "all"
    stability: Annotated[
        float,
        Option("Lambda: below 0 prunes fluctuating structures, above 0 keeps them.", _SCORES, shown=False),
        Meta(ge=-100, le=100),
    ] = 0.0


@dataclass(frozen=True)
class AdaptiveOptions:
    """Options for SAAP's scores and prices; the other methods do not read them."""

    fusion: FusionOptions = field(default_factory=FusionOptions)
    exact: Annotated[
        bool, Option("The exact element score: two more numbers per weight in memory.", _SCORES, shown=False)
    ] = False

    recovered: Annotated[
        float,
        Option("Share of a removed block's price that tuning recovers; 0: none.", _SCORES, shown=False),
        Meta(ge=0, lt=1),
    ] = 0.0
    measured: Annotated[
        bool,
        Option("Measure a plan's narrower attention and removed blocks in long windows.", _SCORES, shown=False),
    ] = True
    most_gone: Annotated[
        int | None,
        Option("Most blocks to remove; default: as many as the prices favour.", _SCORES, shown=False),
        Meta(ge=0, le=100_000),
    ] = None

    @property
    def element(self) -> Element:
        if "element" not in FUSIONS[self.fusion.score]:
            return "none"
        return "exact" if self.exact else "streamed"

    def check(self) -> None:
        if self.exact and self.element == "none":
            raise UserError(
                f"exact is for the element score, and the score {self.fusion.score} has none: leave exact out, or set "
                "score to fused, fused-token or element"
            )


@dataclass(frozen=True)
class PruneOptions:
    """Options of a pruning. Exactly one of the first five is set: the requirement on the slim model."""

    ratio: Annotated[
        float | None,
        Option("Share of the decoder layers' weights to remove, such as 0.2.", MUST, metavar="SHARE"),
        Meta(gt=0, lt=1),
    ] = None
    max_params: Annotated[
        int | None,
        Option("Most parameters, with the embedding, such as 100M.", MUST, metavar="COUNT", parse=parse_parameters),
        Meta(gt=0),
    ] = None
    max_bytes: Annotated[
        int | None,
        Option("Largest weights file of the bundle, as 80MB or 80MiB.", MUST, metavar="SIZE", parse=parse_bytes),
        Meta(gt=0),
    ] = None
    speedup: Annotated[
        float | None,
        Option("Speed over the dense model's, such as 1.25; with --costs.", MUST, metavar="FACTOR"),
        Meta(gt=1, le=1000),
    ] = None
    ms_per_token: Annotated[
        float | None, Option("Longest decode step in milliseconds; with --costs.", MUST, metavar="MS"), Meta(gt=0)
    ] = None
    costs: Annotated[Path | None, Option("What `saap devices costs` measured on the device.", _FOR, metavar="FILE")] = (
        None
    )
    threads: Annotated[
        int | None,
        Option("Which of the table's thread counts; default: its only one.", _FOR, metavar="N"),
        THREADS,
    ] = None
    accept_invalid: Annotated[bool, Option("Plan by a table that is INVALID, too.", _FOR, shown=False)] = False
    bits: Annotated[Literal[4, 8, 32], Option("Bits of the bundle, for its size and time.", _FOR)] = 4
    group_size: Annotated[
        Literal[32, 64, 128] | None,
        Option("Weights per scale; default: the best for a time or size, or 32.", _FOR, old=("--group",)),
    ] = None
    engine: Annotated[
        Literal["any", "llama.cpp"],
        Option("Runtime; llama.cpp wants equal FFNs in some families.", _FOR, flags=("--for",)),
    ] = "any"
    onnxruntime: str | None = None  # version that the table of costs must be of; None accepts any
    method: Annotated[Method, Option("saap, flap, wanda_sp, ... (--help-all).", _HOW, metavar="NAME")] = "saap"
    compensate: Annotated[
        Compensation | None, Option("How the other weights compensate; default: as the method.", _HOW)
    ] = None
    effort: Annotated[Effort, Option("Beyond quick: tune several plans briefly, keep the best (saap).", _HOW)] = "quick"
    adaptive: AdaptiveOptions = field(default_factory=AdaptiveOptions)
    heads: Annotated[
        bool | None,
        Option("Query heads and KV groups too; default: as the method.", _GOES, flags=("--heads",), hidden=True),
    ] = None
    keep: Annotated[
        frozenset[Kept],
        Option("Kinds to keep: blocks (none is removed whole), heads, ffn, or several.", _GOES, metavar="KINDS"),
    ] = frozenset()
    keep_layers: Annotated[
        frozenset[int] | None,
        Option(
            "Leave these layers whole, such as 0-2,29; none: no layer.", _GOES, metavar="LAYERS", parse=parse_layers
        ),
    ] = frozenset()  # empty leaves it to the method, None keeps none whole, whatever the method
    vocabulary: Annotated[
        str | None,
        Option("Words that the output head predicts: 24k, 0.5 or auto; prompts use all.", _GOES, metavar="COUNT"),
    ] = None
    vocabulary_input: Annotated[bool, Option("Tokenizer and embedding lose the words too, for llama.cpp.", _GOES)] = (
        False
    )
    sequences: Annotated[int, Option("Calibration sequences.", _HOW, metavar="N", hidden=True), COUNT] = 64
    refit_text: Annotated[
        int,
        Option("Times as many sequences for the refit, where the text has them.", _HOW, shown=False),
        Meta(ge=1, le=100),
    ] = 2  # what makes up for a missing block has as many unknowns as an FFN (studies/search)
    length: Annotated[int, Option("Tokens per sequence.", _HOW, metavar="N", hidden=True), Meta(ge=2, le=1_000_000)] = (
        256
    )
    seed: Annotated[int, Option("Seed of the text's order.", _HOW, metavar="N", hidden=True), Meta(ge=0)] = 0
    stream: Annotated[
        bool | None,
        Option(
            "Read the model layer by layer; default: where it does not fit into memory as a whole.",
            _RUNS,
            hidden=True,
            flags=("--stream/--no-stream",),
        ),
    ] = None
    device: Annotated[str, Option(COMPUTE, _RUNS, metavar="NAME", hidden=True)] = "auto"

    @property
    def rows(self) -> int:
        """Sequences of calibration text: those that score, and those that only the refit reads."""
        return self.sequences * (self.refit_text if self.compensation == "refit" else 1)

    @property
    def least_group(self) -> Literal[32, 64, 128]:
        """Weights per scale that every width is a multiple of; larger groups leave some widths out."""
        return self.group_size or 32

    @property
    def asked(self) -> dict[str, float]:
        return {name: value for name in REQUIREMENTS if (value := getattr(self, name)) is not None}

    @property
    def compensation(self) -> Compensation:
        return self.compensate or OWN_COMPENSATION.get(self.method, "none")

    @property
    def kept_layers(self) -> frozenset[int]:
        """The layers that were asked to stay whole."""
        return self.keep_layers or frozenset()

    def prunes_heads(self, shape: ModelShape) -> bool:
        """Whether attention loses heads or KV groups in a model of this shape.

        By default SAAP weighs it, and other methods leave out whole KV groups of several query heads: those are dear.
        """
        if "heads" in self.keep:
            return False
        if self.heads is not None or not shape.separable_heads:
            return bool(self.heads)
        alone = not shape.sources and all(layer.heads_per_group <= 1 for layer in shape.layers)
        return self.method == "saap" or alone

    def check(self) -> None:
        self.check_requirement()
        if self.vocabulary is None:
            refuse_unused(self, ("vocabulary_input",), "models that lose words: give --vocabulary too")
        elif self.effort != "quick":
            raise UserError("--effort chooses layers only: leave --vocabulary out, and trim the pruned model by itself")
        self.adaptive.check()
        check_device_is_there(self.device)
        if self.method != "saap":
            ours = {"effort", *settings_of(AdaptiveOptions)}
            refuse_unused(self, ours, "the method saap", f"leave --method {self.method} out")
            if other := sorted(self.keep - {"heads"}):
                raise UserError(
                    f"--keep {other[0]} is for the method saap: leave it out, or leave --method {self.method} out"
                )
        elif self.compensation == "bias":
            raise UserError("--compensate bias is for other methods: saap refits, so leave it out, or give none")
        if self.heads and "heads" in self.keep:
            raise UserError("--heads and --keep heads contradict each other: give one")
        if self.stream and self.method in TAYLOR:
            raise UserError(
                f"{self.method} needs the gradients of all weights at once: leave --stream out, or use saap"
            )

    def check_used(self) -> None:
        """Refuse what the method does not read; a study may ask all methods alike. Raises UserError: names it."""
        if self.method == "shortgpt":
            names = ("heads", *(["compensate"] if self.compensation == "bias" else []))
            refuse_unused(self, names, "methods that prune in width, and shortgpt removes whole layers")

    def check_requirement(self) -> None:
        """Raise UserError for a requirement that is none, two, or out of range."""
        check_values(self)
        if len(self.asked) != 1:
            names = " and ".join(map(flag_of, self.asked)) or "none"
            allowed = "--ratio, --max-params, --max-bytes, --speedup or --ms-per-token"
            raise UserError(f"give one requirement: {allowed} (given: {names})")
        (kind,) = self.asked
        if kind in TIMED and self.costs is None:
            raise UserError(
                f"{flag_of(kind)} needs --costs FILE: measure one on the device with `saap devices costs MODEL`"
            )
        if kind not in TIMED:
            refuse_unused(
                self, ("costs", "threads", "accept_invalid"), "--speedup and --ms-per-token", "ask for a time"
            )


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")
