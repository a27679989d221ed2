"""Estimation for a model that is not in memory: all sequences go through a layer before the next one is read.

The numbers are those of :func:`saap.prune.scores.importance.estimate`. The states before every layer are kept on the
way up, and a layer runs once more on the way down, which is one forward pass more. The model is read twice.
"""

from __future__ import annotations

from collections.abc import MutableMapping

import torch
from transformers import PreTrainedModel

from devices.common.progress import Progress
from saap.models.layer_walk import Batch, layer_inputs, layers_of, logits_after, run_layer
from saap.models.matrices import matrices_of
from saap.models.shape import ModelShape
from saap.models.streaming import present
from saap.prune.options import Element
from saap.prune.scores.importance import Scores, Sums, check_loss, watched

Tensors = tuple[torch.Tensor, ...]
STATE_BYTES = 2 << 30  # of states before every layer; more sequences should go through in another portion


def estimate_layerwise(
    model: PreTrainedModel,
    shape: ModelShape,
    ids: torch.Tensor,
    *,
    c: float,
    element: Element,
    progress: Progress | None = None,
) -> Scores:
    """Score every structure, layer by layer; arguments and result as of
    :func:`saap.prune.scores.importance.estimate`."""
    sums, steps = Sums(shape, c, element), 2 * len(shape.layers)

    def say(step: int) -> None:
        if progress:
            progress("scoring (sequences)", step, steps)

    batches = layer_inputs(model, ids, batch=1)
    states = [[batch.hidden for batch in batches]]
    with torch.no_grad():
        for index, layer in enumerate(layers_of(model)):
            say(index)
            with present(layer):
                states.append([run_layer(layer, x, b.given[index]) for x, b in zip(states[-1], batches, strict=True)])
    left = [SharedGradients(batch) for batch in batches]
    losses, gradients = [], []
    for index, (hidden, row) in enumerate(zip(states.pop(), ids, strict=True)):
        loss, gradient = _loss(model, hidden, row)
        losses.append(check_loss(loss, index))
        gradients.append(gradient)
    # Down again: hooks on a layer's matrices take the sums.
    matrices, layers = matrices_of(model, shape), layers_of(model)
    for index in reversed(range(len(layers))):
        with present(layers[index]), watched(model, [m for m in matrices if m.layer == index], sums):
            for number, (hidden, batch) in enumerate(zip(states.pop(), batches, strict=True)):
                x = hidden.detach().requires_grad_(True)
                left[number].begin()
                left[number].backward(run_layer(layers[index], x, batch.given[index]), gradients[number])
                assert x.grad is not None
                gradients[number] = x.grad
        say(steps - index)
    return sums.scores(len(ids), sum(losses) / len(losses))


class SharedGradients:
    """Gradients of keys and values that later layers read, on their way down to the layer that made them."""

    def __init__(self, batch: Batch) -> None:
        self._shared: MutableMapping[str, Tensors] = {} if batch.shared is None else batch.shared
        self._made: dict[str, Tensors] = dict(self._shared)
        self._read: dict[str, Tensors] = {}
        self._gradients: dict[str, Tensors] = {}

    def begin(self) -> None:
        """Before a layer runs: it reads copies that take a gradient, or puts others in their place."""
        self._read = {
            kind: tuple(each.detach().requires_grad_(True) for each in made) for kind, made in self._made.items()
        }
        self._shared.update(self._read)

    def backward(self, output: torch.Tensor, gradient: torch.Tensor) -> None:
        """Through the layer that has run, from its output and from the keys and values that it made."""
        outputs, gradients = [output], [gradient]
        for kind, now in self._shared.items():
            if now is not self._read.get(kind) and kind in self._gradients:
                outputs += now
                gradients += self._gradients.pop(kind)
        torch.autograd.backward(outputs, gradients)
        for kind, read in self._read.items():
            if self._shared.get(kind) is read and read[0].grad is not None:
                new = tuple(each.grad for each in read if each.grad is not None)
                old = self._gradients.get(kind)
                self._gradients[kind] = tuple(a + b for a, b in zip(new, old, strict=True)) if old else new


def rows_at_once(shape: ModelShape, tokens: int) -> int:
    """Sequences whose states fit into :data:`STATE_BYTES`."""
    return max(1, STATE_BYTES // (4 * shape.hidden * max(1, tokens) * (len(shape.layers) + 1)))


def _loss(model: PreTrainedModel, hidden: torch.Tensor, row: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Mean NLL of a sequence and its gradient by the states after the last layer, [1, tokens, hidden]."""
    hidden = hidden.detach().requires_grad_(True)
    loss = torch.nn.functional.cross_entropy(logits_after(model, hidden[:, :-1])[0], row[1:].to(hidden.device))
    loss.backward()
    assert hidden.grad is not None
    return float(loss.item()), hidden.grad
