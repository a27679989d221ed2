"""Directories as tuning writes them, without tuning: integers."""

from dataclasses import replace

import torch

from export.graph.targets import Target
from saap.models.architectures import shape_of
from saap.models.checkpoint import load_model, read_config, slim_config, write_slim
from saap.models.slim_quant import MatrixForm
from saap.models.weight_files import tensor_reader
from saap.quantize.groups import quantize, quantize_model

IDS = torch.randint(320, (2, 24), generator=torch.Generator().manual_seed(5))
WIDE = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "intermediate_size": 256, "num_hidden_layers": 2}  # fmt: skip
PARTS = {"qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], "o": ["self_attn.o_proj"],
         "gate_up": ["mlp.gate_proj", "mlp.up_proj"], "down": ["mlp.down_proj"]}  # fmt: skip
QKV_OF_LAYER_1 = {f"model.layers.1.{module}": 8 for module in PARTS["qkv"]}
MIXED = QKV_OF_LAYER_1 | {"model.layers.0.mlp.down_proj": 8}
UNEVEN = {"model.layers.0.mlp.down_proj": MatrixForm(4, 128), "model.layers.1.self_attn.o_proj": MatrixForm(8, 128),
          **{name: MatrixForm(8, 64) for name in QKV_OF_LAYER_1},
          **{name: MatrixForm(4, 64) for name in ("model.embed_tokens", "lm_head")}}  # fmt: skip


def eight(names=MIXED, group_size=32):
    """The forms of matrices of 8 bit."""
    return {name: MatrixForm(8, group_size) for name in names}


def write_integers(path, out, bits=4, group_size=32, *, own=None, head_bits=None):
    model, own = load_model(path), own or {}
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layers" in n}
    matrices = {n: quantize(m.weight, *own.get(n, (bits, group_size))) for n, m in linears.items()}
    entry = quantize_model(model, bits, group_size, head_bits or bits, matrices, own)
    config = read_config(path)
    slim = slim_config(config, shape_of(config), entry)
    return write_slim(out, path, slim, iter(model.state_dict().items()), {})


def stacked(directory, layer, part, tensor):
    """One tensor of the directory's linears that are one matrix in a graph, stacked."""
    read = tensor_reader(directory)[1]
    return torch.cat([read(f"model.layers.{layer}.{module}.{tensor}") for module in PARTS[part]])


class Level0(Target):
    """The float32 kernels at any number of bits, which for 8 the exporter refuses as far too slow."""

    def precision(self, precision, kv_bits):
        return replace(precision, accuracy_level=0)
