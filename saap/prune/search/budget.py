"""What a requirement leaves for a model's layers, in weights, parameters, bytes or milliseconds.

* ratio r: weights of the decoder layers at most (1 - r) times the dense model's
* max_params: parameters, embedding and head included
* max_bytes: bytes of the bundle's weights file (:mod:`saap.quantize.bundle_size`)
* ms_per_token: milliseconds of a decode step by a table measured on the device (:mod:`saap.prune.search.layer_costs`)
* speedup x: milliseconds of a step at most those of the dense model by the table / x

A model's cost is a sum: what pruning leaves alone (embedding, head, last norm, the constant part of a step), and its
blocks. That sum is what :mod:`saap.prune.search.milp` brings below :attr:`Budget.limit`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from msgspec import convert

from saap.base.costs import DEVICE, CostFile, read_cost_file
from saap.base.errors import UserError
from saap.models.record import Costs, Plan, PlannedBundle
from saap.models.shape import BlockKind, LayerSizes, ModelShape
from saap.models.slim_quant import BITS, GROUP_SIZES, MatrixForm
from saap.prune.forms import READS, WRITES, BlockForms, PlanForms
from saap.prune.options import TIMED, PruneOptions
from saap.prune.search.choices import Allowed
from saap.prune.search.layer_costs import CostTable, read_costs
from saap.quantize.bundle_size import VOCABULARY, BundleSize, bundle_size

if TYPE_CHECKING:
    from saap.prune.plan import PrunePlan

ROUNDING = 1e-12  # relative; a sum of milliseconds depends on its order by as much


class Measure(Protocol):
    """Costs in one unit."""

    def outside(self, shape: ModelShape, form: MatrixForm | None = None) -> float:
        """Of what is in no layer, embedding and head in this form; None is the bundle's own."""

    def block(self, kind: BlockKind, shape: ModelShape, sizes: LayerSizes, forms: BlockForms | None = None) -> float:
        """Of one block of a layer of these sizes in these forms; 0 where it has none of the kind."""


@dataclass(frozen=True)
class Weights:
    """Counts weights: of the decoder layers only, or with ``everything`` of the whole model."""

    everything: bool

    def outside(self, shape: ModelShape, form: MatrixForm | None = None) -> float:
        """Embedding, head and last norm."""
        return shape.parameters - shape.layer_weights if self.everything else 0

    def block(self, kind: BlockKind, shape: ModelShape, sizes: LayerSizes, forms: BlockForms | None = None) -> float:
        return shape.weights(kind, sizes)


@dataclass(frozen=True)
class FileSize:
    """Bytes of a bundle's weights file."""

    size: BundleSize

    def outside(self, shape: ModelShape, form: MatrixForm | None = None) -> float:
        return self._in({VOCABULARY: form} if form else {}).outside(shape)

    def block(self, kind: BlockKind, shape: ModelShape, sizes: LayerSizes, forms: BlockForms | None = None) -> float:
        parts = dict(zip((READS[kind.name], WRITES[kind.name]), forms, strict=True)) if forms else {}
        return self._in(parts).block(kind, shape, sizes)

    def _in(self, parts: Mapping[str, MatrixForm]) -> BundleSize:
        return replace(self.size, parts=parts) if parts else self.size


@dataclass(frozen=True)
class StepTime:
    """Milliseconds of a decode step by a table of costs."""

    table: CostTable
    form: MatrixForm | None = None  # of all matrices where nothing else is said; None is the table's own

    def outside(self, shape: ModelShape, form: MatrixForm | None = None) -> float:
        return self.table.outside_ms(shape.head_rows) * self._share("outside", form)

    def block(self, kind: BlockKind, shape: ModelShape, sizes: LayerSizes, forms: BlockForms | None = None) -> float:
        ms = self.table.block_ms(kind, sizes)
        if not ms or not (forms or self.form):
            return ms
        writes, own = shape.writing_share(kind, sizes), forms or (None, None)
        shares = [self._share(kind.name, form) for form in own]
        return ms * ((1 - writes) * shares[0] + writes * shares[1])

    def _share(self, part: str, form: MatrixForm | None) -> float:
        """Of the table's own milliseconds; what was not timed in a form takes as long."""
        form = form or self.form
        return self.table.share_of(part, form) if form in self.table.forms_of(part) else 1.0


@dataclass(frozen=True)
class WordsOption:
    """A head of fewer words that the search may choose."""

    rows: int
    longer: float  # share of tokens that a text takes more
    price: float  # nats per token of the whole vocabulary
    input: bool = False  # whether the embedding loses the words, too

    def of(self, shape: ModelShape) -> ModelShape:
        return replace(shape, vocab=self.rows) if self.input else replace(shape, said=self.rows)


@dataclass(frozen=True)
class Budget:
    """A requirement on one model."""

    unit: str  # of all costs: weights, parameters, bytes or ms
    most: float  # what the whole model may cost
    measure: Measure  # what counts in that unit
    asked: dict[str, float]  # the requirement by its name: ratio, max_params, max_bytes, speedup or ms_per_token
    dense: ModelShape  # the model that is pruned
    cut: ModelShape  # with the biases that the slim model will have; what options cost is read from it
    bits: int = 4  # of the bundle that is planned for
    group_size: int = 32  # of that bundle
    size: BundleSize | None = None  # of that bundle; None where none can be made of the model
    table: CostTable | None = None  # milliseconds; None without a table of costs
    costs: Costs | None = None  # what a record says about the table
    further: tuple[str, ...] = ()  # options that would let more go, as a person is told of them
    allowed: Allowed = field(default_factory=Allowed)  # what may be removed
    forms: tuple[MatrixForm, ...] = ()  # integers that matrices may have instead; none: the search chooses none
    vocabulary: tuple[MatrixForm, ...] = ()  # that embedding and head may have instead
    words: tuple[WordsOption, ...] = ()  # that the head may say instead of all
    longer: float = 0.0  # share of tokens that a text takes more in the words of ``cut``

    @property
    def base(self) -> MatrixForm:
        """What all matrices are held in where the search chooses nothing else."""
        return MatrixForm(self.bits, self.group_size)

    def forms_for(self, kind: BlockKind, sizes: LayerSizes) -> list[BlockForms]:
        """What a block of these sizes may be held in, the base first: whole groups, and what was timed."""
        timed = set(self.forms) if self.unit != "ms" or self.table is None else set(self.table.forms_of(kind.name))
        allowed = [form for form in self.forms if form in timed]
        both = [
            [self.base, *(form for form in allowed if columns % form.group_size == 0)]
            for columns in (self.cut.hidden, self.cut.inner_width(kind, sizes))
        ]
        return [BlockForms(reads, writes) for reads in both[0] for writes in both[1]]

    @property
    def fixed(self) -> float:
        """What the slim model costs without any layer."""
        return self.measure.outside(self.cut)

    def saying(self, words: WordsOption) -> Budget:
        """The requirement with the words chosen: a speed-up is of a text, which takes more tokens."""
        of_text = 1 + words.longer if "speedup" in self.asked else 1.0
        return replace(self, most=self.most / of_text, cut=words.of(self.cut), words=(), longer=words.longer)

    def outside_cost(self, form: MatrixForm, words: WordsOption | None = None) -> float:
        """What embedding and head in this form, and fewer words, take of the limit; less than nothing gives some."""
        if words is None:
            return self.measure.outside(self.cut, form) - self.fixed
        own = self.saying(words)
        return self.measure.outside(own.cut, form) - self.fixed + self.most - own.most

    @property
    def limit(self) -> float:
        """What all blocks together may cost; below 0 where the rest alone is too much."""
        return self.most - self.fixed

    def cost(self, kind: BlockKind, sizes: LayerSizes, forms: BlockForms | None = None) -> float:
        """Of one block."""
        return self.measure.block(kind, self.cut, sizes, forms)

    def layer_cost(self, sizes: LayerSizes, shape: ModelShape | None = None) -> float:
        """Of all blocks of a layer, of the slim model where ``shape`` is no other."""
        return sum(self.measure.block(kind, shape or self.cut, sizes) for kind in sizes.blocks)

    def total(self, shape: ModelShape) -> float:
        return self.measure.outside(shape) + sum(self.layer_cost(sizes, shape) for sizes in shape.layers)

    def total_in(self, forms: PlanForms, shape: ModelShape, kept_layers: Sequence[int]) -> float:
        """Of a slim model in chosen integers; ``kept_layers``: its layers in the model that was pruned."""
        blocks = (
            self.measure.block(kind, shape, sizes, forms.blocks.get((layer, kind.name)))
            for layer, sizes in zip(kept_layers, shape.layers, strict=True)
            for kind in sizes.blocks
        )
        return self.measure.outside(shape, forms.vocabulary) + sum(blocks)

    def meets(self, shape: ModelShape) -> bool:
        return self.fits(self.total(shape))

    def fits(self, total: float) -> bool:
        """Whether a whole model of this cost meets the requirement."""
        return total <= self.most * (1 + ROUNDING)

    @property
    def share(self) -> float:
        """The share of the layers' cost that has to go."""
        return max(0.0, 1 - self.limit / (self.total(self.dense) - self.measure.outside(self.dense)))

    def report(
        self, shape: ModelShape, config: Mapping[str, object] | None = None, plan: PrunePlan | None = None
    ) -> dict[str, float | None]:
        """A model in all units that are known; None is unknown.

        With its own ``config.json`` bytes are exact; else positions and rotary tables are those of the dense model.
        ``plan``: what it came of, for the integers that the search chose.
        ``ratio`` is the share of the decoder layers' weights that is gone, ``bytes`` are of the bundle's weights file.
        """
        size = self.size if config is None or self.size is None else bundle_size(config, self.bits, self.group_size)
        numbers: dict[str, float | None] = {
            "ratio": 1 - shape.layer_weights / self.dense.layer_weights,
            "ratio_of_all": 1 - shape.parameters / self.dense.parameters,
            "parameters": shape.parameters,
            "bytes": self._total(FileSize(size), shape, plan) if size else None,
        }
        if self.table:
            dense = StepTime(self.table)  # in the table's own integers, as the dense model is exported in
            step = self.measure if isinstance(self.measure, StepTime) else dense
            ms = self._total(step, shape, plan)
            whole = replace(self, measure=dense).total(self.dense)
            numbers |= {"ms_per_token": ms, "speedup": whole / ms / (1 + self.longer)}
        return numbers

    def _total(self, measure: Measure, shape: ModelShape, plan: PrunePlan | None) -> float:
        own = replace(self, measure=measure)
        if plan is None or plan.forms is None:
            return own.total(shape)
        return own.total_in(plan.forms, shape, plan.kept_layers)

    def report_dense(self) -> dict[str, float | None]:
        """The dense model, as it is exported where nothing is said."""
        measure = StepTime(self.measure.table) if isinstance(self.measure, StepTime) else self.measure
        return replace(self, measure=measure, longer=0.0).report(self.dense)

    def record(self) -> Plan:
        """What was asked, of which bundle and by which table, and what the dense model is, for ``saap.json``."""
        bundle = PlannedBundle(bits=self.bits, block=self.group_size if self.bits != 32 else 0)
        costs = Plan(costs=self.costs) if self.costs else Plan()
        return {"asked": self.asked, "bundle": bundle, **costs, "dense": self.report_dense()}

    def in_words(self, value: float) -> str:
        if self.unit == "bytes":
            return f"{value / 1e6:,.2f} MB at {self.bits} bit ({value:,.0f} bytes)"
        if self.unit == "ms":
            return f"{value:.4g} ms per token"
        return f"{value:,.0f} {self.unit}"

    def below_floor(self, floor: float) -> UserError:
        """The error where ``floor``, the least that a model can cost, is too much; the number it names can be met."""
        ((kind, asked),) = self.asked.items()
        if kind in ("ratio", "speedup"):
            whole = float(self.report_dense()["ms_per_token"] or 0.0) if kind == "speedup" else self.total(self.dense)
            best = 1 - floor / whole if kind == "ratio" else whole / floor
            name = {"ratio": "a ratio", "speedup": "a speed-up"}[kind]
            largest = _rounded(best, math.floor)
            words = f"asked {name} of {asked:g}, the largest that these options allow is {largest:g}"
            advice = [f"give a smaller {_flag(kind)}"] if largest > (kind == "speedup") else []
        else:
            least = _rounded(floor, math.ceil) if self.unit == "ms" else floor
            words = f"asked {self.in_words(asked)}, the smallest that these options allow is {self.in_words(least)}"
            advice = [f"give a larger {_flag(kind)}"]
        if self.further:
            advice.append(f"allow more with {' or '.join(self.further)}")
        return UserError(f"{words}: {', or '.join(advice) or 'prune another model'}")


def _flag(kind: str) -> str:
    return "--" + kind.replace("_", "-")


def _rounded(value: float, way: Callable[[float], float]) -> float:
    """Four digits, rounded to the side that can be met."""
    if value <= 0:
        return 0.0
    scale = 10.0 ** (3 - math.floor(math.log10(value)))
    return way(value * scale) / scale


def budget_for(
    options: PruneOptions, dense: ModelShape, config: Mapping[str, object], *, cut: ModelShape | None = None
) -> Budget:
    """What the requirement leaves for the layers of a model, of which ``config`` is the ``config.json``.

    ``cut`` is its shape with the biases that a slim model of it will have beyond the dense one's.

    Raises:
        UserError: not one requirement, out of range, met already, or a table of costs that is not of this model.
    """
    options.check_requirement()
    ((kind, value),) = options.asked.items()
    size, table, costs = _size(options, options.least_group, kind, dense, config), None, None
    if options.costs is not None:
        table = read_costs(
            options.costs, dense, bits=options.bits, group_size=options.least_group, threads=options.threads,
            onnxruntime=options.onnxruntime,
        )  # fmt: skip
        costs = _described(options.costs, table)
    unit, measure = _measure(kind, size, table)
    budget = Budget(
        unit, math.inf, measure, options.asked, dense, cut or dense, options.bits, options.least_group, size, table,
        costs, tuple(_further(options, dense)),
        Allowed(options.prunes_heads(dense), frozenset(options.keep), options.kept_layers, options.least_group),
    )  # fmt: skip
    whole = budget.total(dense)
    budget = replace(budget, most={"ratio": (1 - value) * whole, "speedup": whole / value}.get(kind, value))
    if budget.meets(dense):
        raise UserError(
            f"the model has {budget.in_words(whole)} already, which meets {budget.in_words(value)}: "
            f"give a smaller {_flag(kind)}"
        )
    return _with_forms(budget, options)


def _with_forms(budget: Budget, options: PruneOptions) -> Budget:
    """The budget in the groups that were asked for, or with the integers that the search may choose.

    Of milliseconds these are what was timed, of bytes all.
    """
    table = budget.table if isinstance(budget.measure, StepTime) else None
    if options.bits == 32 or (table is None and budget.unit != "bytes"):
        return budget
    asked = MatrixForm(options.bits, options.least_group)
    if options.group_size is not None:
        known = table is not None and any((cost.bits, cost.group_size) == asked for cost in table.forms)
        return replace(budget, measure=StepTime(table, asked)) if table and known else budget
    if options.method != "saap" or options.engine != "any" or options.bits != 4:
        return budget
    if table is None:
        forms = outside = [form for bits in BITS for size in GROUP_SIZES if (form := MatrixForm(bits, size)) != asked]
    else:
        forms = [MatrixForm(cost.bits, cost.group_size) for cost in table.forms]
        outside = table.forms_of("outside")
    hidden, extra = budget.dense.hidden, bool(budget.dense.per_layer)  # tables of one number of bits
    words = [form for form in outside if hidden % form.group_size == 0 and not (extra and form.bits != options.bits)]
    return replace(budget, forms=tuple(forms), vocabulary=tuple(words))


def _further(options: PruneOptions, dense: ModelShape) -> Iterator[str]:
    if options.keep:
        yield f"fewer kinds than --keep {','.join(sorted(options.keep))}"
    asked = "heads" in options.keep or options.method == "shortgpt"
    if dense.separable_heads and not asked and not options.prunes_heads(dense):
        yield "--heads"
    if options.least_group > 32:
        yield "a smaller --group-size"
    if options.keep_layers:
        yield "fewer --keep-layers"


def _measure(kind: str, size: BundleSize | None, table: CostTable | None) -> tuple[str, Measure]:
    if kind == "max_bytes":
        assert size is not None
        return "bytes", FileSize(size)
    if kind in TIMED:
        assert table is not None
        return "ms", StepTime(table)
    return ("weights", Weights(False)) if kind == "ratio" else ("parameters", Weights(True))


def _size(
    options: PruneOptions, group_size: int, kind: str, dense: ModelShape, config: Mapping[str, object]
) -> BundleSize | None:
    try:
        size = bundle_size(config, options.bits, group_size)
        size.check(dense)
        return size
    except UserError:
        if kind != "max_bytes":  # then the size is a number to report only, and may be unknown
            return None
        raise


def _described(path: Path, table: CostTable) -> Costs:
    file = read_cost_file(path)
    about = {name: file.device.get(name) for name in DEVICE}
    if file.engine != CostFile.engine:
        about["engine"] = file.engine
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    about = {"file": path.name, "sha256": sha256, **about, "threads": table.threads, "depth": table.depth}
    return convert(about, Costs)
