"""Costs of a model in one unit: weights, parameters, bytes or milliseconds.

A cost is a sum: the part that pruning leaves alone (embedding, head, last norm, the constant part of a step), and the
blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from saap.models.record import Costs
from saap.models.shape import BlockKind, LayerSizes, ModelShape
from saap.models.slim_quant import MatrixForm
from saap.prune.forms import READS, WRITES, BlockForms, PlanForms
from saap.prune.search.layer_costs import CostTable
from saap.quantize.bundle_size import VOCABULARY, BundleSize, bundle_size

if TYPE_CHECKING:
    from saap.prune.plan import PrunePlan


class Measure(Protocol):
    """Costs in one unit."""

    def outside(self, shape: ModelShape, form: MatrixForm | None = None) -> float:
        """Cost outside the layers, with embedding and head in this form; None is the bundle's own."""

    def block(self, kind: BlockKind, shape: ModelShape, sizes: LayerSizes, forms: BlockForms | None = None) -> float:
        """Cost of one block of a layer of these sizes in these forms; 0 if it has none of the kind."""


@dataclass(frozen=True)
class Weights:
    """A count of weights: of the decoder layers only, or with ``everything`` of the whole model."""

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
    form: MatrixForm | None = None  # of all matrices without a form of their own; None is the table's own

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
        """Return the share of the table's own milliseconds; 1 for a form that was not timed."""
        form = form or self.form
        return self.table.share_of(part, form) if form in self.table.forms_of(part) else 1.0


@dataclass(frozen=True, kw_only=True)
class ModelCost:
    """Costs of a model and of its slim forms, in the unit of a measure."""

    unit: str  # weights, parameters, bytes or ms
    measure: Measure
    dense: ModelShape  # the model that is pruned
    cut: ModelShape  # with the biases and the vocabulary of the slim model; options are measured in it
    bits: int = 4  # of the planned bundle
    group_size: int = 32  # of that bundle
    size: BundleSize | None = None  # of that bundle; None if none can be made of the model
    table: CostTable | None = None  # milliseconds; None without a cost table
    costs: Costs | None = None  # description of the table for a record
    longer: float = 0.0  # share of additional tokens for a text in the vocabulary of ``cut``

    @property
    def base(self) -> MatrixForm:
        """Integers of all matrices for which the search chooses no others."""
        return MatrixForm(self.bits, self.group_size)

    @property
    def fixed(self) -> float:
        """Cost of the slim model without any layer."""
        return self.measure.outside(self.cut)

    def cost(self, kind: BlockKind, sizes: LayerSizes, forms: BlockForms | None = None) -> float:
        """Return the cost of one block."""
        return self.measure.block(kind, self.cut, sizes, forms)

    def layer_cost(self, sizes: LayerSizes, shape: ModelShape | None = None) -> float:
        """Return the cost of a layer's blocks; ``shape`` is by default the slim model's."""
        return sum(self.measure.block(kind, shape or self.cut, sizes) for kind in sizes.blocks)

    def total(self, shape: ModelShape) -> float:
        return self.measure.outside(shape) + sum(self.layer_cost(sizes, shape) for sizes in shape.layers)

    def total_in(self, forms: PlanForms, shape: ModelShape, kept_layers: Sequence[int]) -> float:
        """Return the cost of a slim model in chosen integers; ``kept_layers``: its layers in the pruned model."""
        blocks = (
            self.measure.block(kind, shape, sizes, forms.blocks.get((layer, kind.name)))
            for layer, sizes in zip(kept_layers, shape.layers, strict=True)
            for kind in sizes.blocks
        )
        return self.measure.outside(shape, forms.vocabulary) + sum(blocks)

    def report(
        self, shape: ModelShape, config: Mapping[str, object] | None = None, plan: PrunePlan | None = None
    ) -> dict[str, float | None]:
        """Measure a model in all units; None is unknown.

        With its own ``config.json`` bytes are exact; else positions and rotary tables are those of the dense model.
        ``plan``: its plan, for the integers that the search chose.
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
        """Measure the dense model as it is exported by default."""
        measure = StepTime(self.measure.table) if isinstance(self.measure, StepTime) else self.measure
        return replace(self, measure=measure, longer=0.0).report(self.dense)

    @property
    def fastest_group_size(self) -> int:
        """The group size of all matrices with which the dense model takes the shortest step by the table."""
        if self.table is None:
            return self.group_size
        timed = set.intersection(*(set(self.table.forms_of(part)) for part in ("attention", "ffn", "outside")))
        steps = {self.base: StepTime(self.table)}
        steps |= {form: StepTime(self.table, form) for form in sorted(timed) if form.bits == self.bits}
        return min(steps, key=lambda form: replace(self, measure=steps[form]).total(self.dense)).group_size

    def in_words(self, value: float) -> str:
        if self.unit == "bytes":
            return f"{value / 1e6:,.2f} MB at {self.bits} bit ({value:,.0f} bytes)"
        if self.unit == "ms":
            return f"{value:.4g} ms per token"
        return f"{value:,.0f} {self.unit}"
