"""Write a model directory as a bundle: weights, two graphs, tokenizer, client configuration, manifest."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from export.bundle import (
    DECODE_GRAPH,
    SCORING_GRAPH,
    BundleManifest,
    LayerSizes,
    write_manifest,
)
from export.clients import write_genai_config
from export.graph import DecoderGraph, check_attention
from export.rotary import all_rotary_tables
from export.weights import ModelSource, Precision, Progress, WeightFile, write_weights
from saap.architectures import traits_of
from saap.checkpoint import read_record, weights_hash, writing_directory
from saap.errors import SaapError
from saap.models import copy_sidecars
from saap.structures import ModelShape

ONNXRUNTIME_MIN = "1.23"  # GatherBlockQuantized on packed uint8


def export_bundle(
    model_dir: str | Path,
    out: str | Path,
    *,
    bits: int | None = None,
    block: int | None = None,
    head_bits: int | None = None,
    accuracy_level: int = 4,
    parity: Callable[[Path], dict[str, Any]] | None = None,
    progress: Progress | None = None,
) -> BundleManifest:
    """Export a dense, slim or tuned directory for the CPU.

    Args:
        bits: 4, 8 or 32 for the linears; None is 4, or what a tuned directory holds.
        block: quantisation group; None is 32, or what a tuned directory holds.
        head_bits: of embedding and head; None is as ``bits``.
        accuracy_level: of MatMulNBits; 4 computes in int8, 0 in float32 (slow, for checks).
        parity: is given the finished files before the bundle appears, returns the parity report, raises on failure.

    Raises:
        SaapError: unsupported architecture, precision or sizes.
    """
    source = ModelSource(Path(model_dir))
    precision = source.precision(bits, block, head_bits)
    precision = Precision(precision.bits, precision.block, precision.head_bits, accuracy_level)
    check_kernels(precision)
    config = transformers_config(source)
    traits = traits_of(config)
    rotary = all_rotary_tables(config, traits)
    check_attention(source.shape, traits, {name: 2 * table.shape[1] for name, table in rotary.items()})
    with writing_directory(out) as partial:
        copy_sidecars(source.directory, partial)
        file = WeightFile(partial)
        write_weights(source, precision, file, progress)
        for name, table in rotary.items():
            file.add(name, table)
        file.close()
        for name, scoring in ((DECODE_GRAPH, False), (SCORING_GRAPH, True)):
            graph = DecoderGraph(source.shape, traits, precision, file, config.rms_norm_eps)
            ir.save(graph.build(scoring), partial / name)
        manifest = make_manifest(source, precision, config)
        write_genai_config(partial, manifest)
        write_manifest(partial, manifest)
        if parity is not None:
            manifest = replace(manifest, parity=parity(partial))
        complete = write_manifest(partial, manifest)
    return complete


def check_kernels(precision: Precision) -> None:
    """Refuse what ONNX Runtime runs 200 times slower: 8 bit has an int8-activation kernel only."""
    eight = 8 in (precision.bits, precision.head_bits)
    if eight and precision.accuracy_level != 4:
        raise SaapError(f"8 bit needs accuracy level 4, not {precision.accuracy_level}: it has no other fast kernel")


def weight_bytes(shape: ModelShape, precision: Precision) -> tuple[int, int]:
    """(bytes of the decoder's layers and norms, bytes of one pass over the head), as stored."""

    def matrix(n: int, k: int, bits: int, zero_points: bool) -> int:
        if bits == 32:
            return 4 * n * k
        groups = k // precision.block
        return n * k * bits // 8 + 4 * n * groups + (n * ((groups * bits + 7) // 8) if zero_points else 0)

    layers, norms = 4 * shape.hidden, 4 * shape.norms * shape.hidden
    for sizes in shape.layers:
        q, kv = sizes.query_heads * shape.head_dim, sizes.kv_heads * shape.head_dim
        if q:
            layers += matrix(q + 2 * kv, shape.hidden, precision.bits, True) + norms
            layers += 4 * 2 * shape.head_dim * shape.qk_norm
            layers += matrix(shape.hidden, q, precision.bits, True)
        if sizes.ffn:
            layers += matrix(2 * sizes.ffn, shape.hidden, precision.bits, True) + norms
            layers += matrix(shape.hidden, sizes.ffn, precision.bits, True)
    return layers, matrix(shape.vocab, shape.hidden, precision.head_bits, False)


def make_manifest(source: ModelSource, precision: Precision, config: Any) -> BundleManifest:
    """The manifest of a CPU bundle, without its files and parity."""
    shape = source.shape
    layers, head = weight_bytes(shape, precision)
    kv_heads = sum(sizes.kv_heads for sizes in shape.layers)
    record = read_record(source.directory)
    return BundleManifest(
        target="cpu",
        model_type=config.model_type,
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        head_dim=shape.head_dim,
        context_length=config.max_position_embeddings,
        layers=[LayerSizes(**asdict(sizes)) for sizes in shape.layers],
        bits=precision.bits,
        block=precision.block,
        accuracy_level=precision.accuracy_level,
        parameters=shape.parameters,
        weight_bytes_per_token=layers + head,
        kv_bytes_per_token=2 * 4 * kv_heads * shape.head_dim,
        kv_dtype="float32",
        bos_token_id=config.bos_token_id,
        eos_token_ids=_eos_ids(source.directory, config),
        onnxruntime_min=ONNXRUNTIME_MIN,
        lineage={
            "model_sha256": weights_hash(source.directory),
            "head_bits": precision.head_bits,
            "method": record.get("method"),
            "plan": {key: value for key, value in record.get("plan", {}).items() if not isinstance(value, list)},
            "tuning": record.get("tuning", {}).get("text"),
            **record.get("lineage", {}),
        },
    )


def _eos_ids(directory: Path, config: Any) -> list[int]:
    """Every id that ends a text: generation_config.json knows more of them than config.json."""
    ids = config.eos_token_id
    path = directory / "generation_config.json"
    if path.is_file():
        ids = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id", ids)
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)


def transformers_config(source: ModelSource) -> Any:
    """The model's config as transformers reads it."""
    from transformers import AutoConfig

    import saap.checkpoint  # noqa: F401  registers our model type

    return AutoConfig.from_pretrained(source.directory, local_files_only=True)
