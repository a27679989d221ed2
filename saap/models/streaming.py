"""Models larger than memory: decoder layers stay in their files, and one is in memory while it runs.

The model is its family's own class in transformers, built with parameters that hold nothing. Embedding, norm and head
are read at once; a layer's weights are read when it starts to run, or when :func:`present` asks for it, and are let go
after. So whatever runs the model, or walks it layer by layer, runs a model that does not fit; it should take as many
sequences at a time as it can, since each run of a layer reads it once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import AutoModelForCausalLM, PreTrainedModel

from saap.base.errors import UserError
from saap.base.needs import PROCESS, Needs, fits
from saap.models.architectures import architecture_of, shape_of
from saap.models.checkpoint import Model, load_model, loading, read_config, transformers_config
from saap.system.gpu import CPU, fits_device

Read = Callable[[str], torch.Tensor]


class LayerWeights:
    """The source of a layer's parameters, and the number of their users."""

    def __init__(self, layer: nn.Module, prefix: str, read: Read, dtype: torch.dtype, device: torch.device) -> None:
        self._layer, self._prefix, self._read, self._dtype, self._device = layer, prefix, read, dtype, device
        self._users = 0
        self.needed = True  # else a run needs none of them
        self.hooks: list[RemovableHandle] = []

    def enter(self) -> None:
        """Read the parameters, unless they are there."""
        if not self._users and self.needed:
            state = {
                name: checked_shape(f"{self._prefix}.{name}", self._read(f"{self._prefix}.{name}"), parameter).to(
                    self._device, self._dtype
                )
                for name, parameter in (*self._layer.named_parameters(), *self._layer.named_buffers(recurse=False))
            }
            self._layer.load_state_dict(state, strict=False, assign=True)
            self._layer.requires_grad_(False)
        self._users += 1

    def settle(self) -> None:
        """Read the parameters that the layer still has, for good."""
        for hook in self.hooks:
            hook.remove()
        self.enter()

    def leave(self) -> None:
        """Drop the parameters when nobody else uses them."""
        self._users -= 1
        if not self._users and self.needed:
            self._layer.to("meta")


def checked_shape(name: str, tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return the tensor. Raises UserError: the model's own is of another shape."""
    if tensor.shape != like.shape:
        raise UserError(
            f"the model's {name} is {' x '.join(map(str, tensor.shape))}, and its config.json makes it "
            f"{' x '.join(map(str, like.shape))}: get or make it again"
        )
    return tensor


def load_streamed(
    path: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device = CPU
) -> PreTrainedModel:
    """Load a dense or slim directory as a transformers model in eval mode, whose layers are read as they run.

    Its parameters take no gradient.

    ``dtype``: in which layers compute; ``device``: on which.

    Raises UserError: no model there, of an architecture or format that is not supported, or one that holds integers.
    """
    opened = Model.open(path, verify=False)  # its tensors are checked below
    directory, architecture = opened.directory, architecture_of(opened.config)
    if opened.config.get("slim_quant"):
        raise UserError(f"{directory} holds tuned integers, which are not streamed: load it as a whole")
    names, read = opened.tensors()
    with loading(directory), empty_parameters():
        model = AutoModelForCausalLM.from_config(transformers_config(directory), dtype=dtype)
    prefix = architecture.layers + "."
    own = dict(model.named_parameters(remove_duplicate=False))
    looked_up = f"{architecture.per_layer.table}.weight" if architecture.per_layer else ""  # stays in its file
    outside = {
        name: checked_shape(name, read(name), own[name]).to(device, None if name == looked_up else dtype)
        for name in names
        if name in own and not name.startswith(prefix)
    }
    with loading(directory):
        model.load_state_dict(outside, strict=False, assign=True)
        model.tie_weights()
    for name, parameter in model.named_parameters():
        if parameter.is_meta and not name.startswith(prefix):
            read(name)  # which says that it is missing
    move_buffers(model, device)
    stream_layers(model, architecture.layers, read, dtype, device)
    result: PreTrainedModel = model.eval().requires_grad_(False)
    return result


def stream_layers(model: nn.Module, layers: str, read: Read, dtype: torch.dtype, device: torch.device) -> None:
    """Let the layers of a model, below this name, read their weights when they run and drop them after."""
    for index, layer in enumerate(model.get_submodule(layers).children()):
        weights = LayerWeights(layer, f"{layers}.{index}", read, dtype, device)
        layer.streamed = weights  # type: ignore[assignment]
        weights.hooks = [
            layer.register_forward_pre_hook(lambda module, _: module.streamed.enter()),
            layer.register_forward_hook(lambda module, _, __: module.streamed.leave(), always_call=True),
        ]


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Move buffers, such as rotary frequencies, of a model whose parameters hold nothing yet."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def whole_needs(path: str | Path) -> Needs:
    """Forecast a whole model in memory with float32 weights."""
    return Needs({"the process": PROCESS, "weights": 4 * shape_of(read_config(path)).parameters})


def open_model(path: str | Path, device: torch.device = CPU) -> PreTrainedModel:
    """Load a directory to run forward: whole in float32 where it fits; else as integers, or layer by layer.

    Raises UserError: no model there.
    """
    needs = whole_needs(path)
    if fits(needs) and fits_device(needs, device):
        return moved(load_model(path, materialise=True), device)
    if read_config(path).get("slim_quant"):
        return moved(load_model(path), device)
    return load_streamed(path, device=device)


def moved(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Return the model itself, on this device."""
    return model if model.device == device else nn.Module.to(model, device)


def settle(model: nn.Module) -> None:
    """Give every layer what it still has as parameters, for good: norms and biases, where integers took the rest."""
    for module in list(model.modules()):
        if isinstance(getattr(module, "streamed", None), LayerWeights):
            module.streamed.settle()  # type: ignore[union-attr, operator]
            del module.streamed


def is_streamed(model: nn.Module) -> bool:
    """Whether a model came from :func:`load_streamed`."""
    return any(isinstance(getattr(module, "streamed", None), LayerWeights) for module in model.modules())


@contextmanager
def present(layer: nn.Module) -> Iterator[None]:
    """Hold a layer's weights in memory inside the block; changes to streamed ones are lost after it."""
    weights = getattr(layer, "streamed", None)
    if weights is None:
        yield
        return
    weights.enter()
    try:
        yield
    finally:
        weights.leave()


@contextmanager
def absent(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Let layers whose forward is replaced run inside the block without their weights."""
    weights_of = (getattr(layer, "streamed", None) for layer in layers)
    streamed = [weights for weights in weights_of if isinstance(weights, LayerWeights)]
    for weights in streamed:
        weights.needed = False
    try:
        yield
    finally:
        for weights in streamed:
            weights.needed = True


@contextmanager
def empty_parameters() -> Iterator[None]:
    """Make parameters inside the block hold nothing (device meta); buffers, such as rotary frequencies, are real."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    nn.Module.register_parameter = on_meta  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
