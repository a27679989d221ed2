"""What a bundle's logits are held against: the torch model with the exporter's integers, whole or streamed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from export.parity.streamed import StreamedModel
from export.source import ModelSource, Precision
from saap.models.architectures import architecture_of
from saap.models.checkpoint import load_model, read_config
from saap.quantize.groups import quantize


def reference_model(model_dir: Path, bits: int, group_size: int, head_bits: int) -> Any:
    """The torch model with the integers that the exporter wrote, as ordinary linears."""
    if bits == 32 or read_config(model_dir).get("slim_quant"):
        return load_model(model_dir, materialise=True)
    model = load_model(model_dir)
    round_model(model, bits, group_size, head_bits)
    return model


def round_model(model: Any, bits: int, group_size: int, embedding_bits: int) -> None:
    """Give linears, embedding and head the numbers that the integers hold, in place, of any family."""
    architecture = architecture_of(model.config)
    vocabulary = (architecture.embedding, architecture.head)
    for name, module in model.named_modules():
        tied = name == architecture.head and module.weight is model.get_input_embeddings().weight
        if tied or architecture.is_float(name) or not isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            continue
        own_bits = embedding_bits if name in vocabulary else bits
        module.weight.data = quantize(module.weight, own_bits, group_size).dequantize()


def streamed_logits(model_dir: Path, ids: torch.Tensor, precision: Precision) -> Iterator[torch.Tensor]:
    """Logits [tokens, vocab] float32 of each row of ids [rows, tokens], layer by layer."""
    reference = StreamedModel(ModelSource(Path(model_dir)), precision)
    return reference.logits(reference.hidden_states(ids))
