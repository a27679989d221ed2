"""The vocabulary's group scales, trained beside the layers': half of what 4 bit costs a small model is its head's.

s' = s (1 + D), one D per group as in :class:`saap.group_folds.ScaleAdapter`, with the same rounding in every forward
pass. A tied table has one D for both of its uses. Where the two are apart only the head's is trained: few rows of an
embedding occur in a text, and what rounding costs there is a seventh (LOG.md).

No PEFT layer: PEFT knows no adapter that an embedding and a head share.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from saap.architectures import architecture_of
from saap.group_folds import SMALLEST_FACTOR, narrowed
from saap.group_matmul import float16_through, group_matmul
from saap.modeling_slim import GroupQuantEmbedding, GroupQuantTable, TiedHead


class TrainedTable(nn.Module):
    """A matrix of integers with a factor per group."""

    centred: torch.Tensor

    def __init__(self, base: GroupQuantTable) -> None:
        super().__init__()
        self.base = base
        self.delta = nn.Parameter(torch.zeros_like(base.scales))
        self.register_buffer("centred", narrowed(base.centred()), persistent=False)

    def scales(self) -> torch.Tensor:
        """s' [N, groups]."""
        return float16_through(self.base.scales * (1 + self.delta).clamp_min(SMALLEST_FACTOR))


class TrainedEmbedding(TrainedTable):
    """Stands for a tied embedding."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[...] int -> [..., columns] float32."""
        numbers = self.centred[ids].to(self.base.scales.dtype) * self.scales()[ids].unsqueeze(-1)
        return numbers.flatten(-2) * getattr(self.base, "factor", 1.0)


class TrainedHead(nn.Module):
    """Stands for a head; a tied one owns nothing."""

    def __init__(self, table: TrainedTable, tied: bool, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self._table = [table]  # in a list, so that a tied table is not registered a second time
        self.own, self.bias = None if tied else table, bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., hidden] -> [..., vocab]."""
        table = self._table[0]
        y = group_matmul(x, table.centred, table.scales())
        return y if self.bias is None else y + self.bias.to(y.dtype)


def attach_vocabulary(model: PreTrainedModel) -> None:
    """Put trained tables where head and, if tied, embedding of a quantised model are, in place."""
    architecture = architecture_of(model.config)
    head: nn.Module = model.get_submodule(architecture.head)
    if isinstance(head, TiedHead):
        table = TrainedEmbedding(model.get_submodule(architecture.embedding))  # type: ignore[arg-type]
        model.set_submodule(architecture.embedding, table)
        model.set_submodule(architecture.head, TrainedHead(table, tied=True))
    else:
        own = TrainedTable(head)  # type: ignore[arg-type]
        model.set_submodule(architecture.head, TrainedHead(own, tied=False, bias=head.bias))  # type: ignore[arg-type]


def vocabulary_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What is trained of the vocabulary."""
    return [module.delta for module in model.modules() if isinstance(module, TrainedTable)]


@torch.no_grad()
def fold_vocabulary(model: PreTrainedModel) -> None:
    """Write the tuned scales into the integers' holders and put those back, in place."""
    architecture = architecture_of(model.config)
    head: nn.Module = model.get_submodule(architecture.head)
    if not isinstance(head, TrainedHead):
        return
    table = head._table[0]
    base = table.base
    base.scales = table.scales()
    if isinstance(base, GroupQuantEmbedding):
        model.set_submodule(architecture.embedding, base)
        model.set_submodule(architecture.head, TiedHead(base))
    else:
        model.set_submodule(architecture.head, base)
