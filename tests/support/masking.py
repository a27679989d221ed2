"""Measure what a removal costs before anything is cut: silence structures in the dense model, forward only.

A structure is silent when what it puts into the matrix that writes to the residual stream is zero; the loss of the
masked model is the loss of the slim model.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from saap.models.architectures import architecture_of, shape_of
from saap.models.layer_walk import layers_of, removed_hooks
from saap.models.shape import KINDS
from saap.prune.cut.surgery import kept_columns
from saap.prune.plan import LayerPlan

Plans = dict[int, LayerPlan]  # of some layers


@contextmanager
def masked(model: PreTrainedModel, plans: Plans) -> Iterator[None]:
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


def divergence_from(model: PreTrainedModel, ids: torch.Tensor, every: int = 1) -> Callable[[Plans], float]:
    """KL of a masked model from the model as it is, nats per token of ids; one of ``every`` tokens counts."""

    @torch.inference_mode()
    def logprobs() -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
        return logits.flatten(0, 1)[::every].log_softmax(-1)

    whole = logprobs()

    def divergence(plans: Plans) -> float:
        with masked(model, plans):
            return float(F.kl_div(logprobs(), whole, log_target=True, reduction="batchmean"))

    return divergence


@torch.inference_mode()
def mean_nll(model: PreTrainedModel, ids: torch.Tensor, batch: int = 4) -> float:
    """Mean negative log-likelihood in nats per predicted token, ids [sequences, tokens]."""

    losses = []
    for rows in ids.split(batch):
        rows = rows.to(model.device)
        losses.append(float(model(input_ids=rows, labels=rows, use_cache=False).loss) * len(rows))
    return sum(losses) / len(ids)
