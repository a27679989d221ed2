"""Choose bits and group size of each matrix, so that a file of a given size loses least.

Each matrix of the graph (queries, keys and values are one, gate and up are one, embedding and head are one where they
are tied) is rounded to 4 bit in groups of 32 by itself, and the KL divergence of the model's next-token distribution
from the float model's is measured. A divergence is quadratic in what rounding changes while that is small, so another
form of the same matrix is taken to cost as many times more or less as its squared error is. The divergences of
matrices are added, and the best forms within the budget are a knapsack with one choice per matrix
(:mod:`saap.quantize.solver`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from saap.base.errors import UserError
from saap.base.progress import Progress, advance
from saap.models.architectures import architecture_of, shape_of
from saap.models.layer_walk import layer_inputs, layers_of, logits_after, states_after
from saap.models.slim_quant import BITS, GROUP_SIZES, MatrixForm
from saap.quantize.bundle_size import bundle_size, matrix_bytes, paged
from saap.quantize.groups import quantize
from saap.quantize.solver import least_price, one_for_each, within

MEASURED = MatrixForm(4, 32)  # whose divergence is measured
ROWS = 4  # sequences that a divergence is measured on
SAMPLE = 512  # rows of a matrix that its squared errors are measured on


@dataclass(frozen=True)
class Unit:
    """Modules that are one matrix in the graph, or read one table."""

    modules: tuple[str, ...]  # their names in the model
    layer: int | None  # their decoder layer; None is the vocabulary
    rows: int
    columns: int
    copies: int = 1  # an embedding and a head that are not tied are two

    @property
    def forms(self) -> list[MatrixForm]:
        """The forms that it can have, the smallest file first."""
        sizes = [size for size in GROUP_SIZES if self.columns % size == 0]
        return sorted((MatrixForm(bits, size) for bits in BITS for size in sizes), key=self.bytes)

    def bytes(self, form: MatrixForm) -> int:
        """Bytes that it takes of the weights file."""
        return self.copies * sum(map(paged, matrix_bytes(self.rows, self.columns, form)))


@dataclass(frozen=True)
class FormsChoice:
    """The form of every linear of the decoder layers, of embedding and of head."""

    forms: dict[str, MatrixForm]  # by module name
    bytes: int  # of the bundle's weights file
    divergence: float  # what they cost, nats per token, added up


def choose_forms(
    model: PreTrainedModel, rows: torch.Tensor, max_bytes: int, progress: Progress | None = None
) -> FormsChoice:
    """Choose the forms that lose least of those whose weights file has at most ``max_bytes``.

    Args:
        model: float weights; unchanged.
        rows: ids [sequences, tokens] of calibration text; the first four are used.

    Raises UserError: not even the smallest forms fit.
    """
    units = units_of(model)
    measured = bundle_size(model.config.to_dict(), *MEASURED).total(shape_of(model.config))
    rest = measured - sum(unit.bytes(MEASURED) for unit in units)  # norms, rotary tables
    least = rest + sum(unit.bytes(unit.forms[0]) for unit in units)
    if least > max_bytes:
        raise UserError(
            f"{max_bytes:,} bytes cannot be met: with all matrices at 4 bit, in groups as large as they allow, the "
            f"weights take {least:,}; allow that many, or prune more"
        )
    costs = divergences(model, units, rows[:ROWS], progress)
    errors = [errors_of(weights_of(model, unit)) for unit in units]
    options = [(place, unit, form) for place, unit in enumerate(units) for form in unit.forms]
    losses = np.array([errors[place][form] * costs[place] for place, _, form in options])
    sizes = np.array([unit.bytes(form) for _, unit, form in options], float)
    owners = np.array([place for place, _, _ in options])
    each = one_for_each(owners, np.arange(len(options)), (len(units), len(options)))
    answer = least_price(losses, [each, within(sizes, max_bytes - rest)])
    if answer.x is None:
        raise UserError(f"no choice of integers was found ({answer.message}): give another number of bytes")
    chosen = np.flatnonzero(answer.x > 0.5)
    forms = {module: options[n][2] for n in chosen for module in options[n][1].modules}
    return FormsChoice(forms, rest + int(sizes[chosen].sum()), float(losses[chosen].sum()))


def units_of(model: PreTrainedModel) -> list[Unit]:
    """All matrices that have a form of their own, layer by layer, the vocabulary last."""
    architecture, units = architecture_of(model.config), []
    for index, layer in enumerate(layers_of(model)):
        there = dict(layer.named_modules())
        for names in architecture.matrices.values():
            if all(hasattr(there.get(name), "weight") for name in names):
                weights = [there[name].weight for name in names]
                full = tuple(f"{architecture.layers}.{index}.{name}" for name in names)
                units.append(Unit(full, index, sum(len(w) for w in weights), weights[0].shape[1]))
    table = model.get_parameter(f"{architecture.embedding}.weight")
    head = model.get_parameter(f"{architecture.head}.weight")
    (words, hidden), vocabulary = table.shape, (architecture.head, architecture.embedding)
    return [*units, Unit(vocabulary, None, words, hidden, 1 if head is table else 2)]


def weights_of(model: PreTrainedModel, unit: Unit) -> list[torch.Tensor]:
    """Return the unit's parameters, a tied table once."""
    parameters: list[torch.Tensor] = [model.get_parameter(f"{name}.weight") for name in unit.modules]
    return list({id(parameter): parameter for parameter in parameters}.values())


@torch.inference_mode()
def errors_of(weights: Sequence[torch.Tensor]) -> dict[MatrixForm, float]:
    """Compare the squared errors of a matrix [N, K] in each form that a part of it can have.

    Its rows come in several tensors, of which a sample is looked at. Errors are shares of that of ``MEASURED``; there
    are none where the matrix cannot have that form.
    """
    weight = torch.cat(list(weights))
    some, columns = weight[:: -(-len(weight) // SAMPLE)].float(), weight.shape[1]
    if columns % MEASURED.group_size:
        return {}

    def error(form: MatrixForm) -> float:
        part = some[:, : columns // form.group_size * form.group_size]  # fewer columns may be whole groups
        return (quantize(part, *form).dequantize().to(part.device) - part).square().mean().item()

    base = max(error(MEASURED), 1e-30)
    sizes = [size for size in GROUP_SIZES if size <= columns]
    return {form: error(form) / base for bits in BITS for size in sizes if (form := MatrixForm(bits, size))}


@torch.inference_mode()
def divergences(
    model: PreTrainedModel, units: list[Unit], rows: torch.Tensor, progress: Progress | None = None
) -> list[float]:
    """KL(float model || model with one unit rounded to 4 bit), nats per token, for each unit.

    A unit of layer i is measured from what reaches that layer, which rounding it does not change.
    """
    batches = layer_inputs(model, rows)
    reaching = [[batch.hidden for batch in batches]]  # each layer, and the final norm
    reaching += states_after(model, batches, reaching[0])
    reference = [logits_after(model, x).log_softmax(-1) for x in reaching[-1]]
    divergences = []
    for place, unit in enumerate(units):
        with rounded(weights_of(model, unit), MEASURED):
            if unit.layer is None:
                logits = [
                    model(input_ids=part.to(model.device), use_cache=False).logits
                    for part in rows.split(len(reference[0]))
                ]
                predicted = [x.float().log_softmax(-1) for x in logits]
            else:
                last = deque(states_after(model, batches, reaching[unit.layer], unit.layer), maxlen=1).pop()
                predicted = [logits_after(model, x).log_softmax(-1) for x in last]
        pairs = list(zip(predicted, reference, strict=True))
        total = sum(F.kl_div(own, true, log_target=True, reduction="sum").item() for own, true in pairs)
        divergences.append(max(0.0, total / rows.numel()))
        advance(progress, "measuring what 4 bit costs (parts)", place + 1, len(units))
    return divergences


@contextmanager
def rounded(weights: Sequence[torch.Tensor], form: MatrixForm) -> Iterator[None]:
    """Round the weights to integers of a form for the time of the block."""
    saved = [(weight, weight.data) for weight in weights]
    try:
        for weight, values in saved:
            weight.data = quantize(values, *form).dequantize().to(values)
        yield
    finally:
        for weight, values in saved:
            weight.data = values
