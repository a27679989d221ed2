"""Probe stacks for llama.cpp: models at a model's sizes with weights made up, for :mod:`bench.costs` to time.

The layers are those of :mod:`export.graph.probe_stacks`. Time does not depend on the weights' values. llama.cpp's
architecture ``deci`` drops the attention of a layer whose FFN has no width, so such a layer gets one of 32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export.gguf.families import OWN
from export.gguf.write import BITS, write_header
from export.graph.probe_model import CONTEXT, ProbeModel
from export.graph.probe_stacks import ProbeStack
from saap.base.errors import UserError
from saap.models.architectures import SLIM
from saap.models.shape import LayerSizes, ModelShape

KINDS = {**BITS, 4: "Q4_0"}  # by bits; without zero points, as a bundle's integers are
LEAST_FFN = 32
EPSILON = 1e-5
BLOCK = 32  # weights
Matrix = tuple[str, int, int]  # name, rows, columns; 0 rows: a vector in float


def check_probe(model: ProbeModel) -> None:
    """Raise UserError for a family that ``deci`` does not hold."""
    family = str(model.config.model_type).removeprefix(SLIM)
    if model.architecture.gguf == "no" or family in OWN:
        raise UserError(
            f"models of {family} are not timed in llama.cpp, whose 'deci' architecture does not hold them: "
            "leave --engine out"
        )


def write_probe_gguf(model: ProbeModel, stack: ProbeStack, out: Path) -> None:
    """Write one stack as a GGUF file; where its head has fewer tokens, the file has no others."""
    from gguf import GGUFWriter

    layers, kind = stack.layers, KINDS[model.precision.bits]
    shape = replace(model.shape, vocab=stack.head_rows or model.shape.vocab)
    writer, name = GGUFWriter(out, "deci"), "deci"
    sizes = {
        "block_count": len(layers), "context_length": CONTEXT, "embedding_length": shape.hidden,
        "vocab_size": shape.vocab, "attention.key_length": shape.head_dim, "attention.value_length": shape.head_dim,
        "rope.dimension_count": shape.head_dim,
    }  # fmt: skip
    for key, value in sizes.items():
        writer.add_uint32(f"{name}.{key}", value)
    writer.add_float32(f"{name}.attention.layer_norm_rms_epsilon", EPSILON)
    writer.add_array(f"{name}.attention.head_count", [each.query_heads for each in layers])
    writer.add_array(f"{name}.attention.head_count_kv", [each.kv_heads for each in layers])
    writer.add_array(f"{name}.feed_forward_length", [_ffn(each) for each in layers])
    writer.add_string("tokenizer.ggml.model", "no_vocab")
    matrices = list(_matrices(shape, layers))
    write_header(writer, ((n, (rows, k), kind) if rows else (n, (k,), "F32") for n, rows, k in matrices))
    most = max(rows * columns for _, rows, columns in matrices)
    drawn = _blocks(kind, most)
    for _, rows, columns in matrices:
        if rows:
            writer.write_tensor_data(drawn[: rows * columns // BLOCK].reshape(rows, -1))
        else:
            writer.write_tensor_data(np.ones(columns, np.float32))
    writer.close()


def _blocks(kind: str, weights: int) -> NDArray[np.generic]:
    """Random weights [blocks, bytes or floats of a block], about as large as those of a model."""
    random = np.random.default_rng(0)
    if kind == "F32":
        return random.uniform(-0.05, 0.05, (weights // BLOCK, BLOCK)).astype(np.float32)
    size = {"Q4_0": 18, "Q8_0": 34}[kind]
    blocks = random.integers(0, 256, (weights // BLOCK, size), np.uint8)
    blocks[:, :2] = np.array([0.005 if kind == "Q4_0" else 0.0003], np.float16).view(np.uint8)  # the scale comes first
    return blocks


def _ffn(sizes: LayerSizes) -> int:
    return sizes.ffn or (LEAST_FFN if sizes.query_heads else 0)


def _matrices(shape: ModelShape, layers: Sequence[LayerSizes]) -> Iterator[Matrix]:
    """Every tensor of a stack, as llama.cpp calls it."""
    yield "token_embd.weight", shape.vocab, shape.hidden
    yield "output_norm.weight", 0, shape.hidden
    if not shape.tied:
        yield "output.weight", shape.vocab, shape.hidden
    for index, sizes in enumerate(layers):
        heads, groups, ffn = sizes.query_heads * shape.head_dim, sizes.kv_heads * shape.head_dim, _ffn(sizes)
        parts: list[tuple[str, int, int, bool]] = []
        if heads:
            yield f"blk.{index}.attn_norm.weight", 0, shape.hidden
            parts += [
                ("attn_q", heads, shape.hidden, shape.attention_bias),
                ("attn_k", groups, shape.hidden, shape.attention_bias),
                ("attn_v", groups, shape.hidden, shape.attention_bias),
                ("attn_output", shape.hidden, heads, shape.attention_bias and shape.output_bias),
            ]
        if ffn:
            yield f"blk.{index}.ffn_norm.weight", 0, shape.hidden
            parts += [
                ("ffn_gate", ffn, shape.hidden, shape.mlp_bias), ("ffn_up", ffn, shape.hidden, shape.mlp_bias),
                ("ffn_down", shape.hidden, ffn, shape.mlp_bias),
            ]  # fmt: skip
        for part, rows, columns, biased in parts:
            yield f"blk.{index}.{part}.weight", rows, columns
            if biased:
                yield f"blk.{index}.{part}.bias", 0, rows
