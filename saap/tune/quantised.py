"""A model whose integers are chosen, wrapped for training, and folded: what :func:`saap.tune.tuning.tune` trains."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from devices.common.progress import Progress
from saap.models.architectures import architecture_of
from saap.models.layer_walk import layers_of
from saap.models.streaming import present, settle
from saap.quantize.gptq import compensated_matrices
from saap.quantize.groups import QuantMatrix, quantize, quantize_model
from saap.quantize.mixed_bits import choose_bits
from saap.tune import adapters
from saap.tune.options import TuneOptions


class Quantised:
    """A float model on its way to integers: quantised, wrapped for training, folded."""

    def __init__(self, model: PreTrainedModel, ids: torch.Tensor, options: TuneOptions, progress: Progress | None):
        self.model, self.options = model, options
        self.head_bits: int = options.head_bits or options.bits
        self.bits_of: dict[str, int] = {}
        sample = ids[: options.calibration_rows]
        if options.max_bytes is not None:
            choice = choose_bits(model, sample, options.group_size, options.max_bytes, progress)
            self.head_bits, self.bits_of = choice.vocabulary, choice.bits_of
        self.matrices = self._integers(sample, progress)

    def _integers(self, sample: torch.Tensor, progress: Progress | None) -> dict[str, QuantMatrix]:
        model, options = self.model, self.options
        if options.integers == "gptq":
            return compensated_matrices(
                model, sample, options.bits, options.group_size, self.head_bits, progress, symmetric=options.symmetric,
                bits_of=self.bits_of,
            )  # fmt: skip
        architecture = architecture_of(model.config)
        found = {}
        for layer in layers_of(model):
            with present(layer):
                for name, linear in linears_of(model, layer).items():
                    bits = self.bits_of.get(name, options.bits)
                    found[name] = quantize(linear.weight, bits, options.group_size, options.symmetric)
        for name in (architecture.head, architecture.embedding):
            weight: Any = model.get_submodule(name).weight
            found[name] = quantize(weight, self.head_bits, options.group_size)
        return found

    def prepare(self) -> list[dict[str, Any]]:
        """Wrap the model for training; the parameter groups with their peak rates."""
        options = self.options
        self.quant = quantize_model(self.model, options.bits, options.group_size, self.head_bits, self.matrices)
        self.matrices.clear()
        settle(self.model)
        for parameter in self.model.parameters():  # a view of the loaded file keeps all pages of it that were written
            parameter.data = parameter.data.clone()
        self.model = adapters.attach(self.model, options.adapter, options.training.seed)  # type: ignore[assignment]
        trained = adapters.trained_parameters(self.model)
        return [{"params": trained, "lr": options.rate}, self._norms()]

    def _norms(self) -> dict[str, Any]:
        found = [p for name, p in self.model.named_parameters() if "norm" in name]
        for norm in found:
            norm.requires_grad_(True)
        return {"params": found, "lr": self.options.norm_rate}

    def fold(self) -> dict[str, Any]:
        """Write what was trained into the integers' holders; the ``slim_quant`` entry of the config."""
        self.model = adapters.fold(self.model)  # type: ignore[arg-type]
        return self.quant


def linears_of(model: PreTrainedModel, layer: nn.Module | None = None) -> dict[str, nn.Linear]:
    """The float linears of the decoder layers, or of one of them, by name."""
    inside = architecture_of(model.config).layers + "."
    wanted = None if layer is None else set(layer.modules())
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(inside) and (wanted is None or module in wanted)
    }
