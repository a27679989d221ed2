"""Gradients at what each block adds to the residual stream, of labels that the model itself draws.

With them a change d of a block's output is worth 1/2 E[(g.d)^2] nats of KL divergence for each token, to second order:
E[g g^T] over labels drawn from the model is its Fisher information (Martens, New insights and perspectives on the
natural gradient method, JMLR 21(146), 2020, section 8). Text's own labels would mix in how wrong the model is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from saap.base.errors import UserError
from saap.base.progress import Progress, advance
from saap.models.architectures import architecture_of
from saap.models.layer_walk import HEAD_ROWS, layers_of, logits_after, removed_hooks
from saap.models.shape import KINDS, BlockKind, ModelShape
from saap.models.streaming import is_streamed
from saap.prune.forms import Place
from saap.prune.scores.importance import frozen
from saap.prune.scores.layerwise import down_again

SAYING = "pricing (gradients)"
NOT_FINITE = "a price is not finite on the calibration text: check the model and the text"


def adding_module(model: PreTrainedModel, index: int, kind: BlockKind) -> nn.Module:
    """Return the module whose output a block adds to the stream: the norm behind it, else the matrix that writes."""
    architecture = architecture_of(model.config)
    norm = architecture.ffn_post_norm if kind is KINDS["ffn"] else architecture.attention_post_norm
    return layers_of(model)[index].get_submodule(norm or architecture.writing(kind))


def block_gradients(
    model: PreTrainedModel, shape: ModelShape, ids: torch.Tensor, seed: int = 0, progress: Progress | None = None
) -> dict[Place, torch.Tensor]:
    """Gradients [sequences, tokens, hidden] bfloat16 of the summed loss on drawn labels, by what each block adds.

    ``ids``: [sequences, tokens]. One label is drawn for each token. UserError: the logits are not finite.
    """
    gradients: dict[Place, list[torch.Tensor]] = {}
    generator = torch.Generator().manual_seed(seed)

    def loss_of(logits: torch.Tensor) -> torch.Tensor:
        flat = logits.float().flatten(0, 1)
        if not flat.isfinite().all():
            raise UserError(NOT_FINITE)
        drawn = torch.multinomial(flat.detach().softmax(-1).cpu(), 1, generator=generator)
        return F.cross_entropy(flat, drawn.flatten().to(flat.device), reduction="sum")

    if is_streamed(model):
        watch = partial(_watched_layer, model, shape, gradients)

        def from_logits(hidden: torch.Tensor, _: int) -> torch.Tensor:
            return loss_of(logits_after(model, hidden))

        with frozen(model):
            down_again(model, ids, from_logits, watch, lambda done, of: progress and progress(SAYING, done, of))
    else:
        with frozen(model), removed_hooks() as handles:
            embedding: nn.Module = model.get_input_embeddings()
            handles.append(embedding.register_forward_hook(lambda _, args, output: output.requires_grad_(True)))
            for index in range(len(shape.layers)):
                handles += _hooks(model, shape, index, gradients)
            for done, part in enumerate(ids.split(HEAD_ROWS)):
                advance(progress, SAYING, done * HEAD_ROWS, len(ids))
                loss_of(model(input_ids=part.to(model.device), use_cache=False).logits).backward()
    advance(progress, SAYING, 1, 1)
    return {place: torch.cat(rows) for place, rows in gradients.items()}


@contextmanager
def _watched_layer(
    model: PreTrainedModel, shape: ModelShape, gradients: dict[Place, list[torch.Tensor]], index: int
) -> Iterator[None]:
    with removed_hooks() as handles:
        handles += _hooks(model, shape, index, gradients)
        yield


def _hooks(
    model: PreTrainedModel, shape: ModelShape, index: int, gradients: dict[Place, list[torch.Tensor]]
) -> Iterator[torch.utils.hooks.RemovableHandle]:
    for kind in shape.layers[index].blocks:
        rows = gradients.setdefault((index, kind.name), [])
        yield adding_module(model, index, kind).register_forward_hook(partial(_keep, rows))


def _keep(rows: list[torch.Tensor], _: nn.Module, __: object, output: torch.Tensor) -> None:
    output.register_hook(lambda gradient: rows.append(gradient.detach().bfloat16()))
