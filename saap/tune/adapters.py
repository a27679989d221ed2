"""The group adapter: a PEFT LoRA layer whose base is a matrix of integers, W = s (q - z).

It trains D [N, groups], one number for each output row and group of input columns, 0 at the start. The layer computes
with s' = s (1 + D), kept away from 0 and rounded to what float16 represents, so the deployed kernel stays as it is. (In
the low-rank group form of QA-LoRA, Xu et al., arXiv 2309.14717, D is B A; here A is the identity, and PEFT's B is D.)

All rounding happens in the forward pass, with the gradient going straight through: :meth:`GroupAdapterLayer.merge`
writes into the base what the last forward pass used, to the bit.

:func:`attach` puts one on every linear of the decoder layers, :func:`fold` writes what was trained into the integers'
holders.
"""

from __future__ import annotations

import re
import warnings
from typing import Protocol, cast

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import PreTrainedModel

from saap.base.errors import UserError
from saap.models.architectures import architecture_of
from saap.models.modeling_slim import GroupQuantLinear

NAME = "default"  # of the adapter, PEFT's own
PREFIX = "base_model.model."  # before a module's name in a PeftModel
SMALLEST_FACTOR = 0.05  # 1 + D stays positive: a group must not change its sign
LARGEST_FLOAT16 = 65504.0

Gradient = torch.Tensor | None


class GroupAdapterLayer(nn.Module, LoraLayer):
    """A GroupQuantLinear with one adapter; PEFT makes it, from the config that it is registered with."""

    centred: torch.Tensor
    keeps_matrix = False  # between the passes of a step, where memory allows: see :func:`keep_matrices`
    _kept: tuple[object, torch.Tensor] | None = None

    def __init__(self, base_layer: GroupQuantLinear, adapter_name: str, **_: object) -> None:
        """Wrap ``base_layer``. PEFT's other options differ from version to version and have no effect here."""
        super().__init__()
        with warnings.catch_warnings():  # PEFT asks for sizes of kinds of layers that it knows, and warns of ours
            warnings.filterwarnings("ignore", "Unsupported layer type")
            LoraLayer.__init__(self, base_layer)
        self.name, self._active_adapter = adapter_name, adapter_name
        groups, device = base_layer.columns // base_layer.block, base_layer.scales.device
        self.r[adapter_name] = self.lora_alpha[adapter_name] = groups
        self.scaling[adapter_name] = 1.0
        self.lora_dropout[adapter_name] = self.lora_A[adapter_name] = nn.Identity()
        factor = nn.Linear(groups, base_layer.out_features, bias=False)
        nn.init.zeros_(factor.weight)
        self.lora_B[adapter_name] = factor.to(device)
        centred = base_layer.centred()
        narrow = bool(centred.min() >= -128) and bool(centred.max() <= 127)
        self.register_buffer("centred", centred.to(torch.int8) if narrow else centred, persistent=False)

    @property
    def base(self) -> GroupQuantLinear:
        return cast("GroupQuantLinear", self.base_layer)

    def update_layer(self, *_: object, **__: object) -> None:
        """PEFT's way to put a second adapter on a layer, which has no meaning for integers."""
        raise ValueError("a matrix of integers takes one adapter: fold or detach the one that it has")

    def scales(self) -> torch.Tensor:
        """s' [N, groups], float32 under autocast too."""
        factor = cast("torch.Tensor", self.lora_B[self.name].weight)
        return float16_through(self.base.scales * (1 + factor).clamp_min(SMALLEST_FACTOR))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features], what the folded matrix gives."""
        if self.disable_adapters or self.merged:
            plain: torch.Tensor = self.base(x)
            return plain
        y = self.product(x)
        return y if self.base.bias is None else y + self.base.bias.to(y.dtype)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """:func:`group_matmul` with the integers, by the matrix that is kept while the adapter is the same."""
        scales = self.scales()
        if not self.keeps_matrix:
            return group_matmul(x, self.centred, scales)
        dtype = product_dtype(x)
        versions = (dtype, *((id(p), p._version) for p in self.parameters() if p.requires_grad))
        if self._kept is None or self._kept[0] != versions:
            self._kept = None  # the old one goes before the new one is made
            with torch.no_grad():
                self._kept = versions, dequantized(self.centred, scales, dtype)
        return group_matmul(x, self.centred, scales, self._kept[1])

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write into the base what the forward pass uses; PEFT's ``merge_and_unload`` calls it too."""
        if not self.merged:
            self.base.scales = self.scales()
            self.merged_adapters.append(self.name)


def attach(model: PreTrainedModel) -> PeftModel:
    """Put an adapter on every linear of the decoder layers, in place; all other parameters are frozen.

    Raises:
        UserError: linears without integers or with an adapter, or a PEFT that did not put our layer on each of them.
    """
    holders = _holders(model)
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=_pattern(model, holders))
    lora._register_custom_module({GroupQuantLinear: GroupAdapterLayer})
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():  # nothing here is random
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # which PEFT reads
        try:
            adapted = cast("PeftModel", get_peft_model(model, lora, adapter_name=NAME))
        except ValueError as error:
            raise UserError(
                f"PEFT {peft.__version__} does not take the layers of group adapters ({str(error).splitlines()[0]}): "
                "install another version, 0.17 to 0.21"
            ) from error
    tuners = {
        name.removeprefix(PREFIX): type(m) for name, m in adapted.named_modules() if isinstance(m, BaseTunerLayer)
    }
    if tuners != dict.fromkeys(holders, GroupAdapterLayer):
        wrong = sorted(n for n in {*holders, *tuners} if tuners.get(n) is not GroupAdapterLayer or n not in holders)
        raise UserError(
            f"PEFT {peft.__version__} put no group adapter on {wrong[0]} ({len(wrong)} of {len(holders)} linears): "
            "install another version, 0.17 to 0.21"
        )
    return adapted


def layers_of(model: nn.Module) -> dict[str, GroupAdapterLayer]:
    """Return the adapted linears by their name in the plain model."""
    return {n.removeprefix(PREFIX): m for n, m in model.named_modules() if isinstance(m, GroupAdapterLayer)}


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for layer in layers_of(model).values() for p in layer.parameters() if p.requires_grad]


def keep_matrices(model: nn.Module) -> None:
    """Let each layer keep its dequantised matrix until its adapter changes, instead of making it in each pass."""
    for layer in layers_of(model).values():
        layer.keeps_matrix = True


def fold(model: PeftModel) -> PreTrainedModel:
    """Write what the adapted model computes into its integers' holders; the plain model, on the same modules."""
    for layer in layers_of(model).values():
        layer.merge()
    return detach(model)


def detach(model: PeftModel) -> PreTrainedModel:
    """Take the adapter off and drop it; the plain model, on the same modules."""
    plain = cast("PreTrainedModel", model.unload())
    if hasattr(plain, "peft_config"):  # older PEFT leaves it there and warns at the next adapter
        del plain.peft_config
    return plain


def _holders(model: PreTrainedModel) -> dict[str, GroupQuantLinear]:
    """Return the decoder layers' linears by name, all of integers and untouched."""
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise UserError("the model has an adapter already: fold or detach it first")
    architecture = architecture_of(model.config)
    inside = architecture.layers
    linears = {
        f"{inside}.{name}": module
        for name, module in model.get_submodule(inside).named_modules()
        if isinstance(module, nn.Linear | GroupQuantLinear) and not architecture.is_float(name)
    }
    holders = {name: module for name, module in linears.items() if isinstance(module, GroupQuantLinear)}
    if not linears or len(holders) < len(linears):
        plain = next(iter(linears.keys() - holders.keys()), "the model")
        raise UserError(f"{plain} holds no integers, which a group adapter is put on: quantise the model first")
    return holders


def _pattern(model: PreTrainedModel, holders: dict[str, GroupQuantLinear]) -> str:
    """Write a regular expression for the names; PEFT would write a set of names in another order each time."""
    inside = re.escape(architecture_of(model.config).layers)
    names = sorted({re.sub(rf"^{inside}\.\d+\.", "", name) for name in holders})
    return rf"{inside}\.\d+\.({'|'.join(re.escape(name) for name in names)})"


class Context(Protocol):
    """The state that torch keeps between the passes of an autograd function."""

    saved_tensors: tuple[torch.Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None:
        """They are :attr:`saved_tensors` in the backward pass."""


class _StraightThrough(torch.autograd.Function):
    """The second number, with the gradient going to the first; to the bit, as first + (second - first) is not."""

    @staticmethod
    def forward(ctx: Context, exact: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
        return rounded.clone()

    @staticmethod
    def backward(ctx: Context, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


def float16_through(exact: torch.Tensor) -> torch.Tensor:
    """Round to what float16 represents, finite; the gradient passes straight through."""
    rounded = exact.detach().clamp(-LARGEST_FLOAT16, LARGEST_FLOAT16).half().to(exact.dtype)
    return cast("torch.Tensor", _StraightThrough.apply(exact, rounded))


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the type of a matrix product with x: its own, or autocast's where that is on and x is eligible."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


def group_matmul(
    x: torch.Tensor, centred: torch.Tensor, scale: torch.Tensor, matrix: torch.Tensor | None = None
) -> torch.Tensor:
    """y = x (scale * centred)^T in :func:`product_dtype`.

    The matrix is dequantised in the scales' type and then rounded to that of the product: rounding the scales instead
    would hide small changes of them. Gradients of the scales are summed in their type.

    Args:
        x: [..., K].
        centred: [N, groups, block] integers.
        scale: [N, groups].
        matrix: what :func:`dequantized` gives for these, where it is known; else each pass makes it.

    Returns:
        [..., N].
    """
    return cast("torch.Tensor", _GroupMatMul.apply(x.to(product_dtype(x)), centred, scale, matrix))


class _GroupMatMul(torch.autograd.Function):
    """A matrix that is not given is made twice instead of being kept."""

    @staticmethod
    def forward(
        ctx: Context, x: torch.Tensor, centred: torch.Tensor, scale: torch.Tensor, matrix: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(x, centred, scale, matrix)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, dequantized(centred, scale, x.dtype) if matrix is None else matrix)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad: torch.Tensor) -> tuple[Gradient, None, Gradient, None]:
        x, centred, scale, matrix = ctx.saved_tensors
        for_x, _, for_scale, _ = ctx.needs_input_grad
        grad_x = grad_scale = None
        with torch.autocast(x.device.type, enabled=False):
            if for_x:
                grad_x = grad @ (dequantized(centred, scale, x.dtype) if matrix is None else matrix)
            if for_scale:
                grad_scale = matrix_gradient(grad, x, scale.dtype).view(centred.shape).mul_(centred).sum(-1)
        return grad_x, None, grad_scale, None


def matrix_gradient(grad: torch.Tensor, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """dL/dW [N, K] of y = x W^T in ``dtype``, from dL/dy [..., N] and x [..., K]."""
    return (grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])).to(dtype)


def dequantized(centred: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """scale * centred as a matrix [N, K]."""
    return centred.to(scale.dtype).mul_(scale.unsqueeze(-1)).flatten(1).to(dtype)
