"""The torch model as the reference of parity, one decoder layer in memory at a time.

The model's own transformers classes are built with parameters that hold nothing. Hooks give each layer its weights just
before it runs and take them away after, so what is computed is the family's own forward pass in float32: masks, rotary
embedding and scales included. The vocabulary is read in pieces: of the embedding only the rows that occur, of the head
some thousand rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers import AutoModelForCausalLM

from export.source import ModelSource, Precision
from saap.base.progress import Progress, advance
from saap.models.architectures import traits_of
from saap.models.checkpoint import transformers_config
from saap.models.layer_walk import finished_logits
from saap.models.streaming import LayerWeights, empty_parameters, move_buffers, stream_layers
from saap.quantize.groups import QuantMatrix, check_groups, quantize
from saap.system.processes import training_device

HEAD_ROWS = 8192  # of the head in float32 at a time
LABEL = "computing torch's logits (layers)"
LOGIT_BYTES = 256 << 20  # of logits at a time; each such portion of rows reads the head once


class StreamedModel:
    """A model directory that runs layer by layer.

    All layers have run when the first row of logits comes. After that only hidden states and pieces of the head are in
    memory.

    Args:
        source: a dense, slim or tuned directory.
        precision: what its matrices are rounded to, as the exporter rounds them; a tuned directory has its integers.
    """

    def __init__(self, source: ModelSource, precision: Precision) -> None:
        self._source, self._precision, self._device = source, precision, training_device()
        config = transformers_config(source.directory)
        self._traits = traits_of(config)
        if source.quant:
            config.update({"slim_quant": None})  # ordinary linears, which are given the dequantised numbers
        with empty_parameters():
            self._model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        move_buffers(self._model, self._device)
        self._linears = {name for name, child in self._model.named_modules() if isinstance(child, nn.Linear)}
        arch = source.architecture
        self._linears = {name for name in self._linears if not arch.is_float(name)}
        stream_layers(self._model, arch.layers, self._parameter, torch.float32, self._device)
        for name in (arch.final_norm, *((arch.per_layer.matrix, arch.per_layer.norm) if arch.per_layer else ())):
            module = self._model.get_submodule(name)
            LayerWeights(module, name, self._parameter, torch.float32, self._device).enter()

    def hidden_states(self, ids: torch.Tensor, progress: Progress | None = None) -> torch.Tensor:
        """States after the final norm, [rows, tokens, hidden], of ids [rows, tokens]."""
        arch = self._source.architecture
        layers = list(self._model.get_submodule(arch.layers).children())
        hooks = [self._hook_embedding(name) for name in arch.tables if name != arch.head]
        for index, layer in enumerate(layers):
            show = partial(advance, progress, LABEL, index, len(layers))
            hooks.append(layer.register_forward_pre_hook(lambda *_, show=show: show()))
        with torch.inference_mode():
            # Not base_model: Gemma 3 names it for its pictures' model, and gives the whole one.
            decoder = self._model.get_submodule(arch.layers.rpartition(".")[0])
            states: torch.Tensor = decoder(input_ids=ids.to(self._device), use_cache=False).last_hidden_state
        for hook in hooks:
            hook.remove()
        advance(progress, LABEL, len(layers), len(layers))
        return states

    def logits(self, states: torch.Tensor) -> Iterator[torch.Tensor]:
        """Logits [tokens, vocab] of each row of states [rows, tokens, hidden], on the CPU."""
        vocab = self._source.shape.vocab
        portion = max(1, LOGIT_BYTES // (4 * vocab * states.shape[1]))
        for rows in states.split(portion):
            with torch.inference_mode():
                logits = rows.new_empty(*rows.shape[:2], vocab)
                for start, weight, bias in self._head():
                    there = (weight.to(rows.device), None if bias is None else bias.to(rows.device))
                    logits[:, :, start : start + len(weight)] = F.linear(rows, *there)
                logits = finished_logits(logits, self._traits).cpu()
            yield from logits

    def _hook_embedding(self, name: str) -> RemovableHandle:
        """Give an embedding only the rows that occur, and ids that count these rows."""

        def before(module: nn.Embedding, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            present, places = args[0].unique(return_inverse=True)
            weight = self._vocabulary(name)(present.cpu()).to(places.device)
            module.weight, module.padding_idx = nn.Parameter(weight, requires_grad=False), None
            return (places,)

        table: nn.Module = self._model.get_submodule(name)
        return table.register_forward_pre_hook(before)

    def _parameter(self, name: str) -> torch.Tensor:
        """Read a parameter in float32, a matrix as the exporter rounds it."""
        module, _, part = name.rpartition(".")
        if module in self._linears and part == "weight":
            return dequantised(self._source.matrix(module, self._precision))
        return self._source.read(name).float()

    def _head(self) -> Iterator[tuple[int, torch.Tensor, torch.Tensor | None]]:
        """(first row, float weight [rows, hidden], bias [rows]) of the pieces of the head."""
        arch = self._source.architecture
        read_rows = self._vocabulary(arch.embedding if self._source.shape.tied else arch.head)
        bias = self._source.bias(arch.head)
        for rows in torch.arange(self._source.shape.vocab).split(HEAD_ROWS):
            yield int(rows[0]), read_rows(rows), None if bias is None else bias[rows]

    def _vocabulary(self, module: str) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return a function from row numbers to these rows of embedding or head, as the exporter rounds them.

        The exporter rounds every row by itself, so a piece is rounded as the whole is.
        """
        bits, group_size = self._precision.head_bits, self._precision.group_size
        if self._source.quant:
            table = self._source.matrix(module, self._precision)
            return lambda rows: dequantised(table[rows])
        weight = self._source.read(f"{module}.weight")
        if bits == 32:
            return lambda rows: weight[rows].float()
        check_groups(weight.shape[1], group_size, module)
        return lambda rows: dequantised(quantize(weight[rows].float(), bits, group_size))


def dequantised(matrix: torch.Tensor | QuantMatrix) -> torch.Tensor:
    """Return the numbers [N, K] float32 that integers stand for; a float matrix as it is."""
    return matrix if isinstance(matrix, torch.Tensor) else matrix.dequantize()
