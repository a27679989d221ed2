"""What a model loses when it is cut to a plan and compensated, without writing it."""

import torch
from support.masking import masked, mean_nll
from torch import nn

from saap.models.architectures import architecture_of, shape_of
from saap.models.shape import KINDS
from saap.prune.cut.refit import compensate
from saap.prune.cut.surgery import kept_columns


@torch.no_grad()
def losses_compensated(kind, model, plan, ids, judged):
    """Nats per token of each judged sequence, [sequences]; the model is left as it was."""
    architecture, shape = architecture_of(model.config), shape_of(model.config)
    writing = {architecture.writing(block): block for block in KINDS.values()}
    before = []
    for name, tensor in dict(compensate(kind, model, plan, ids)).items():
        place, _, role = name.removeprefix(f"{architecture.layers}.").rpartition(".")
        number, _, matrix = place.partition(".")
        index = plan.kept_layers[int(number)]
        linear = model.get_submodule(f"{architecture.layers}.{index}.{matrix}")
        before.append((linear, linear.weight.clone(), linear.bias))
        if role == "bias":
            linear.register_parameter("bias", nn.Parameter(tensor))
        else:
            linear.weight[:, kept_columns(writing[matrix], plan.layers[index], shape)] = tensor
    with masked(model, plan.cut_layers(shape)):
        losses = torch.tensor([mean_nll(model, row[None]) for row in judged], dtype=torch.float64)
    for linear, weight, bias in before:
        linear.weight.copy_(weight)
        linear.bias = bias
    return losses
