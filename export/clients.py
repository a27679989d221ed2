"""Writes the files that let other programs run a bundle.

``genai_config.json`` is for onnxruntime-genai, ``config.json`` for optimum's ``ORTModelForCausalLM``. The latter's
batches must not be padded on bundles of the ``cpu`` target: their operator takes padding on the left for text.
``export.generate.ort_model`` has no such limit.
"""

from __future__ import annotations

import json
from pathlib import Path

from export.bundle.genai import GENAI_CONFIG, genai_config
from export.bundle.manifest import BundleManifest
from saap.base.files import write_text
from saap.models.architectures import PER_LAYER, SLIM, entries_of

CONFIG = "config.json"


def optimum_config(config: dict[str, object], manifest: BundleManifest) -> dict[str, object] | None:
    """Build the ``config.json`` with which optimum's ``ORTModelForCausalLM`` runs a bundle; None where it cannot.

    optimum takes one KV shape for all layers: ``num_key_value_heads``, and ``hidden_size / num_attention_heads`` as the
    head size (optimum-onnx 0.1.0 reads ``head_dim`` for few model types only). So the layers with attention must have
    equal KV heads, and ``num_attention_heads`` is the number that gives the right quotient, not the one of any layer.
    There is no place for the states of convolutions.
    """
    kv_heads = {layer.kv_heads for layer in manifest.kv_layers}
    if len(kv_heads) != 1 or not manifest.can_forget or manifest.hidden_size % manifest.head_dim:
        return None
    ours = (
        "slim_layers", "slim_quant", "slim_bias", "slim_vocabulary", "auto_map", "quantization_config", "_name_or_path",
    )  # fmt: skip
    cached = [index for index, layer in enumerate(manifest.layers) if layer.query_heads]
    lists = {key: [entries[i] for i in cached] for key in PER_LAYER if (entries := entries_of(config, key))}
    return {
        **{key: value for key, value in config.items() if key not in ours},
        **lists,
        "model_type": str(config["model_type"]).removeprefix(SLIM),
        "num_hidden_layers": len(manifest.kv_layers),
        "num_attention_heads": manifest.hidden_size // manifest.head_dim,
        "num_key_value_heads": kv_heads.pop(),
        "head_dim": manifest.head_dim,
    }


def write_client_files(directory: Path, config: dict[str, object], manifest: BundleManifest) -> None:
    """Write what onnxruntime-genai and optimum read, before the manifest hashes the files."""
    for name, document in ((GENAI_CONFIG, genai_config(manifest)), (CONFIG, optimum_config(config, manifest))):
        if document is not None:
            write_text(directory / name, json.dumps(document, indent=2) + "\n")
