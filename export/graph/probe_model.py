"""The sizes of a model's decode step, from a config: enough to build graphs that take as long."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from export.bundle.manifest import MANIFEST
from export.graph.targets import CPU
from export.source import Precision
from saap.base.errors import UserError
from saap.models.architectures import (
    Architecture,
    ModelConfig,
    Traits,
    architecture_of,
    shape_of,
    traits_of,
)
from saap.models.checkpoint import read_config, transformers_config
from saap.models.shape import LayerSizes, ModelShape
from saap.models.slim_quant import SlimQuant, quant_of
from saap.quantize.groups import check_groups

WEIGHT_LIMIT = 256 << 20  # bytes of weights above which the probe holds fewer layers than the model
LEAST_LAYERS = 4
CONTEXT = 4096  # positions of the rotary tables; a step reads one of them


@dataclass(frozen=True)
class ProbeModel:
    """A model without its weights."""

    shape: ModelShape  # its layers are all alike, each as large as the largest of the model, with attention
    traits: Traits
    architecture: Architecture
    precision: Precision
    config: ModelConfig
    largest: LayerSizes  # of its largest short convolution or delta net


def read_probe_model(
    directory: Path, bits: int | None = None, group_size: int | None = None, weight_limit: int = WEIGHT_LIMIT
) -> ProbeModel:
    """Read a model directory, of which ``config.json`` is enough.

    Args:
        bits: 4, 8 or 32, of all matrices; None is 4, or what a tuned directory holds. Where some matrices hold other
            bits, the probe does not: its layers are all alike.
        group_size: weights per scale; None is 32, or what a tuned directory holds.
        weight_limit: bytes; a model of more is probed with fewer layers. It should be several times the device's
            last-level cache.

    Raises UserError: no config, a bundle, or an unsupported architecture, precision or size.
    """
    if (directory / MANIFEST).is_file():
        raise UserError(f"{directory} is a bundle: give the model that it was made of")
    raw = read_config(directory)
    architecture_of(raw)
    config, precision = transformers_config(directory), _precision(quant_of(raw), bits, group_size)
    # Reading single rows of a table takes hardly any time.
    dense = replace(shape_of(config), per_layer=0, sources=(), head_tokens=0)
    groups = max(sizes.kv_heads for sizes in dense.layers)
    per_group = max(sizes.heads_per_group for sizes in dense.layers)
    largest = LayerSizes(groups * per_group, groups, max(sizes.ffn for sizes in dense.layers))
    rare = LayerSizes(conv=max(s.conv for s in dense.layers), delta=max(s.delta for s in dense.layers))
    count = _layer_count(dense.with_layers((largest,)), precision, len(dense.layers), weight_limit)
    if precision.group_size:
        check_groups(dense.hidden, precision.group_size, "the hidden state")
        check_groups(largest.query_heads * dense.head_dim, precision.group_size, "o_proj")
        check_groups(largest.ffn, precision.group_size, "down_proj")
        for kind in rare.blocks:
            check_groups(dense.inner_width(kind, rare), precision.group_size, f"out_proj of {kind.label}")
    traits = traits_of(config)
    attending = [traits.layers[i] for i, sizes in enumerate(dense.layers) if not (sizes.conv or sizes.delta)] or list(
        traits.layers
    )
    traits = replace(traits, layers=tuple(attending[i % len(attending)] for i in range(count)), vocabulary="")
    config.max_position_embeddings = min(config.max_position_embeddings, CONTEXT)
    return ProbeModel(dense.with_layers((largest,) * count), traits, architecture_of(config), precision, config, rare)


def _precision(own: SlimQuant | None, bits: int | None, group_size: int | None) -> Precision:
    bits = bits or (own["bits"] if own else 4)
    if bits not in (4, 8, 32):
        raise UserError(f"{bits} bits cannot be probed on a CPU; allowed: 4, 8, 32")
    if bits == 32:
        return Precision(32, 0, 32)
    head_bits = own["embedding_bits"] if own and own["bits"] == bits else bits
    return CPU.precision(Precision(bits, group_size or (own and own["block"]) or 32, head_bits), 32)


def _layer_count(one: ModelShape, precision: Precision, count: int, limit: int) -> int:
    """Return the number of layers to probe: the model's, or as many as fit into the limit."""
    per_weight = precision.bits / 8 + (4 / precision.group_size if precision.group_size else 0)  # with the scales
    free = limit - one.vocab * one.hidden * per_weight
    return max(LEAST_LAYERS, min(count, int(free // (one.layer_weights * per_weight))))
