"""What rounding a model's weights in groups of some size costs: the price of a faster bundle, beside that of pruning.

On some CPUs larger groups are read faster. The whole model is rounded layer by layer, each weight to its nearest
integer. Tuning gives much of it back; as of what goes whole, a share of it is not counted (studies/search).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from devices.common.progress import Progress
from saap.models.architectures import architecture_of
from saap.models.layer_walk import layer_inputs, layers_of, logits_after, run_layer
from saap.models.slim_quant import MatrixForm
from saap.models.streaming import present
from saap.quantize.choose_forms import rounded

ROWS = 4  # sequences


@torch.inference_mode()
def rounding_prices(
    model: PreTrainedModel, ids: torch.Tensor, bits: int, group_sizes: Sequence[int], progress: Progress | None = None
) -> dict[int, float]:
    """KL from the model as it is to the one of integers, nats per token, by group size.

    ``ids`` [sequences, tokens] are of text that is judged; the first four are used.
    """
    whole, found = _predicted(model, ids[:ROWS], None), {}
    for number, group_size in enumerate(group_sizes):
        if progress:
            progress("pricing groups (sizes)", number, len(group_sizes))
        own = _predicted(model, ids[:ROWS], MatrixForm(bits, group_size))
        total = sum(F.kl_div(o, w, log_target=True, reduction="sum").item() for o, w in zip(own, whole, strict=True))
        found[group_size] = max(0.0, total / ids[:ROWS].numel())
    if progress:
        progress("pricing groups (sizes)", len(group_sizes), len(group_sizes))
    return found


def _predicted(model: PreTrainedModel, ids: torch.Tensor, form: MatrixForm | None) -> list[torch.Tensor]:
    """Log-probabilities of each sequence, with all matrices rounded to a form; None rounds nothing."""
    architecture = architecture_of(model.config)
    vocabulary = [model.get_submodule(name) for name in (architecture.embedding, architecture.head)]
    with _rounded(vocabulary, form):
        batches = layer_inputs(model, ids, batch=1)
        hidden = [batch.hidden for batch in batches]
        for index, layer in enumerate(layers_of(model)):
            with present(layer):
                there = dict(layer.named_modules())
                names = (name for part in architecture.matrices.values() for name in part)
                with _rounded([there[name] for name in names if hasattr(there.get(name), "weight")], form):
                    hidden = [run_layer(layer, x, batch.given[index]) for x, batch in zip(hidden, batches, strict=True)]
        return [logits_after(model, x).log_softmax(-1) for x in hidden]


def _rounded(modules: Sequence[nn.Module], form: MatrixForm | None) -> AbstractContextManager[None]:
    """Round the weights of modules, a shared one once."""
    found = {id(module.weight): module.weight for module in modules}.values()
    return nullcontext() if form is None else rounded([w for w in found if isinstance(w, torch.Tensor)], form)
