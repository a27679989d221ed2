"""The group adapters: PEFT LoRA layers whose base is a matrix of integers, one class per fold.

An adapter is D = B A * alpha / r with A [r, groups] and B [N, r]: one number per output row and group of input columns
(the low-rank group form of QA-LoRA, Xu et al., arXiv 2309.14717), or a free D [N, groups], which is B with A the
identity. B is 0 at the start. What D does to W = s (q - z) is the fold:

* scale: s' = s (1 + D), kept away from 0 and rounded to what float16 represents. The deployed kernel stays as it is.
* zero point: z' = z - D / s, rounded to a whole number of 0 .. 2^bits - 1, so that it is free where the literature's
  float zero points are not, but coarse.

All rounding happens in the forward pass, with the gradient going straight through: :meth:`GroupAdapterLayer.merge`
writes into the base what the last forward pass used, to the bit.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from saap.models.modeling_slim import GroupQuantLinear, unpack_zero_points
from saap.quantize.groups import pack_zero_points
from saap.tune.adapters.matmul import float16_through, group_matmul, whole_through

SMALLEST_FACTOR = 0.05  # 1 + D stays positive: a group must not change its sign


class GroupAdapterLayer(nn.Module, LoraLayer):
    """A GroupQuantLinear with one adapter; PEFT makes it, from the config that it is registered with."""

    centred: torch.Tensor

    def __init__(
        self,
        base_layer: GroupQuantLinear,
        adapter_name: str,
        *,
        r: int,
        lora_alpha: float,
        free: bool,
        **_: Any,  # PEFT's other options, which differ from version to version and are off here
    ) -> None:
        """Wrap ``base_layer``; with ``free``, A is the identity and has no parameters."""
        super().__init__()
        with warnings.catch_warnings():  # PEFT asks for sizes of kinds of layers that it knows, and warns of ours
            warnings.filterwarnings("ignore", "Unsupported layer type")
            LoraLayer.__init__(self, base_layer)
        self.name, self.free = adapter_name, free
        self._active_adapter = adapter_name
        groups, device = base_layer.columns // base_layer.block, base_layer.scales.device
        if free and r != groups:
            raise ValueError(f"a free factor per group is of rank {groups} here, not {r}")
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
        self.scaling[adapter_name] = lora_alpha / r
        self.lora_dropout[adapter_name] = nn.Identity()
        a = nn.Identity() if free else nn.Linear(groups, r, bias=False)
        if isinstance(a, nn.Linear):
            nn.init.kaiming_uniform_(a.weight, a=math.sqrt(5))
        b = nn.Linear(r, base_layer.out_features, bias=False)
        nn.init.zeros_(b.weight)
        self.lora_A[adapter_name], self.lora_B[adapter_name] = a.to(device), b.to(device)
        centred = base_layer.centred()
        narrow = bool(centred.min() >= -128) and bool(centred.max() <= 127)
        self.register_buffer("centred", centred.to(torch.int8) if narrow else centred, persistent=False)

    @property
    def base(self) -> GroupQuantLinear:
        """The matrix of integers."""
        base: Any = self.base_layer
        return base

    def update_layer(self, *_: Any, **__: Any) -> None:
        """PEFT's way to put a second adapter on a layer, which has no meaning for integers."""
        raise ValueError("a matrix of integers takes one adapter: fold or detach the one that it has")

    def factor(self) -> torch.Tensor:
        """D [N, groups], float32 under autocast too."""
        b = _weight(self.lora_B[self.name])
        if self.free:
            return b
        with torch.autocast(b.device.type, enabled=False):
            return (b @ _weight(self.lora_A[self.name])) * self.scaling[self.name]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features], what the folded matrix gives."""
        if self.disable_adapters or self.merged:
            return self.base(x)
        y = self.adapted(x)
        return y if self.base.bias is None else y + self.base.bias.to(y.dtype)

    def adapted(self, x: torch.Tensor) -> torch.Tensor:
        """The product without its bias."""
        raise NotImplementedError

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write into the base what the forward pass uses; PEFT's ``merge_and_unload`` calls it too."""
        if not self.merged:
            self.write()
            self.merged_adapters.append(self.name)

    def write(self) -> None:
        """Put the folded numbers into the base's buffers."""
        raise NotImplementedError


class ScaleAdapter(GroupAdapterLayer):
    """s' = s (1 + D)."""

    def scales(self) -> torch.Tensor:
        """s' [N, groups]."""
        return float16_through(self.base.scales * (1 + self.factor()).clamp_min(SMALLEST_FACTOR))

    def adapted(self, x: torch.Tensor) -> torch.Tensor:
        """The product with the tuned scales."""
        return group_matmul(x, self.centred, self.scales())

    def write(self) -> None:
        """Tuned scales."""
        self.base.scales = self.scales()


class ZeroPointAdapter(GroupAdapterLayer):
    """z' = z - D / s, whole."""

    zeros: torch.Tensor

    def __init__(self, base_layer: GroupQuantLinear, adapter_name: str, **options: Any) -> None:
        super().__init__(base_layer, adapter_name, **options)
        groups = base_layer.scales.shape[1]
        zeros = unpack_zero_points(base_layer.zero_points, base_layer.bits, groups)
        self.register_buffer("zeros", zeros.to(base_layer.scales.dtype), persistent=False)

    def zero_points(self) -> torch.Tensor:
        """z' [N, groups], whole numbers as floats."""
        return whole_through(self.zeros - self.factor() / self.base.scales, 2**self.base.bits - 1)

    def adapted(self, x: torch.Tensor) -> torch.Tensor:
        """The product with the moved zero points."""
        return group_matmul(x, self.centred, self.base.scales, self.zeros - self.zero_points())

    def write(self) -> None:
        """Moved zero points, packed."""
        self.base.zero_points = pack_zero_points(self.zero_points().to(torch.uint8), self.base.bits)


FOLDS: dict[str, type[GroupAdapterLayer]] = {
    "scale": ScaleAdapter,
    "zero-point": ZeroPointAdapter,
}


def _weight(linear: Any) -> torch.Tensor:
    weight: torch.Tensor = linear.weight
    return weight
