"""Estimation: vector-wise and element-wise importance of coupled structures, streamed sequence by sequence.

For calibration sequence j with loss L_j (mean NLL per token) and gradient g_j, removing structure G sets its weights w
to zero, and a second-order Taylor expansion with the empirical Fisher in place of the Hessian gives

* vector-wise   I_v(G) = | mean_j t_j - c/2 mean_j t_j^2 |,   t_j(G) = sum_w g_j w
* element-wise  I_e(G) = mean_j sum_w | g_j w - c/2 (g_j w)^2 |   (streamed: an upper bound of the exact score)

after LLM-Pruner (arXiv 2305.11627) and SAAP (arXiv 2412.15127). With a token-mean loss the Fisher term is about T
(tokens per sequence) times too small, so c = T is the default; the literature prints c = 1.

Gradients are consumed in post-accumulate hooks and freed at once: peak memory is weights + one layer + activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from saap.architectures import Architecture, architecture_of
from saap.errors import SaapError
from saap.structures import ModelShape

Progress = Callable[[str, float, float], None]
TYPES = ("ffn", "head", "group")


@dataclass(frozen=True)
class Scores:
    """Per structure type (ffn, head, group) one tensor per layer.

    ``products[type][layer]`` is t_j(G), [sequences, structures]; ``element[type][layer]`` is I_e(G), [structures].
    A group's numbers include its query heads.
    """

    products: dict[str, list[torch.Tensor]]
    element: dict[str, list[torch.Tensor]]
    c: float
    loss: float

    def vector(self, kind: str) -> list[torch.Tensor]:
        """I_v(G) per layer, [structures]."""
        return [(t.mean(0) - self.c / 2 * t.square().mean(0)).abs() for t in self.products[kind]]


def estimate(
    model: PreTrainedModel,
    shape: ModelShape,
    ids: torch.Tensor,
    *,
    c: float | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Score every structure of ``model`` on calibration sequences.

    Args:
        ids: [sequences, tokens] int64.
        c: weight of the second-order term; None is the number of tokens per sequence.

    Raises:
        SaapError: the loss is not finite on a sequence.
    """
    architecture = architecture_of(model.config)
    c = float(ids.shape[1]) if c is None else c
    slices = _SliceSums(shape, c)
    losses = []
    with _gradient_hooks(model, architecture, slices):
        for index, row in enumerate(ids):
            if progress:
                progress("scoring", index, len(ids))
            slices.start_sequence()
            loss = model(input_ids=row[None], labels=row[None], use_cache=False).loss
            if not torch.isfinite(loss):
                raise SaapError(
                    f"the loss is {loss.item()} on calibration sequence {index}: check the model and the text"
                )
            loss.backward()
            losses.append(loss.item())
    if progress:
        progress("scoring", len(ids), len(ids))
    return slices.scores(sum(losses) / len(losses))


class _SliceSums:
    """Collects, per matrix, the sums over each structure's slice of this matrix."""

    def __init__(self, shape: ModelShape, c: float) -> None:
        self.shape, self.c = shape, c
        self.vector: dict[tuple[int, str], list[torch.Tensor]] = {}
        self.element: dict[tuple[int, str], torch.Tensor] = {}
        self.sequences = 0

    def start_sequence(self) -> None:
        self.sequences += 1

    def consume(self, layer: int, matrix: str, weight: nn.Parameter) -> None:
        """Reduce this sequence's gradient of one matrix to one number per structure and free it."""
        assert weight.grad is not None
        product = weight.grad.mul_(weight.detach())
        weight.grad = None
        by_column = matrix in ("output", "down")
        axis = 0 if by_column else 1
        sums = product.sum(axis)
        # Few passes over memory: they cost as much as the backward pass itself.
        fine = torch.linalg.vector_norm(torch.addcmul(product, product, product, value=-self.c / 2), 1, dim=axis)
        width = 1 if matrix in ("gate", "up", "down") else self.shape.head_dim
        key = (layer, matrix)
        self.vector.setdefault(key, []).append(sums.view(-1, width).sum(1))
        self.element[key] = self.element.get(key, 0) + fine.view(-1, width).sum(1)

    def scores(self, loss: float) -> Scores:
        vector = {key: torch.stack(rows) for key, rows in self.vector.items()}
        element = {key: (total / self.sequences)[None] for key, total in self.element.items()}
        return Scores(
            products={kind: self._per_structure(vector, kind) for kind in TYPES},
            element={kind: [t[0] for t in self._per_structure(element, kind)] for kind in TYPES},
            c=self.c,
            loss=loss,
        )

    def _per_structure(self, sums: dict[tuple[int, str], torch.Tensor], kind: str) -> list[torch.Tensor]:
        rows = next(iter(sums.values())).shape[0]
        result = []
        for index, layer in enumerate(self.shape.layers):
            if kind == "ffn":
                parts = [sums[index, m] for m in ("gate", "up", "down")] if layer.ffn else [torch.zeros(rows, 0)]
                result.append(torch.stack(parts).sum(0))
                continue
            if not layer.query_heads:
                result.append(torch.zeros(rows, 0))
                continue
            heads = sums[index, "query"] + sums[index, "output"]
            if kind == "group":
                own = sums[index, "key"] + sums[index, "value"]
                heads = heads.view(rows, layer.kv_heads, layer.heads_per_group).sum(2) + own
            result.append(heads)
        return result


@contextmanager
def _gradient_hooks(model: PreTrainedModel, architecture: Architecture, slices: _SliceSums) -> Iterator[None]:
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    handles = []
    for parameter in wanted:
        parameter.requires_grad_(False)
    layers: Any = model.get_submodule(architecture.layers)
    for index, layer in enumerate(layers):
        modules = dict(layer.named_modules())
        for matrix in ("query", "key", "value", "output", "gate", "up", "down"):
            linear = modules.get(getattr(architecture, matrix))
            if linear is not None:
                linear.weight.requires_grad_(True)
                hook = partial(slices.consume, index, matrix)
                handles.append(linear.weight.register_post_accumulate_grad_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, before in wanted.items():
            parameter.requires_grad_(before)
            parameter.grad = None
