"""Compensation: let the remaining weights take over from what goes, without training.

* ``bias``: the mean of what the removed structures added, as a bias on o_proj and down_proj; FLAP, arXiv 2312.11983,
  eq. 6: b = W_gone mean(x_gone).
* ``refit``: ridge regression of what a matrix added on the inputs that stay,

      W' = W_kept + W_gone X_gone X_kept^T (X_kept X_kept^T + lambda D)^-1,   D = diag(X_kept X_kept^T)

  The layers are walked in order and X is what reaches the matrix in the model that is already cut and refitted: fitting
  the dense model's outputs instead shrinks whatever an earlier cut made noisy (regression dilution). A token counts by
  one over the mean square of its hidden state, since the next norm divides by that; of what the block adds, in a family
  whose only norm is behind the block. lambda is chosen per matrix on
  sequences that the fit does not see, among values that include leaving the weights alone; the weights then come from
  all sequences. It adds no parameter.

  Where whole blocks go, the matrix before the gap learns what they added too: its target is what the blocks of the gap,
  run one after the other, would have made of the stream there. ReplaceMe (arXiv 2505.02819) merges a linear map of the
  layers' outputs instead; here the inputs of the matrix are regressed, which can say more. It is not done in a family
  with a norm behind its blocks, which divides by the sum that is fitted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from saap.base.progress import Progress, advance
from saap.models.architectures import Architecture, architecture_of, shape_of, traits_of
from saap.models.layer_walk import ROWS, batches_of, inputs_of, layers_of, run_layer, run_until
from saap.models.shape import ATTENTION, KINDS, ModelShape
from saap.models.streaming import is_streamed, present
from saap.prune.cut.ridge import regression, token_weights
from saap.prune.cut.surgery import kept_columns
from saap.prune.options import Compensation
from saap.prune.plan import LayerPlan, PrunePlan

LAMBDAS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
LAMBDA_SHARE = 6  # one sixth of the batches chooses lambda

Arguments = Sequence[Mapping[str, object]]  # a layer's other arguments, batch by batch


@dataclass(eq=False)
class _Block:
    """One block: the matrix that writes to the residual stream, and what of it is kept."""

    matrix: str  # its name within the layer
    linear: nn.Linear
    norm: nn.Module | None  # reads the stream before the block
    kept: torch.Tensor  # columns
    attends: bool

    @property
    def gone(self) -> torch.Tensor:
        """The other columns, as a mask."""
        gone = torch.ones(self.linear.in_features, dtype=torch.bool)
        gone[self.kept] = False
        return gone

    def cut(self, new: Mapping[str, torch.Tensor]) -> None:
        """Take the other columns away in place, and put in what is new."""
        if (weight := new.get(f"{self.matrix}.weight")) is not None:
            self.linear.weight[:, self.kept] = weight
        self.linear.weight[:, self.gone] = 0
        if (bias := new.get(f"{self.matrix}.bias")) is not None:
            self.linear.register_parameter("bias", nn.Parameter(bias, requires_grad=False))
        if not len(self.kept):  # the whole block goes
            self.linear.register_parameter("bias", None)


@torch.no_grad()
def compensate(
    kind: Compensation,
    model: PreTrainedModel,
    plan: PrunePlan,
    ids: torch.Tensor,
    *,
    progress: Progress | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield new weights and biases of o_proj and down_proj for a plan; the model is left as it was.

    Args:
        model: the dense model that the plan is about.
        ids: calibration ids [sequences, tokens].

    Yields:
        name in the slim model and tensor in its cut size: weights [hidden, kept] for ``refit``, biases [hidden] for
        ``bias``; nothing for ``none``.
    """
    if kind == "none":
        return
    architecture, shape = architecture_of(model.config), shape_of(model.config)
    walk = _Walk(kind, model, plan, ids)
    # FLAP gives every layer biases; a refit has nothing to do behind the last layer that loses something.
    count = len(plan.layers) if kind == "bias" else 1 + max(plan.cut_layers(shape), default=-1)
    number = 0
    for index, (layer, keep) in enumerate(zip(layers_of(model)[:count], plan.layers[:count], strict=True)):
        with present(layer), _restored(blocks := _blocks(layer, keep, shape, architecture)):
            new = walk.enter(index, layer, blocks)
        if keep.blocks:
            for name, tensor in new.items():
                yield f"{architecture.layers}.{number}.{name}", tensor.cpu()
            number += 1
        advance(progress, "compensating (layers)", index + 1, count)


class _Walk:
    """The calibration sequences on their way through a decoder that is compensated layer by layer."""

    def __init__(self, kind: Compensation, model: PreTrainedModel, plan: PrunePlan, ids: torch.Tensor) -> None:
        self._kind, self._keeps = kind, not is_streamed(model)
        self._model, self._plan = model, plan
        fitted, choosing = _parts(ids)
        self._batches = batches_of(model, fitted) + batches_of(model, choosing)
        self._stream = [batch.hidden for batch in self._batches]
        self._sizes = [part.numel() for part in fitted], [part.numel() for part in choosing]

    def enter(self, index: int, layer: nn.Module, blocks: list[_Block]) -> dict[str, torch.Tensor]:
        """Return a layer's new weights and biases; its weights are changed on the way."""
        if self._kind == "refit" and not self._plan.layers[index].blocks:  # the slim model has no such layer
            return {}
        arguments_of_batches = [batch.arguments[index] for batch in self._batches]
        if self._kind == "bias":  # means of the dense model, as in FLAP: the stream stays dense
            new, self._stream = _biases(layer, blocks, self._stream, arguments_of_batches, sum(map(sum, self._sizes)))
        else:
            runs = _Runs(layer, blocks, self._stream, arguments_of_batches, self._keeps)
            new = _refitted(runs, self._sizes, lambda block: self._gap(index, runs, block))
            self._stream = runs.outputs()
        return new

    def _gap(self, index: int, runs: _Runs, block: _Block) -> list[torch.Tensor] | None:
        """Compute what the removed blocks right behind this one would add, in units of its matrix's output.

        Batch by batch; None where nothing goes. The blocks before are cut already, this one and those behind are whole.
        """
        architecture, shape = architecture_of(self._model.config), shape_of(self._model.config)
        behind = runs.blocks[runs.blocks.index(block) + 1 :]
        normed = architecture.attention_post_norm or architecture.ffn_post_norm
        if normed or any(len(other.kept) for other in behind) or not (behind or self._begins_gone(index + 1, shape)):
            return None
        runs.settle(block)
        with _silenced(behind):
            before = runs.outputs()
        stream = runs.outputs(whole=behind) if behind else before
        for further, keep in enumerate(self._plan.layers[index + 1 :], index + 1):
            layer = layers_of(self._model)[further]
            with present(layer):
                blocks = _blocks(layer, keep, shape, architecture)
                stays = next((place for place, other in enumerate(blocks) if len(other.kept)), len(blocks))
                if stays:
                    with _silenced(blocks[stays:]):
                        stream = self._after(further, layer, stream)
            if stays < len(blocks):
                break
        scale = traits_of(self._model.config).residual_scale or 1.0
        return [(after - x) / scale for after, x in zip(stream, before, strict=True)]

    def _begins_gone(self, index: int, shape: ModelShape) -> bool:
        """Whether there is such a layer, and its first block goes."""
        kinds = shape.layers[index].blocks if index < len(shape.layers) else []
        return bool(kinds) and kinds[0] not in self._plan.layers[index].blocks

    def _after(self, index: int, layer: nn.Module, stream: list[torch.Tensor]) -> list[torch.Tensor]:
        pairs = zip(stream, self._batches, strict=True)
        return [run_layer(layer, hidden, batch.arguments[index]) for hidden, batch in pairs]


def _parts(ids: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Batches that are fitted, and those that choose lambda."""
    size = max(1, min(ROWS, len(ids) // 2))
    batches = -(-len(ids) // size)
    fitted = (batches - max(1, batches // LAMBDA_SHARE)) * size
    return list(ids[:fitted].split(size)) if fitted else [], list(ids[fitted:].split(size))


def _blocks(layer: nn.Module, keep: LayerPlan, shape: ModelShape, architecture: Architecture) -> list[_Block]:
    modules = {name: module for name, module in layer.named_modules() if name}  # the layer itself has none
    named = [(kind, architecture.writing(kind), architecture.norm_before(kind)) for kind in KINDS.values()]
    return [
        _Block(name, modules[name], modules.get(norm), kept_columns(kind, keep, shape), kind is ATTENTION)
        for kind, name, norm in named
        if name in modules
    ]


@contextmanager
def _restored(blocks: list[_Block]) -> Iterator[None]:
    saved = [(block.linear, block.linear.weight.detach().clone(), block.linear.bias) for block in blocks]
    try:
        yield
    finally:
        for linear, weight, bias in saved:
            linear.weight.data.copy_(weight)
            linear.bias = bias


@contextmanager
def _silenced(blocks: list[_Block]) -> Iterator[None]:
    """Let these blocks add nothing inside the context."""
    with _restored(blocks):
        for block in blocks:
            block.linear.weight.zero_()
            block.linear.register_parameter("bias", None)
        yield


def _biases(
    layer: nn.Module, blocks: list[_Block], stream: list[torch.Tensor], arguments_of_batches: Arguments, tokens: int
) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """Return the mean of the removed output, per block that keeps something, and the stream after the layer."""
    totals = {
        block.matrix: block.linear.weight.new_zeros(block.linear.in_features, dtype=torch.float64) for block in blocks
    }
    after = []
    for hidden, arguments in zip(stream, arguments_of_batches, strict=True):
        with inputs_of({block.matrix: block.linear for block in blocks}) as entering:
            after.append(run_layer(layer, hidden, arguments))
        for name, inputs in entering.items():
            totals[name] += inputs.flatten(0, -2).double().sum(0)
    new = {}
    for block in blocks:
        if len(block.kept):
            weight, gone = block.linear.weight, block.gone
            bias = weight[:, gone] @ (totals[block.matrix][gone] / tokens).to(weight.dtype)
            new[f"{block.matrix}.bias"] = bias + (block.linear.bias if block.linear.bias is not None else 0)
    return new, after


class _Runs:
    """A layer's runs over the calibration batches: each goes on from the blocks that the runs before have settled.

    What enters a block's matrix does not change when the matrix does, so that the block runs once; where layers are
    read one at a time, memory is short and it runs each time. A block that goes does not run.
    """

    def __init__(
        self,
        layer: nn.Module,
        blocks: list[_Block],
        stream: list[torch.Tensor],
        arguments_of_batches: Arguments,
        keeps: bool,
    ) -> None:
        self._layer, self.blocks, self._keeps = layer, blocks, keeps
        self._batches = list(zip(stream, arguments_of_batches, strict=True))
        nothing = {block.matrix: block.linear.in_features for block in blocks if not len(block.kept)}
        self._known: list[dict[str, torch.Tensor]] = [
            {matrix: hidden.new_zeros(1).expand(*hidden.shape[:-1], size) for matrix, size in nothing.items()}
            for hidden in stream
        ]

    def until(self, block: _Block) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Yield per batch the inputs of the block's matrix, and the stream before the block if a norm reads it."""
        for (hidden, arguments), known in zip(self._batches, self._known, strict=True):
            also = {} if block.norm is None else {"stream": block.norm}
            if self._keeps:
                earlier = self.blocks[: self.blocks.index(block)]
                also |= {other.matrix: other.linear for other in earlier if other.matrix not in known}
            with self._settled(known):
                x, entering = run_until(self._layer, hidden, arguments, block.linear, also)
            stream = entering.pop("stream", None)
            if self._keeps:
                known.update(entering, **{block.matrix: x})
            yield x, stream

    def settle(self, block: _Block) -> None:
        """Run as far as the block, so that later runs go on from there; nothing where each run starts anew."""
        if self._keeps:
            deque(self.until(block), maxlen=0)

    def outputs(self, whole: Sequence[_Block] = ()) -> list[torch.Tensor]:
        """Run the layer as it is now, batch by batch; ``whole``: removed blocks that run this time."""
        leaving = []
        running = {block.matrix for block in whole}
        for (hidden, arguments), known in zip(self._batches, self._known, strict=True):
            with self._settled({matrix: x for matrix, x in known.items() if matrix not in running}):
                leaving.append(run_layer(self._layer, hidden, arguments))
        return leaving

    @contextmanager
    def _settled(self, known: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Blocks whose matrix is fed what is known run no other part."""
        modules = []
        for block in self.blocks:
            if block.matrix in known:
                module = self._layer.get_submodule(block.matrix.rpartition(".")[0])
                module.forward = partial(_last_product, block, known[block.matrix])
                modules.append(module)
        try:
            yield
        finally:
            for module in modules:
                del module.forward


def _last_product(block: _Block, x: torch.Tensor, *_: object, **__: object) -> torch.Tensor | tuple[torch.Tensor, None]:
    """Return a block's output for the inputs of its matrix; attention also returns its weights, which are None."""
    out: torch.Tensor = block.linear(x)
    return (out, None) if block.attends else out


def _refitted(
    runs: _Runs,
    sizes: tuple[list[int], list[int]],
    gap: Callable[[_Block], list[torch.Tensor] | None],
) -> dict[str, torch.Tensor]:
    """Refitted weights of the blocks that lose something, or others behind them; the layer is cut to them.

    ``gap`` gives what those behind a block would add.
    """
    new = {}
    for block in runs.blocks:
        added = gap(block) if len(block.kept) else None
        if added is None and not block.gone.any():
            continue
        if len(block.kept):
            new[f"{block.matrix}.weight"] = _ridge(runs, block, sizes, added)
        block.cut(new)
    return new


def _ridge(
    runs: _Runs, block: _Block, sizes: tuple[list[int], list[int]], added: list[torch.Tensor] | None
) -> torch.Tensor:
    """Return the kept columns of the block's matrix, [hidden, kept], with the others' output regressed on them.

    ``added``: batch by batch, what further blocks added that go.
    """
    weight, gone, size = block.linear.weight, block.gone, len(block.kept)
    if not sizes[0]:  # none to fit, where the only one chooses lambda
        return weight[:, block.kept]
    fit, choosing = (regression(sum(map(sum, sizes)), size, len(weight), weight.device) for _ in range(2))
    for place, (x, stream) in enumerate(runs.until(block)):
        normed = block.linear(x) if stream is None else stream
        counts = token_weights(normed)
        x = (x * counts).flatten(0, -2).float()
        rest = x[:, gone] @ weight[:, gone].float().t()
        if added is not None:
            rest += (added[place] * counts).flatten(0, -2).float()
        (choosing if place >= len(sizes[0]) else fit).add(x[:, block.kept], rest)
    best, least = None, choosing.rest
    for damping in LAMBDAS:
        if (error := choosing.error(fit.solved(damping))) < least:
            best, least = damping, error
    if best is None:
        return weight[:, block.kept]
    return weight[:, block.kept] + fit.plus(choosing).solved(best).to(weight.dtype)
