"""Files beside the graph that let other programs run a bundle: genai_config.json for onnxruntime-genai."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from export.bundle import DECODE_GRAPH, BundleManifest

GENAI_CONFIG = "genai_config.json"


def genai_config(
    manifest: BundleManifest, *, pad_token_id: int | None = None, search: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The document that onnxruntime-genai reads to run ``model.onnx``.

    Layers may differ in their KV heads: genai takes those from the graph's input shapes, and the counts given here
    are the largest ones. ``num_hidden_layers`` counts the layers that have a KV cache, since genai makes one pair of
    ``past_key_values.N`` for each.

    Args:
        manifest: of the bundle.
        pad_token_id: None takes the first end-of-text id, as nothing is padded in a single stream.
        search: sampling defaults of the model (``do_sample``, ``temperature``, ``top_k``, ``top_p``,
            ``repetition_penalty``), over greedy ones.
    """
    cached = manifest.kv_layers
    if pad_token_id is None:
        pad_token_id = manifest.eos_token_ids[0] if manifest.eos_token_ids else 0
    model = {
        "type": "decoder",  # genai's name for any decoder-only model with these inputs
        "vocab_size": manifest.vocab_size,
        "context_length": manifest.context_length,
        # genai insists on a number; it adds no BOS by itself, the tokenizer's template does.
        "bos_token_id": pad_token_id if manifest.bos_token_id is None else manifest.bos_token_id,
        "eos_token_id": list(manifest.eos_token_ids),
        "pad_token_id": pad_token_id,
        "decoder": {
            "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
            "filename": DECODE_GRAPH,
            "head_size": manifest.head_dim,
            "hidden_size": manifest.hidden_size,
            "num_attention_heads": max((layer.query_heads for layer in cached), default=0),
            "num_key_value_heads": max((layer.kv_heads for layer in cached), default=0),
            "num_hidden_layers": len(cached),
            "inputs": {
                "input_ids": "input_ids",
                "attention_mask": "attention_mask",
                "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
        },
    }
    return {"model": model, "search": {**_greedy(manifest.context_length), **(search or {})}}


def write_genai_config(
    directory: str | Path,
    manifest: BundleManifest,
    *,
    pad_token_id: int | None = None,
    search: dict[str, Any] | None = None,
) -> Path:
    """Write :func:`genai_config` into ``directory``, by rename; to be called before the manifest hashes the files."""
    path = Path(directory) / GENAI_CONFIG
    partial = path.with_name(path.name + ".partial")
    document = genai_config(manifest, pad_token_id=pad_token_id, search=search)
    partial.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
    return path


def _greedy(max_length: int) -> dict[str, Any]:
    return {
        "do_sample": False,
        "early_stopping": True,
        "max_length": max_length,
        "min_length": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": True,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 1.0,
    }
