"""Requirements on a model, and their budgets for its layers.

* ratio r: weights of the decoder layers at most (1 - r) times the dense model's
* max_params: parameters, embedding and head included
* max_bytes: bytes of the bundle's weights file (:mod:`saap.quantize.bundle_size`)
* ms_per_token: milliseconds of a decode step by a table measured on the device (:mod:`saap.prune.search.layer_costs`)
* speedup x: milliseconds of a step at most those of the dense model by the table / x

Costs are those of :mod:`saap.prune.search.model_cost`; :mod:`saap.prune.search.milp` brings the sum of all blocks
below :attr:`Budget.limit`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from msgspec import convert

from saap.base.costs import DEVICE, CostFile, read_cost_file
from saap.base.errors import UserError
from saap.models.record import Costs, Plan, PlannedBundle
from saap.models.shape import BlockKind, LayerSizes, ModelShape
from saap.models.slim_quant import BITS, GROUP_SIZES, MatrixForm
from saap.prune.forms import BlockForms
from saap.prune.options import TIMED, PruneOptions, flag_of
from saap.prune.search.choices import Allowed
from saap.prune.search.layer_costs import CostTable, check_valid, read_costs
from saap.prune.search.model_cost import FileSize, Measure, ModelCost, StepTime, Weights
from saap.quantize.bundle_size import BundleSize, bundle_size

ROUNDING = 1e-12  # relative; a sum of milliseconds depends on its order by as much


@dataclass(frozen=True)
class WordsOption:
    """A head of fewer words that the search may choose."""

    rows: int
    longer: float  # share of tokens that a text takes more
    price: float  # nats per token of the whole vocabulary
    input: bool = False  # whether the embedding loses the words, too

    def of(self, shape: ModelShape) -> ModelShape:
        return replace(shape, vocab=self.rows) if self.input else replace(shape, head_tokens=self.rows)


@dataclass(frozen=True, kw_only=True)
class Budget(ModelCost):
    """A requirement on the cost of one model, and what may change to meet it."""

    most: float  # cost of the whole slim model
    asked: dict[str, float]  # the requirement by its name: ratio, max_params, max_bytes, speedup or ms_per_token
    further: tuple[str, ...] = ()  # options that would allow more, for a message
    allowed: Allowed = field(default_factory=Allowed)  # structures that may be removed
    forms: tuple[MatrixForm, ...] = ()  # integers that matrices may have instead; none: the search chooses none
    vocabulary: tuple[MatrixForm, ...] = ()  # integers that embedding and head may have instead
    words: tuple[WordsOption, ...] = ()  # vocabularies that the head may have instead of the whole

    def forms_for(self, kind: BlockKind, sizes: LayerSizes) -> list[BlockForms]:
        """Return the integers that a block of these sizes may have, the base first: whole groups, and timed forms."""
        timed = set(self.forms) if self.unit != "ms" or self.table is None else set(self.table.forms_of(kind.name))
        allowed = [form for form in self.forms if form in timed]
        both = [
            [self.base, *(form for form in allowed if columns % form.group_size == 0)]
            for columns in (self.cut.hidden, self.cut.inner_width(kind, sizes))
        ]
        return [BlockForms(reads, writes) for reads in both[0] for writes in both[1]]

    def saying(self, words: WordsOption) -> Budget:
        """Return the requirement with this vocabulary: a speed-up is for a text, which takes more tokens."""
        of_text = 1 + words.longer if "speedup" in self.asked else 1.0
        return replace(self, most=self.most / of_text, cut=words.of(self.cut), words=(), longer=words.longer)

    def outside_cost(self, form: MatrixForm, words: WordsOption | None = None) -> float:
        """Return the part of the limit for embedding and head in this form and vocabulary; it may be negative."""
        if words is None:
            return self.measure.outside(self.cut, form) - self.fixed
        own = self.saying(words)
        return self.measure.outside(own.cut, form) - self.fixed + self.most - own.most

    @property
    def limit(self) -> float:
        """Cost of all blocks together at most; below 0 if the rest alone is too much."""
        return self.most - self.fixed

    def meets(self, shape: ModelShape) -> bool:
        return self.fits(self.total(shape))

    def fits(self, total: float) -> bool:
        """Whether a whole model of this cost meets the requirement."""
        return total <= self.most * (1 + ROUNDING)

    @property
    def share(self) -> float:
        """Share of the layers' cost that has to be removed."""
        return max(0.0, 1 - self.limit / (self.total(self.dense) - self.measure.outside(self.dense)))

    def record(self) -> Plan:
        """Return the requirement, the bundle, the cost table and the dense model for ``saap.json``."""
        bundle = PlannedBundle(bits=self.bits, block=self.group_size if self.bits != 32 else 0)
        costs = Plan(costs=self.costs) if self.costs else Plan()
        return {"asked": self.asked, "bundle": bundle, **costs, "dense": self.report_dense()}

    def below_floor(self, floor: float) -> UserError:
        """Return the error for a least cost above the requirement; it names a number that can be met."""
        ((kind, asked),) = self.asked.items()
        if kind in ("ratio", "speedup"):
            whole = float(self.report_dense()["ms_per_token"] or 0.0) if kind == "speedup" else self.total(self.dense)
            best = 1 - floor / whole if kind == "ratio" else whole / floor
            name = {"ratio": "a ratio", "speedup": "a speed-up"}[kind]
            largest = _rounded(best, math.floor)
            words = f"asked {name} of {asked:g}, the largest that these options allow is {largest:g}"
            advice = [f"give a smaller {flag_of(kind)}"] if largest > (kind == "speedup") else []
        else:
            least = _rounded(floor, math.ceil) if self.unit == "ms" else floor
            words = f"asked {self.in_words(asked)}, the smallest that these options allow is {self.in_words(least)}"
            advice = [f"give a larger {flag_of(kind)}"]
        if self.further:
            advice.append(f"allow more with {' or '.join(self.further)}")
        return UserError(f"{words}: {', or '.join(advice) or 'prune another model'}")


def _rounded(value: float, way: Callable[[float], float]) -> float:
    """Four digits, rounded to the side that can be met."""
    if value <= 0:
        return 0.0
    scale = 10.0 ** (3 - math.floor(math.log10(value)))
    return way(value * scale) / scale


def budget_for(
    options: PruneOptions, dense: ModelShape, config: Mapping[str, object], *, cut: ModelShape | None = None
) -> Budget:
    """Return the requirement of the options on a model with this ``config.json``.

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
        if not options.accept_invalid:
            check_valid(options.costs)
        costs = _described(options.costs, table)
    unit, measure = _measure(kind, size, table)
    budget = Budget(
        unit=unit, most=math.inf, measure=measure, asked=options.asked, dense=dense, cut=cut or dense,
        bits=options.bits, group_size=options.least_group, size=size, table=table, costs=costs,
        further=tuple(_further(options, dense)),
        allowed=Allowed(options.prunes_heads(dense), frozenset(options.keep), options.kept_layers, options.least_group),
    )  # fmt: skip
    whole = budget.total(dense)
    budget = replace(budget, most={"ratio": (1 - value) * whole, "speedup": whole / value}.get(kind, value))
    if budget.meets(dense):
        raise UserError(
            f"the model has {budget.in_words(whole)} already, which meets {budget.in_words(value)}: "
            f"give a smaller {flag_of(kind)}"
        )
    return _with_forms(budget, options)


def _with_forms(budget: Budget, options: PruneOptions) -> Budget:
    """Set the group size of the options, or the integers that the search may choose.

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
