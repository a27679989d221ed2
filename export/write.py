"""Write a model directory as a bundle: weights, two graphs, tokenizer, client configuration, manifest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from devices.common.progress import Progress
from export.bundle.clients import write_client_files
from export.bundle.manifest import (
    DECODE_GRAPH,
    SCORING_GRAPH,
    BundleManifest,
    LayerSizes,
    write_manifest,
)
from export.bundle.tokenizer import BundleTokenizer, end_ids
from export.graph.decoder import DecoderGraph, check_attention
from export.graph.kv_cache import cache_scales
from export.graph.rotary import all_rotary_tables
from export.graph.targets import CPU, Target
from export.graph.weights import WeightFile, write_weights
from export.source import ModelSource, Precision
from saap.models.architectures import Traits, traits_of
from saap.models.checkpoint import read_record
from saap.models.resolve import copy_sidecars
from saap.models.weight_files import weights_hash
from saap.system.errors import UserError
from saap.system.files import read_object, writing_directory


def export_bundle(
    model_dir: str | Path,
    out: str | Path,
    *,
    bits: int | None = None,
    block: int | None = None,
    head_bits: int | None = None,
    kv_bits: int = 32,
    calibration: torch.Tensor | None = None,
    accuracy_level: int = 4,
    target: Target = CPU,
    parity: Callable[[Path], dict[str, Any]] | None = None,
    progress: Progress | None = None,
) -> BundleManifest:
    """Export a dense, slim or tuned directory for the CPU or for CUDA.

    Args:
        bits: 4, 8 or 32 for the linears, 16 on CUDA; None is 4, or what a tuned directory holds.
        block: quantisation group; None is 32, or what a tuned directory holds.
        head_bits: of embedding and head; None is as ``bits``.
        kv_bits: 8 for a KV cache of integers, scaled per channel by what ``calibration`` fills it with.
        calibration: ids [rows, tokens]; needed at ``kv_bits`` 8 only.
        accuracy_level: of MatMulNBits on the CPU; 4 computes in int8, 0 in float32 (slow, for checks).
        parity: is given the finished files before the bundle appears, returns the parity report, raises on failure;
            None leaves the bundle unverified.

    Raises:
        UserError: unsupported architecture, precision, sizes or target.
        RunError: a tokenizer, or ids that end a text, that cannot be read.
    """
    source = ModelSource(Path(model_dir))
    if bits == 16 and target.name == "cuda":
        bits = 32  # floats, of the target's type
    precision = target.precision(source.precision(bits, block, head_bits), kv_bits, accuracy_level)
    config = transformers_config(source)
    traits = traits_of(config)
    windows = any(layer.window for layer in traits.layers)
    target.check(source.shape, precision, windows)
    rotary = all_rotary_tables(config, traits)
    check_attention(source.shape, traits, {name: 2 * table.shape[1] for name, table in rotary.items()})
    if precision.kv == "int8" and calibration is None:
        raise UserError("an int8 cache needs text to find its scales: give --text FILE")
    _check_words(source.directory, config)
    with writing_directory(out) as partial:
        copy_sidecars(source.directory, partial)
        file = WeightFile(partial, precision.floats)
        write_weights(source, precision, file, progress)
        for name, table in rotary.items():
            file.add(name, table)
        if precision.kv == "int8" and calibration is not None:
            _add_cache_scales(source, traits, precision, file, config.rms_norm_eps, calibration)
        file.close()
        for name, scoring in ((DECODE_GRAPH, False), (SCORING_GRAPH, True)):
            graph = DecoderGraph(source.shape, traits, precision, file, config.rms_norm_eps)
            ir.save(graph.build(scoring), partial / name)
        read, oldest = file.bytes_per_token(source.shape.tied), target.oldest_runtime(precision, windows)
        manifest = make_manifest(source, precision, config, read, target.name, oldest)
        manifest = write_client_files(partial, source.config, manifest)
        write_manifest(partial, manifest)
        if parity is not None:
            manifest = replace(manifest, parity=parity(partial))
        complete = write_manifest(partial, manifest)
    return complete


def _add_cache_scales(
    source: ModelSource, traits: Traits, precision: Precision, file: WeightFile, epsilon: float, ids: torch.Tensor
) -> None:
    """Probe the graph with a float cache, then add the scales of the integer one to the data file."""
    file.flush()
    probe = file.directory / "probe.onnx"
    ir.save(DecoderGraph(source.shape, traits, replace(precision, kv="float32"), file, epsilon).build(True), probe)
    layers = [LayerSizes(**asdict(sizes)) for sizes in source.shape.layers]
    for name, scales in cache_scales(probe, layers, source.shape.head_dim, ids.numpy()).items():
        file.add(name, scales)
    probe.unlink()


def make_manifest(
    source: ModelSource, precision: Precision, config: Any, bytes_per_token: int, target: str, oldest: str
) -> BundleManifest:
    """The manifest of a bundle, without its files and parity.

    Args:
        bytes_per_token: of weights that are read for each token.
        oldest: ONNX Runtime that it runs in.
    """
    shape = source.shape
    kv_heads = sum(sizes.kv_heads for sizes in shape.layers)
    record = read_record(source.directory)
    half = precision.floats == "float16"
    return BundleManifest(
        target=target,
        model_type=config.model_type,
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        head_dim=shape.head_dim,
        context_length=config.max_position_embeddings,
        layers=[LayerSizes(**asdict(sizes)) for sizes in shape.layers],
        bits=16 if half and precision.bits == 32 else precision.bits,
        block=precision.block,
        accuracy_level=precision.accuracy_level,
        parameters=shape.parameters,
        weight_bytes_per_token=bytes_per_token,
        kv_bytes_per_token=2 * np.dtype(precision.kv).itemsize * kv_heads * shape.head_dim,
        kv_dtype=precision.kv,
        bos_token_id=config.bos_token_id,
        eos_token_ids=_eos_ids(source.directory, config),
        onnxruntime_min=oldest,
        lineage={
            "model_sha256": weights_hash(source.directory),
            "head_bits": precision.head_bits,
            **({"matrices": source.quant["matrices"]} if source.quant and source.quant.get("matrices") else {}),
            "method": record.get("method"),
            "plan": {key: value for key, value in record.get("plan", {}).items() if not isinstance(value, list)},
            "tuning": record.get("tuning", {}).get("text"),
            **record.get("lineage", {}),
        },
    )


def _check_words(directory: Path, config: Any) -> None:
    """What is damaged of a tokenizer is told before weights are written."""
    _eos_ids(directory, config)
    if (directory / "tokenizer.json").is_file():
        BundleTokenizer(directory)


def _eos_ids(directory: Path, config: Any) -> list[int]:
    """Every id that ends a text: generation_config.json knows more of them than config.json."""
    ids, path = config.eos_token_id, directory / "generation_config.json"
    if path.is_file():
        ids = read_object(path, "get or make the model again").get("eos_token_id", ids)
    return end_ids(ids, directory)


def transformers_config(source: ModelSource) -> Any:
    """The model's config as transformers reads it."""
    from transformers import AutoConfig

    import saap.models.checkpoint  # noqa: F401  registers our model type

    return AutoConfig.from_pretrained(source.directory, local_files_only=True)
