"""Scores of the baselines: one number for each FFN channel and each KV group with its query heads.

A structure's slices are its rows of query, key, value, gate and up and its columns of output and down. A group counts
each row and column of its heads on its own, as the references do for a head.

* LLM-Pruner (arXiv 2305.11627, section 3.2), g the gradient of the mean loss, g_j that of sequence j:
  vector: sum over rows and columns of | sum w g | (``vectorize``);
  param_mix: sum | w g - 1/2 w^2 mean_j g_j^2 |.
* wanda_sp: columns of output and down only, mean over rows of |W| ||X|| (arXiv 2306.11695; structured in FLAP).
* flap: the same columns, WIFV = fluctuation * sum over rows of W^2 (arXiv 2312.11983), standardised.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from saap.base.errors import UserError
from saap.base.progress import Progress
from saap.models.layer_walk import layers_of, removed_hooks
from saap.models.matrices import Matrix, matrices_of
from saap.models.shape import ModelShape
from saap.models.streaming import present
from saap.prune.scores.activations import Activations, InputStatistics
from saap.prune.scores.importance import backward, frozen, summed_axis

Slices = dict[tuple[int, str], torch.Tensor]  # (layer, role) -> one number per row, or per column of output and down


@dataclass(frozen=True)
class StructureScores:
    """Higher is more important; per layer ``ffn`` [channels] and ``group`` [kv_heads], empty where there is none."""

    ffn: list[torch.Tensor]
    group: list[torch.Tensor]


def taylor_scores(
    method: str, model: PreTrainedModel, shape: ModelShape, ids: torch.Tensor, progress: Progress | None = None
) -> StructureScores:
    """LLM-Pruner's scores on ids [sequences, tokens]; gradients are held in full where needed, and must be finite."""
    first, second = _mean_gradients(model, shape, ids, method, progress)
    slices = {}
    for matrix in matrices_of(model, shape):
        rows, axis = matrix.rows, summed_axis(matrix.role)
        weight = matrix.linear.weight.detach()[rows].float()
        values = first[matrix.linear][rows] * weight
        if method == "param_mix":
            values.sub_(second[matrix.linear][rows] * weight.square(), alpha=0.5)
        slices[matrix.layer, matrix.role] = values.sum(axis).abs() if method == "vector" else values.abs().sum(axis)
    return _summed(slices, shape)


@torch.no_grad()
def wanda_scores(model: PreTrainedModel, shape: ModelShape, activations: Activations) -> StructureScores:
    slices = {}
    for matrix, statistics in _read_columns(model, shape, activations):
        weight = matrix.linear.weight.float()
        slices[matrix.layer, matrix.role] = weight.abs().mean(0) * statistics.mean_square.to(weight.device).sqrt()
    return _summed(slices, shape)


@torch.no_grad()
def flap_scores(model: PreTrainedModel, shape: ModelShape, activations: Activations) -> StructureScores:
    """FLAP's AL-AM metric: WIFV, squared for attention, in standard deviations of its layer; a group's is its mean."""
    slices = {}
    for matrix, statistics in _read_columns(model, shape, activations):
        weight = matrix.linear.weight.float()
        metric = statistics.fluctuation.to(weight.device).double() * weight.double().square().sum(0)
        if matrix.role == "output":
            metric = metric.square()
        spread = metric.std() if len(metric) > 1 else metric.new_zeros(())
        # Where all columns are alike there is nothing to prefer: all are average.
        standard = (metric - metric.mean()) / spread if spread > 0 else torch.zeros_like(metric)
        slices[matrix.layer, matrix.role] = standard
    scores = _summed(slices, shape)
    columns = [sizes.heads_per_group * shape.head_dim for sizes in shape.layers]
    return StructureScores(scores.ffn, [group / max(n, 1) for group, n in zip(scores.group, columns, strict=True)])


def _read_columns(
    model: PreTrainedModel, shape: ModelShape, activations: Activations
) -> Iterator[tuple[Matrix, InputStatistics]]:
    for matrix in matrices_of(model, shape):
        if matrix.role in ("output", "down"):
            with present(layers_of(model)[matrix.layer]):
                yield matrix, activations.inputs[matrix.layer, matrix.role]


def _summed(slices: Slices, shape: ModelShape) -> StructureScores:
    ffn, group = [], []
    for layer, sizes in enumerate(shape.layers):
        channels = [slices[layer, role] for role in ("gate", "up", "down") if (layer, role) in slices]
        ffn.append(torch.stack(channels).sum(0).cpu() if channels else torch.zeros(0))
        spans = [slices[layer, r] for r in ("query", "key", "value", "output") if (layer, r) in slices]
        parts = [span.view(sizes.kv_heads, -1).sum(1) for span in spans]
        group.append(torch.stack(parts).sum(0).cpu() if parts else torch.zeros(0))
    return StructureScores(ffn, group)


Gradients = dict[nn.Linear, torch.Tensor]


def _mean_gradients(
    model: PreTrainedModel, shape: ModelShape, ids: torch.Tensor, method: str, progress: Progress | None
) -> tuple[Gradients, Gradients]:
    """mean_j g_j and mean_j g_j^2 of every prunable linear, [rows, columns] float32; empty where not needed."""
    linears = dict.fromkeys(matrix.linear for matrix in matrices_of(model, shape))
    first, second = (
        {linear: torch.zeros_like(linear.weight, dtype=torch.float32) for linear in linears if needed}
        for needed in (True, method == "param_mix")
    )

    def consume(linear: nn.Linear, weight: nn.Parameter) -> None:
        assert weight.grad is not None
        gradient = weight.grad.float()
        first[linear].add_(gradient, alpha=1 / len(ids))
        if linear in second:
            second[linear].addcmul_(gradient, gradient, value=1 / len(ids))
        weight.grad = None

    with frozen(model), removed_hooks() as handles, torch.enable_grad():
        for linear in linears:
            linear.weight.requires_grad_(True)
            handles.append(linear.weight.register_post_accumulate_grad_hook(partial(consume, linear)))
        backward(model, ids, progress)
    for gradients in (first, second):
        if not all(torch.isfinite(gradient).all() for gradient in gradients.values()):
            raise UserError("gradients are not finite on the calibration text: check the model, or load it in float32")
    return first, second
