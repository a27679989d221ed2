"""Compensation: let what stays make up for what goes, without training.

* ``bias``: the mean of what the removed structures added, as a bias on o_proj and down_proj; FLAP, arXiv 2312.11983,
  eq. 6: b = W_gone mean(x_gone).
* ``refit``: least squares on o_proj and down_proj. The layers are walked in order with two streams of hidden states,
  the dense model's and the slim one's. With x the slim model's inputs of a matrix and y what the matrix should add,

      W' = W + R x^T (x x^T + lambda I)^-1,   R = y - W x,   y = dense hidden state after the block - slim one before it

  so that a block also repairs what the blocks before it broke. lambda is a share of the mean of diag(x x^T) and draws
  towards the weights that were there. It adds no parameter.

Blocks whose output passes a norm of its own (Gemma 3) are fitted to what their matrix adds in the dense model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from saap.architectures import Architecture, architecture_of
from saap.importance import Progress
from saap.layer_walk import inputs_of, layer_inputs, layers_of, run_layer
from saap.structures import LayerPlan, ModelShape, PrunePlan
from saap.surgery import head_rows

Compensation = Literal["none", "bias", "refit"]
COMPENSATIONS = ("none", "bias", "refit")
DAMPING = 0.03  # lambda, of the mean of diag(x x^T)


@dataclass
class _Block:
    """One attention or feed-forward block: the matrix that writes to the residual stream, and what of it is kept."""

    matrix: str  # its name within the layer
    linear: nn.Linear
    kept: torch.Tensor  # columns
    after: str | None  # the norm that reads the stream after this block; None: the layer's output is that
    post_norm: bool


@torch.no_grad()
def compensate(
    kind: Compensation,
    model: PreTrainedModel,
    shape: ModelShape,
    plan: PrunePlan,
    ids: torch.Tensor,
    *,
    damping: float = DAMPING,
    progress: Progress | None = None,
) -> dict[str, torch.Tensor]:
    """New weights and biases of o_proj and down_proj for a plan; the model is left as it was.

    Args:
        model: the dense model that the plan is about.
        ids: calibration ids [sequences, tokens].

    Returns:
        name in the slim model -> tensor in its cut size: weights [hidden, kept] for ``refit``, biases [hidden] for
        ``bias``; empty for ``none``.
    """
    if kind == "none":
        return {}
    architecture = architecture_of(model.config)
    batches = layer_inputs(model, ids)
    dense = [batch.hidden for batch in batches]
    slim = list(dense)
    found: dict[str, torch.Tensor] = {}
    number = 0
    for index, layer in enumerate(layers_of(model)):
        keep = plan.layers[index]
        blocks = _blocks(layer, keep, shape.head_dim, architecture)
        given = [batch.given[index] for batch in batches]
        with _restored(blocks):
            if kind == "bias":
                new, dense = _biases(layer, blocks, dense, given)
            else:
                new, dense, slim = _refitted(layer, blocks, dense, slim, given, damping)
        if keep.query_heads or keep.ffn:
            found |= {f"{architecture.layers}.{number}.{name}": tensor for name, tensor in new.items()}
            number += 1
        if progress:
            progress("compensating", index + 1, len(plan.layers))
    return found


def _blocks(layer: Any, keep: LayerPlan, head_dim: int, architecture: Architecture) -> list[_Block]:
    modules = dict(layer.named_modules())
    sizes = (
        (architecture.output, head_rows(keep.query_heads, head_dim), architecture.attention_post_norm),
        (architecture.down, torch.tensor(keep.ffn, dtype=torch.long), architecture.ffn_post_norm),
    )
    found = [_Block(name, modules[name], kept, None, bool(post)) for name, kept, post in sizes if name in modules]
    if len(found) == 2:
        found[0].after = architecture.ffn_norm
    return found


@contextmanager
def _restored(blocks: list[_Block]) -> Iterator[None]:
    saved = [(block.linear, block.linear.weight.detach().clone(), block.linear.bias) for block in blocks]
    try:
        yield
    finally:
        for linear, weight, bias in saved:
            linear.weight.data.copy_(weight)
            linear.bias = bias


def _gone(block: _Block) -> torch.Tensor:
    gone = torch.ones(block.linear.in_features, dtype=torch.bool)
    gone[block.kept] = False
    return gone


def _biases(
    layer: nn.Module, blocks: list[_Block], dense: list[torch.Tensor], given: list[dict[str, Any]]
) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """The mean of what goes, per block that keeps something; and the dense stream after the layer."""
    totals = {block.matrix: torch.zeros(block.linear.in_features, dtype=torch.float64) for block in blocks}
    after, tokens = [], 0
    for hidden, arguments in zip(dense, given, strict=True):
        with inputs_of({block.matrix: block.linear for block in blocks}) as seen:
            after.append(run_layer(layer, hidden, arguments))
        for name, inputs in seen.items():
            totals[name] += inputs.flatten(0, -2).double().sum(0)
        tokens += hidden.shape[0] * hidden.shape[1]
    new = {}
    for block in blocks:
        if len(block.kept):
            gone = _gone(block)
            bias = block.linear.weight[:, gone] @ (totals[block.matrix][gone] / tokens).to(block.linear.weight.dtype)
            new[f"{block.matrix}.bias"] = bias + (block.linear.bias if block.linear.bias is not None else 0)
    return new, after


def _refitted(
    layer: nn.Module,
    blocks: list[_Block],
    dense: list[torch.Tensor],
    slim: list[torch.Tensor],
    given: list[dict[str, Any]],
    damping: float,
) -> tuple[dict[str, torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Refitted weights of a layer, and both streams after it."""
    modules = dict(layer.named_modules())
    watched = {block.matrix: block.linear for block in blocks}
    watched |= {block.after: modules[block.after] for block in blocks if block.after}
    aims: dict[str, list[torch.Tensor]] = {block.matrix: [] for block in blocks}
    after = []
    for hidden, arguments in zip(dense, given, strict=True):
        with inputs_of(watched) as seen:
            after.append(run_layer(layer, hidden, arguments))
        for block in blocks:
            stream = seen[block.after] if block.after else after[-1]
            aims[block.matrix].append(block.linear(seen[block.matrix]) if block.post_norm else stream)
    new = {}
    for position, block in enumerate(blocks):
        block.linear.weight[:, _gone(block)] = 0
        if not len(block.kept):
            if block.linear.bias is not None:
                block.linear.bias = None
            continue
        # The stream before the second block is what the first block's watched norm reads.
        before = blocks[position - 1].after if position else None
        block.linear.weight[:, block.kept] = _least_squares(
            layer, block, before, slim, given, aims[block.matrix], modules, damping
        )
        new[f"{block.matrix}.weight"] = block.linear.weight[:, block.kept].clone()
    return new, after, [run_layer(layer, hidden, arguments) for hidden, arguments in zip(slim, given, strict=True)]


def _least_squares(
    layer: nn.Module,
    block: _Block,
    before: str | None,
    slim: list[torch.Tensor],
    given: list[dict[str, Any]],
    aims: list[torch.Tensor],
    modules: dict[str, nn.Module],
    damping: float,
) -> torch.Tensor:
    """The kept columns of the block's matrix, [hidden, kept], fitted to its aims on the slim stream."""
    watched = {block.matrix: block.linear} | ({before: modules[before]} if before else {})
    kept = block.linear.weight[:, block.kept]
    squares = torch.zeros(len(block.kept), len(block.kept), dtype=torch.float64)
    crossed = torch.zeros(kept.shape[0], len(block.kept), dtype=torch.float64)
    for hidden, arguments, aim in zip(slim, given, aims, strict=True):
        with inputs_of(watched) as seen:
            run_layer(layer, hidden, arguments)
        inputs = seen[block.matrix]
        stream = seen[before] if before else hidden
        rest = aim - block.linear(inputs) - (0 if block.post_norm else stream)
        x, rest = inputs.flatten(0, -2)[:, block.kept], rest.flatten(0, -2)
        squares += (x.t() @ x).double()
        crossed += (rest.t() @ x).double()
    squares.diagonal().add_(damping * squares.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny))
    return kept + torch.linalg.solve(squares, crossed.t()).t().to(kept.dtype)
