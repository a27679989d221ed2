"""Choose bits and group size of each matrix, so that a file of a given size loses least.

Each matrix of the graph (queries, keys and values are one, gate and up are one, embedding and head are one where they
are tied) is rounded to 4 bit in groups of 32 by itself, and the KL divergence of the model's next-token distribution
from the float model's is measured. A divergence is quadratic in what rounding changes while that is small, so another
form of the same matrix is taken to cost as many times more or less as its squared error is. The divergences of
matrices are added, and the best forms within the budget are a knapsack with one choice per matrix, solved by HiGHS
(scipy.optimize.milp).
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
from saap.base.progress import Progress
from saap.models.architectures import architecture_of, shape_of
from saap.models.layer_walk import layer_inputs, layers_of, logits_after, states_after
from saap.models.slim_quant import BITS, GROUP_SIZES, MatrixForm
from saap.quantize.bundle_size import bundle_size, matrix_bytes, paged
from saap.quantize.groups import quantize

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
    losses = [relative_losses(model, unit) * cost for unit, cost in zip(units, costs, strict=True)]
    sizes = [np.array([unit.bytes(form) for form in unit.forms], float) for unit in units]
    chosen = knapsack(losses, sizes, max_bytes - rest)
    forms = {module: unit.forms[n] for unit, n in zip(units, chosen, strict=True) for module in unit.modules}
    total = rest + int(sum(size[n] for size, n in zip(sizes, chosen, strict=True)))
    return FormsChoice(forms, total, float(sum(loss[n] for loss, n in zip(losses, chosen, strict=True))))


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
def relative_losses(model: PreTrainedModel, unit: Unit) -> np.ndarray:
    """Squared error of each of the unit's forms, as a share of that of the form that is measured; [forms]."""
    weight = torch.cat(weights_of(model, unit))
    some = weight[:: -(-len(weight) // SAMPLE)].float()

    def error(form: MatrixForm) -> float:
        return (quantize(some, *form).dequantize().to(some.device) - some).square().sum().item()

    base = max(error(MEASURED), 1e-30)
    return np.array([error(form) / base for form in unit.forms])


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
        if progress:
            progress("measuring what 4 bit costs (parts)", place + 1, len(units))
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


def knapsack(losses: Sequence[np.ndarray], sizes: Sequence[np.ndarray], room: float) -> list[int]:
    """Choose for each unit so that losses add up to the least within ``room`` bytes.

    ``losses``, ``sizes``: of each unit, of each of its choices.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    loss, size = np.concatenate(losses), np.concatenate(sizes)
    owner = np.repeat(np.arange(len(losses)), [len(part) for part in losses])
    one_each = (owner == np.arange(len(losses))[:, None]).astype(float)
    answer = milp(
        loss / max(float(loss.max()), 1e-12),
        integrality=np.ones(len(loss)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(size[None] / size.max(), -np.inf, room / size.max()),
        ],
    )
    if answer.x is None:
        raise UserError(f"no choice of integers was found ({answer.message}): give another number of bytes")
    return [int(part.argmax()) for part in np.split(answer.x, np.flatnonzero(np.diff(owner)) + 1)]
