"""Estimation for a model that is not in memory: all sequences go through a layer before the next one is read.

The numbers are those of :func:`saap.prune.scores.importance.estimate`. The states before every layer are kept on the
way up, and a layer runs once more on the way down, which is one forward pass more. The model is read twice.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from contextlib import AbstractContextManager

import torch
from transformers import PreTrainedModel

from saap.base.progress import Progress, advance
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
    sums, losses = Sums(shape, c, element), []
    matrices = matrices_of(model, shape)

    def loss_of(hidden: torch.Tensor, index: int) -> torch.Tensor:
        row = ids[index].to(hidden.device)
        loss = torch.nn.functional.cross_entropy(logits_after(model, hidden[:, :-1])[0], row[1:])
        losses.append(check_loss(float(loss.detach()), index))
        return loss

    def watch(index: int) -> AbstractContextManager[None]:
        return watched(model, [m for m in matrices if m.layer == index], sums)

    def say(done: int, of: int) -> None:
        advance(progress, "scoring (sequences)", done, of)

    down_again(model, ids, loss_of, watch, say)
    return sums.scores(len(ids), sum(losses) / len(losses))


def down_again(
    model: PreTrainedModel,
    ids: torch.Tensor,
    loss_of: Callable[[torch.Tensor, int], torch.Tensor],
    watch: Callable[[int], AbstractContextManager[None]],
    say: Callable[[int, int], object],
) -> None:
    """Every sequence forward and backward, a layer at a time.

    Args:
        loss_of: the loss of the states after the last layer, [1, tokens, hidden], and the number of the sequence.
        watch: a context in which a layer, by its number, runs forward and backward; hooks there take what they want.
        say: called as (done, of).
    """
    layers = layers_of(model)
    steps = 2 * len(layers)
    batches = layer_inputs(model, ids, batch=1)
    states = [[batch.hidden for batch in batches]]
    with torch.no_grad():
        for index, layer in enumerate(layers):
            say(index, steps)
            with present(layer):
                states.append(
                    [run_layer(layer, x, b.arguments[index]) for x, b in zip(states[-1], batches, strict=True)]
                )
    left = [SharedGradients(batch) for batch in batches]
    gradients = []
    for index, hidden in enumerate(states.pop()):
        hidden = hidden.detach().requires_grad_(True)
        loss_of(hidden, index).backward()
        assert hidden.grad is not None
        gradients.append(hidden.grad)
    for index in reversed(range(len(layers))):
        with present(layers[index]), watch(index):
            for number, (hidden, batch) in enumerate(zip(states.pop(), batches, strict=True)):
                x = hidden.detach().requires_grad_(True)
                left[number].begin()
                left[number].backward(run_layer(layers[index], x, batch.arguments[index]), gradients[number])
                assert x.grad is not None
                gradients[number] = x.grad
        say(steps - index, steps)


class SharedGradients:
    """Gradients of keys and values that later layers read, on their way down to the layer that made them."""

    def __init__(self, batch: Batch) -> None:
        self._shared: MutableMapping[str, Tensors] = {} if batch.shared is None else batch.shared
        self._current: dict[str, Tensors] = dict(self._shared)
        self._read: dict[str, Tensors] = {}
        self._gradients: dict[str, Tensors] = {}

    def begin(self) -> None:
        """Prepare a layer's run: it reads copies that take a gradient, or puts others in their place."""
        self._read = {
            kind: tuple(each.detach().requires_grad_(True) for each in tensors)
            for kind, tensors in self._current.items()
        }
        self._shared.update(self._read)

    def backward(self, output: torch.Tensor, gradient: torch.Tensor) -> None:
        """Go back through the layer that has run, from its output and from its keys and values."""
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
