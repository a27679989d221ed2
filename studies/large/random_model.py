"""A LLaMA-shaped checkpoint of random weights in bf16 shards: the real ones are not packaged.

    python -m studies.large.random_model 7B out/llama-7b            # 13.5 GB; 1.1B, 3B, 7B, 13B, or any sizes below
    python -m studies.large.random_model 7B out/llama-7b --layers 8

Weights are normal with a standard deviation of 0.02 (of 0.02 / sqrt(2 layers) where a matrix writes to the residual
stream), so that activations stay finite and no number means anything but time and memory. The tokenizer is SmolLM2's,
cut to the 32000 ids of the vocabulary.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from studies.large.shapes import SHAPES

VOCAB, DEVIATION = 32000, 0.02


def tensors(size: str, layers: int) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) in the order of the layers."""
    hidden, ffn, depth, heads, kv_heads = SHAPES[size]
    head = hidden // heads
    generator = torch.Generator().manual_seed(0)

    def normal(rows: int, columns: int, deviation: float = DEVIATION) -> torch.Tensor:
        weight = torch.empty(rows, columns, dtype=torch.bfloat16)
        return weight.normal_(std=deviation, generator=generator)

    small = DEVIATION / math.sqrt(2 * depth)
    yield "model.embed_tokens.weight", normal(VOCAB, hidden)
    for index in range(layers):
        prefix = f"model.layers.{index}"
        for name, rows in (("q", heads * head), ("k", kv_heads * head), ("v", kv_heads * head)):
            yield f"{prefix}.self_attn.{name}_proj.weight", normal(rows, hidden)
        yield f"{prefix}.self_attn.o_proj.weight", normal(hidden, heads * head, small)
        yield f"{prefix}.mlp.gate_proj.weight", normal(ffn, hidden)
        yield f"{prefix}.mlp.up_proj.weight", normal(ffn, hidden)
        yield f"{prefix}.mlp.down_proj.weight", normal(hidden, ffn, small)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}.{norm}.weight", torch.ones(hidden, dtype=torch.bfloat16)
    yield "model.norm.weight", torch.ones(hidden, dtype=torch.bfloat16)
    yield "lm_head.weight", normal(VOCAB, hidden)


def config(size: str, layers: int) -> dict[str, object]:
    """``config.json``."""
    hidden, ffn, _, heads, kv_heads = SHAPES[size]
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16", "hidden_act": "silu",
        "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": hidden // heads, "vocab_size": VOCAB, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096, "rope_theta": 10000.0, "tie_word_embeddings": False, "attention_bias": False,
        "mlp_bias": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    }  # fmt: skip


def tokenizer_into(out: Path) -> None:
    """The files of a tokenizer whose ids are below the vocabulary: SmolLM2's, cut to the ids that there are."""
    from saap.models.resolve import resolve

    base = Path(resolve("smollm2-135m"))
    for name in ("tokenizer_config.json", "LICENSE"):
        shutil.copyfile(base / name, out / name)
    document = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = {token: number for token, number in document["model"]["vocab"].items() if number < VOCAB}
    document["model"]["vocab"] = vocab
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in document["model"]["merges"]]
    document["model"]["merges"] = [pair for pair in merges if {*pair, "".join(pair)} <= vocab.keys()]
    (out / "tokenizer.json").write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SHAPES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, help="fewer or more of them")
    args = parser.parse_args()
    from saap.base.writing import writing_directory
    from saap.models.weight_files import write_shards

    layers = args.layers or SHAPES[args.size][2]
    with writing_directory(args.out) as out:
        write_shards(out, tensors(args.size, layers))
        (out / "config.json").write_text(json.dumps(config(args.size, layers), indent=1) + "\n", encoding="utf-8")
        tokenizer_into(out)
        (out / "saap.json").write_text('{"format": 1, "method": "random weights"}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
