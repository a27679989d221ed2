"""Losses around a plan: what one block costs where the others are already cut.

The hidden states before every layer are kept for the plan as it stands, so that trying another cut of one layer runs
only the layers from there on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from saap.models.layer_walk import layer_inputs, layers_of, loss_after, run_layer
from saap.models.streaming import present
from saap.models.structures import LayerPlan, ModelShape
from saap.prune.search.masking import masked


class WorkingPoint:
    """The model cut to a plan by silencing, with its hidden states before every layer.

    Args:
        model: the dense model; silenced inside :meth:`entered` only.
        plans: what the layers that are cut keep.
        ids: [sequences, tokens].
    """

    def __init__(self, model: PreTrainedModel, shape: ModelShape, plans: dict[int, LayerPlan], ids: torch.Tensor):
        self.model, self.shape, self.plans, self.ids = model, shape, plans, ids
        self.loss = 0.0
        self._hidden: list[list[torch.Tensor]] = []

    @contextmanager
    def entered(self) -> Iterator[WorkingPoint]:
        """Silence what the plans do not keep and run once; ``loss`` is then that of the plan, nats per token."""
        with torch.inference_mode():
            self._batches = layer_inputs(self.model, self.ids)
            self._hidden = [[batch.hidden for batch in self._batches]]
            with masked(self.model, self.plans, self.shape.head_dim):
                for index, layer in enumerate(layers_of(self.model)):
                    self._hidden.append(self._run(layer, index, self._hidden[-1]))
                self.loss = loss_after(self.model, self._hidden[-1], self.ids)
            yield self
            self._hidden, self._batches = [], []

    def loss_with(self, index: int, keep: LayerPlan) -> float:
        """Loss where layer ``index`` keeps this instead, nats per token."""
        plans = {**self.plans, index: keep}
        with masked(self.model, {i: plan for i, plan in plans.items() if i >= index}, self.shape.head_dim):
            hidden = self._hidden[index]
            for number, layer in enumerate(layers_of(self.model)[index:], index):
                hidden = self._run(layer, number, hidden)
        return loss_after(self.model, hidden, self.ids)

    def _run(self, layer: torch.nn.Module, index: int, hidden: list[torch.Tensor]) -> list[torch.Tensor]:
        with present(layer):
            return [run_layer(layer, x, batch.given[index]) for x, batch in zip(hidden, self._batches, strict=True)]
