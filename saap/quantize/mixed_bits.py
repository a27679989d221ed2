"""Which matrices get 8 bit and which 4, so that a bundle of so many bytes loses least.

Each matrix of the graph (queries, keys and values are one, gate and up are one, embedding and head are one where they
are tied) is rounded to 4 bit by itself, and the KL divergence of the model's next-token distribution from the float
model's is measured; at 8 bit it is taken as nothing (the whole of SmolLM2-135M at 8 bit measures 0.003 nats). The
divergences of matrices are added, and the best set within the budget is a knapsack, solved exactly by HiGHS
(scipy.optimize.milp).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F
from transformers import PreTrainedModel

from devices.common.progress import Progress
from saap.models.architectures import architecture_of, shape_of
from saap.models.layer_walk import layer_inputs, layers_of, logits_after, states_after
from saap.quantize.bundle_size import PAGE, bundle_size
from saap.quantize.groups import quantize
from saap.system.errors import UserError

LOW, HIGH = 4, 8
ROWS = 4  # sequences that a divergence is measured on


@dataclass(frozen=True)
class Unit:
    """Modules that are one matrix in the graph, or read one table."""

    modules: tuple[str, ...]  # their names in the model
    layer: int | None  # their decoder layer; None is the vocabulary
    extra: int  # bytes that 8 bit takes more than 4 in the weights file


@dataclass(frozen=True)
class BitsChoice:
    """Bits of every linear of the decoder layers, and of the vocabulary."""

    bits_of: dict[str, int]  # module name -> 4 or 8
    vocabulary: int  # of embedding and head
    bytes: int  # of the bundle's weights file
    divergence: float  # what the matrices at 4 bit cost, nats per token, added up


def choose_bits(
    model: PreTrainedModel, rows: torch.Tensor, group_size: int, max_bytes: int, progress: Progress | None = None
) -> BitsChoice:
    """The bits that lose least of those whose weights file has at most ``max_bytes``.

    Args:
        model: float weights; unchanged.
        rows: ids [sequences, tokens] of calibration text; the first four are used.

    Raises UserError: not even all matrices at 4 bit fit.
    """
    units = units_of(model)
    least = bundle_size(model.config.to_dict(), LOW, group_size).total(shape_of(model.config))
    if least > max_bytes:
        raise UserError(
            f"{max_bytes:,} bytes cannot be met: with all matrices at 4 bit the weights take {least:,}; allow that "
            "many, or prune more"
        )
    room = max_bytes - least
    if sum(unit.extra for unit in units) <= room:
        chosen, losses = np.ones(len(units), bool), np.zeros(len(units))
    else:
        losses = np.array(divergences(model, units, rows[:ROWS], group_size, progress))
        chosen = knapsack(losses, np.array([unit.extra for unit in units], float), room)
    bits = {module: HIGH if high else LOW for unit, high in zip(units, chosen, strict=True) for module in unit.modules}
    architecture = architecture_of(model.config)
    vocabulary = bits.pop(architecture.head)
    bits.pop(architecture.embedding, None)
    total = least + sum(unit.extra for unit, high in zip(units, chosen, strict=True) if high)
    return BitsChoice(bits, vocabulary, total, float(losses[~chosen].sum()))


def units_of(model: PreTrainedModel) -> list[Unit]:
    """All matrices that have bits of their own, layer by layer, the vocabulary last."""
    architecture, units = architecture_of(model.config), []
    for index, layer in enumerate(layers_of(model)):
        there = dict(layer.named_modules())
        for names in (architecture.qkv, (architecture.output,), architecture.gate_up, (architecture.down,)):
            if all(hasattr(there.get(name), "weight") for name in names):
                weights = [there[name].weight for name in names]
                full = tuple(f"{architecture.layers}.{index}.{name}" for name in names)
                units.append(Unit(full, index, _extra(sum(w.numel() for w in weights))))
    table = model.get_submodule(architecture.embedding)
    head = model.get_submodule(architecture.head)
    tables = 1 if head.weight is table.weight else 2
    vocabulary = (architecture.head, architecture.embedding)
    return [*units, Unit(vocabulary, None, tables * _extra(table.weight.numel()))]  # type: ignore[operator]


def _extra(weights: int) -> int:
    """Bytes between the two precisions; arrays begin at whole pages."""
    high, low = (-(-weights * bits // 8 // PAGE) * PAGE for bits in (HIGH, LOW))
    return high - low


@torch.inference_mode()
def divergences(
    model: PreTrainedModel, units: list[Unit], rows: torch.Tensor, group_size: int, progress: Progress | None = None
) -> list[float]:
    """KL(float model || model with one unit at 4 bit), nats per token, for each unit.

    A unit of layer i is measured from what reaches that layer, which rounding it does not change.
    """
    batches = layer_inputs(model, rows)
    reaching = [[batch.hidden for batch in batches]]  # each layer, and the final norm
    reaching += states_after(model, batches, reaching[0])
    reference = [logits_after(model, x).log_softmax(-1) for x in reaching[-1]]
    found = []
    for place, unit in enumerate(units):
        with rounded(model, unit, group_size):
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
        found.append(max(0.0, total / rows.numel()))
        if progress:
            progress("measuring what 4 bit costs (parts)", place + 1, len(units))
    return found


@contextmanager
def rounded(model: PreTrainedModel, unit: Unit, group_size: int) -> Iterator[None]:
    """The model with one unit's weights at 4 bit for the time of the block."""
    weights: dict[int, torch.Tensor] = {}
    for name in unit.modules:
        parameter = model.get_parameter(f"{name}.weight")
        weights[id(parameter)] = parameter  # a tied table once
    saved = [(weight, weight.data) for weight in weights.values()]
    try:
        for weight, values in saved:
            weight.data = quantize(values, LOW, group_size).dequantize().to(values.dtype)
        yield
    finally:
        for weight, values in saved:
            weight.data = values


def knapsack(losses: NDArray[np.float64], extra: NDArray[np.float64], room: float) -> NDArray[np.bool_]:
    """Which units get 8 bit: those whose losses add up to the most within ``room`` bytes; bool, [units]."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    scale = max(float(losses.max()), 1e-12)
    answer = milp(
        -losses / scale,
        integrality=np.ones(len(losses)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(extra[None] / extra.max(), -np.inf, room / extra.max())],
    )
    if answer.x is None:
        raise UserError(f"no choice of bits was found ({answer.message}): give another number of bytes")
    chosen: NDArray[np.bool_] = answer.x > 0.5
    return chosen
