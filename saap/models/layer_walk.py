"""Walk a decoder layer by layer: what reaches each layer, its run, and what enters and leaves modules within it."""

from __future__ import annotations

import inspect
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from saap.models.architectures import Traits, architecture_of, traits_of
from saap.models.modeling_slim import hide_removed
from saap.models.streaming import absent, present

ROWS = 8  # sequences of one forward pass
HEAD_ROWS = 2  # sequences whose logits are held at once


LayerArguments = Mapping[str, object]  # arguments of a layer besides the hidden states


@dataclass
class Batch:
    """Some sequences on their way through the decoder."""

    hidden: torch.Tensor  # what reaches the first layer, [sequences, tokens, hidden]
    arguments: list[LayerArguments] = field(default_factory=list)  # each layer's masks and rotary tables

    @property
    def shared(self) -> UserDict[str, tuple[torch.Tensor, ...]] | None:
        """Keys and values that layers leave for later ones, by the kind of layer; None in a family that has none."""
        first = self.arguments[0] if self.arguments else {}
        return next((value for value in first.values() if isinstance(value, UserDict)), None)


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    layers = model.get_submodule(architecture_of(model.config).layers)
    assert isinstance(layers, nn.ModuleList), "transformers keeps the layers of a decoder in a list"
    return layers


@torch.no_grad()
def layer_inputs(model: PreTrainedModel, rows: torch.Tensor, batch: int = ROWS) -> list[Batch]:
    """Collect the inputs of the layers for rows of ids [sequences, tokens]; only the first layer runs, once."""
    batches: list[Batch] = []
    with _idle_layers(model, batches):
        for part in rows.split(batch):
            batches.append(Batch(torch.empty(0)))
            model.base_model(input_ids=part.to(model.device), use_cache=False)
    return batches


def batches_of(model: PreTrainedModel, parts: Sequence[torch.Tensor]) -> list[Batch]:
    """:func:`layer_inputs` of parts [sequences, tokens], of which only the last may be smaller; there may be none."""
    return layer_inputs(model, torch.cat(tuple(parts)), batch=len(parts[0])) if parts else []


@contextmanager
def _idle_layers(model: PreTrainedModel, batches: list[Batch]) -> Iterator[None]:
    """Make layers note their arguments in the last batch and pass the hidden states on."""
    layers = layers_of(model)
    first = layers[0].forward
    names = list(inspect.signature(first).parameters)
    in_tuple: list[bool] = []  # families differ in what a layer gives back

    def idle(*args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor]:
        arguments: dict[str, Any] = {**dict(zip(names, args, strict=False)), **kwargs}
        hidden = arguments.pop("hidden_states")
        batch = batches[-1]
        if not batch.arguments:
            batch.hidden = hidden
        batch.arguments.append(arguments)
        if not in_tuple:
            in_tuple.append(isinstance(first(*args, **kwargs), tuple))
        return (hidden,) if in_tuple[0] else hidden

    with absent(layers[1:]):
        try:
            for layer in layers:
                layer.forward = idle
            yield
        finally:
            for layer in layers:
                del layer.forward


def run_layer(layer: nn.Module, hidden: torch.Tensor, arguments: LayerArguments) -> torch.Tensor:
    """Return one layer's output, [sequences, tokens, hidden]."""
    out = layer(hidden, **arguments)
    states: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return states


def states_after(
    model: PreTrainedModel, batches: Sequence[Batch], hidden: list[torch.Tensor], first: int = 0
) -> Iterator[list[torch.Tensor]]:
    """Yield the output of each layer from ``first`` on, batch by batch, where ``hidden`` reaches that layer."""
    for index, layer in enumerate(layers_of(model)[first:], first):
        with present(layer):
            hidden = [run_layer(layer, x, batch.arguments[index]) for x, batch in zip(hidden, batches, strict=True)]
        yield hidden


def logits_after(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Logits [sequences, tokens, vocab] float32 of the states after the last layer."""
    architecture = architecture_of(model.config)
    norm, head = (model.get_submodule(name) for name in (architecture.final_norm, architecture.head))
    return finished_logits(head(norm(hidden)).float(), traits_of(model.config))


def finished_logits(products: torch.Tensor, traits: Traits) -> torch.Tensor:
    """Turn the products of the head's matrix into the model's logits."""
    if traits.logit_scale is not None:
        products = products * traits.logit_scale
    cap = traits.logit_cap
    logits = cap * torch.tanh(products / cap) if cap else products
    return hide_removed(logits, traits.vocabulary) if traits.vocabulary else logits


class _Reached(Exception):  # noqa: N818  not an error: the result is known
    pass


def run_until(
    layer: nn.Module,
    hidden: torch.Tensor,
    arguments: LayerArguments,
    last: nn.Module,
    also: Mapping[str, nn.Module],
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Run a layer until module ``last`` is about to run; return its input, and those of other modules before it."""
    with inputs_of(also) as inputs_before:
        inputs: tuple[torch.Tensor, ...] = _stopped_at(layer, hidden, arguments, last.register_forward_pre_hook)
        return inputs[0], inputs_before


def output_of(layer: nn.Module, hidden: torch.Tensor, arguments: LayerArguments, module: nn.Module) -> torch.Tensor:
    """Run a layer until a module of it has run, and return that module's output."""
    output: torch.Tensor = _stopped_at(layer, hidden, arguments, module.register_forward_hook)
    return output


def _stopped_at(
    layer: nn.Module, hidden: torch.Tensor, arguments: LayerArguments, register: Callable[..., RemovableHandle]
) -> Any:
    """Run a layer until a hook is called, and return the last argument of that call."""
    reached: list[object] = []

    def stop(_: nn.Module, *values: object) -> None:
        reached.append(values[-1])
        raise _Reached

    handle = register(stop)
    try:
        run_layer(layer, hidden, arguments)
    except _Reached:
        return reached[0]
    finally:
        handle.remove()
    raise RuntimeError("the layer does not run that module")


@contextmanager
def removed_hooks() -> Iterator[list[RemovableHandle]]:
    """Give a list for the handles of hooks, which are removed when the block ends."""
    handles: list[RemovableHandle] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def inputs_of(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, torch.Tensor]]:
    """Give a dict that holds, after each run, the last input of every named module."""
    inputs: dict[str, torch.Tensor] = {}

    def note(name: str, _: nn.Module, args: tuple[torch.Tensor]) -> None:
        (inputs[name],) = args

    with removed_hooks() as handles:
        handles += [module.register_forward_pre_hook(partial(note, name)) for name, module in modules.items()]
        yield inputs


@contextmanager
def outputs_of(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, torch.Tensor]]:
    """Give a dict that holds, after each run, the last output of every named module."""
    outputs: dict[str, torch.Tensor] = {}

    def note(name: str, _: nn.Module, __: object, output: torch.Tensor) -> None:
        outputs[name] = output

    with removed_hooks() as handles:
        handles += [module.register_forward_hook(partial(note, name)) for name, module in modules.items()]
        yield outputs
