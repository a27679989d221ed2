"""Measure what a removal costs before anything is cut: silence structures in the dense model, forward only.

A structure is silent when what it puts into the matrix that writes to the residual stream is zero; the loss of the
masked model is the loss of the slim model. :class:`WorkingPoint` measures what one block costs where the others are
already cut: the hidden states before every layer are kept for the plan as it stands, so that trying another cut of one
layer runs only the layers from there on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from transformers import PreTrainedModel

from saap.models.architectures import architecture_of, shape_of
from saap.models.layer_walk import layer_inputs, layers_of, loss_after, removed_hooks, states_after
from saap.models.shape import KINDS, ModelShape
from saap.prune.cut.surgery import kept_columns
from saap.prune.plan import LayerPlan
from saap.prune.shares import shares


@contextmanager
def masked(model: PreTrainedModel, plans: dict[int, LayerPlan]) -> Iterator[None]:
    """Silence everything that the plans of the given layers do not keep, inside the block; no weight is written."""
    architecture, shape = architecture_of(model.config), shape_of(model.config)
    layers = layers_of(model)
    with removed_hooks() as handles:
        for index, keep in plans.items():
            modules = {name: module for name, module in layers[index].named_modules() if name}
            for kind in KINDS.values():
                linear, kept = modules.get(architecture.writing(kind)), kept_columns(kind, keep, shape)
                if linear is None or len(kept) == linear.in_features:
                    continue
                mask = torch.zeros(linear.in_features)
                mask[kept] = 1
                handles.append(linear.register_forward_pre_hook(partial(_silence, mask)))
                if not len(kept):  # the whole block goes, its bias too
                    handles.append(linear.register_forward_hook(lambda _, __, output: torch.zeros_like(output)))
        yield


def _silence(mask: torch.Tensor, _: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
    return (args[0] * mask.to(args[0]),)


@torch.inference_mode()
def mean_nll(model: PreTrainedModel, ids: torch.Tensor, batch: int = 4) -> float:
    """Mean negative log-likelihood in nats per predicted token, ids [sequences, tokens]."""

    def loss_of(rows: torch.Tensor) -> float:
        rows = rows.to(model.device)
        return float(model(input_ids=rows, labels=rows, use_cache=False).loss.item()) * len(rows)

    losses = shares().each(list(ids.split(batch)), loss_of)
    return sum(losses) / len(ids)


class WorkingPoint:
    """The model cut to a plan by silencing (inside :meth:`entered`), with its hidden states before every layer."""

    def __init__(self, model: PreTrainedModel, shape: ModelShape, plans: dict[int, LayerPlan], ids: torch.Tensor):
        self.model, self.shape, self.plans, self.ids = model, shape, plans, ids
        self.loss = 0.0
        self._hidden: list[list[torch.Tensor]] = []
        self._shared: list[dict[str, tuple[torch.Tensor, ...]]] = []

    @contextmanager
    def entered(self) -> Iterator[WorkingPoint]:
        """Silence what the plans do not keep and run once; ``loss`` is then that of the plan, nats per token."""
        with torch.inference_mode():
            self._batches = layer_inputs(self.model, self.ids)
            self._hidden = [[batch.hidden for batch in self._batches]]
            with masked(self.model, self.plans):
                self._hidden += states_after(self.model, self._batches, self._hidden[0])
                self.loss = loss_after(self.model, self._hidden[-1], self.ids)
            self._shared = [dict(batch.shared or {}) for batch in self._batches]
            yield self
            self._hidden, self._batches, self._shared = [], [], []

    def loss_with(self, index: int, keep: LayerPlan) -> float:
        """Loss where layer ``index`` keeps this instead, nats per token."""
        plans = {**self.plans, index: keep}
        for batch, left in zip(self._batches, self._shared, strict=True):  # what layers before this one leave
            if batch.shared is not None:
                batch.shared.update(left)
        with masked(self.model, {i: plan for i, plan in plans.items() if i >= index}):
            last = deque(states_after(self.model, self._batches, self._hidden[index], index), maxlen=1).pop()
        return loss_after(self.model, last, self.ids)
