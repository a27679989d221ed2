"""Prices of each matrix in integers of some form, in nats per token as those of pruning.

A matrix is rounded to 4 bit in groups of 32, and what its block adds to the residual stream changes by d; that is worth
1/2 E[(g.d)^2] (:mod:`saap.prune.scores.gradients`). Other forms cost as many times more or less as their squared error
is (:mod:`saap.quantize.choose_forms`). Embedding and head have no block: their KL is measured. Weights are rounded to
the nearest; tuning gives much of it back, so as of what goes whole a share of it is not counted (studies/search).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from saap.models.architectures import architecture_of
from saap.models.layer_walk import layer_inputs, layers_of, logits_after, run_layer
from saap.models.shape import BlockKind
from saap.models.slim_quant import MatrixForm
from saap.models.streaming import present
from saap.prune.forms import READS, WRITES, BlockForms, Place
from saap.quantize.choose_forms import MEASURED, errors_of, rounded

ROWS = 4  # sequences that embedding and head are measured on
Prices = Mapping[MatrixForm, float]  # nats per token


@dataclass(frozen=True)
class Rounding:
    """Prices of forms.

    Attributes:
        blocks: of the matrix of each block that reads, and of the one that writes.
        vocabulary: of embedding and head together.
    """

    blocks: Mapping[Place, tuple[Prices, Prices]]
    vocabulary: Prices

    def price(self, place: Place, forms: BlockForms) -> float:
        """Return the price of a block in these forms."""
        return sum(prices[form] for prices, form in zip(self.blocks[place], forms, strict=True))

    def counted(self, share: float) -> Rounding:
        """Scale the prices by a share."""

        def less(prices: Prices) -> Prices:
            return {form: share * price for form, price in prices.items()}

        blocks = {place: (less(reads), less(writes)) for place, (reads, writes) in self.blocks.items()}
        return replace(self, blocks=blocks, vocabulary=less(self.vocabulary))


@dataclass(frozen=True)
class RoundedMatrix:
    """One matrix of a block: squared errors by form (:func:`errors_of`), and what the block adds where it is rounded.

    ``added``: [sequences, tokens, hidden] for each batch; none where its columns are no whole groups.
    """

    errors: Mapping[MatrixForm, float]
    added: Sequence[torch.Tensor]

    def prices(self, price: Callable[[Sequence[torch.Tensor]], float]) -> Prices:
        """Return the prices of all forms; ``price`` gives that of a changed output."""
        measured = price(self.added) if self.added else 0.0
        return {form: share * measured for form, share in self.errors.items()}


def rounded_block(
    modules: Mapping[str, nn.Module],
    parts: Mapping[str, tuple[str, ...]],
    kind: BlockKind,
    adds: Callable[[], list[torch.Tensor]],
) -> tuple[RoundedMatrix, RoundedMatrix]:
    """Round the matrix of a block that reads and the one that writes, each while the other is not.

    Args:
        modules: of its layer, by name.
        parts: the modules of each part of a graph.
        adds: what the block adds with the weights of just now.
    """
    matrices = []
    for part in (READS[kind.name], WRITES[kind.name]):
        there = [modules[name] for name in parts[part] if name in modules]  # a layer may have no keys and values
        weights = [weight for module in there if isinstance(weight := module.weight, torch.Tensor)]
        if errors := errors_of(weights):
            with rounded(weights, MEASURED):
                matrices.append(RoundedMatrix(errors, adds()))
        else:
            matrices.append(RoundedMatrix({}, []))
    return matrices[0], matrices[1]


@torch.inference_mode()
def vocabulary_prices(model: PreTrainedModel, ids: torch.Tensor) -> Prices:
    """KL from the model as it is to one whose embedding and head are rounded, nats per token.

    ``ids`` [sequences, tokens] are of text that is judged; the first four are used.
    """
    architecture, ids = architecture_of(model.config), ids[:ROWS]
    modules = [model.get_submodule(name) for name in (architecture.embedding, architecture.head)]
    weights = list({id(m.weight): m.weight for m in modules}.values())  # a tied one once
    tables = [weight for weight in weights if isinstance(weight, torch.Tensor)]
    errors = errors_of(tables)
    if not errors:
        return {}
    whole = list(_predicted(model, ids))
    with rounded(tables, MEASURED):
        own = list(_predicted(model, ids))
    total = sum(F.kl_div(o, w, log_target=True, reduction="sum").item() for o, w in zip(own, whole, strict=True))
    return {form: share * max(0.0, total / ids.numel()) for form, share in errors.items()}


def _predicted(model: PreTrainedModel, ids: torch.Tensor) -> Iterator[torch.Tensor]:
    """Log-probabilities of each sequence."""
    batches = layer_inputs(model, ids, batch=1)
    hidden = [batch.hidden for batch in batches]
    for index, layer in enumerate(layers_of(model)):
        with present(layer):
            hidden = [run_layer(layer, x, batch.arguments[index]) for x, batch in zip(hidden, batches, strict=True)]
    return (logits_after(model, x).log_softmax(-1) for x in hidden)
