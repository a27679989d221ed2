r"""A model with a planted fault: slower by some layers, or one token in place of another.

    python -m studies.bench.slower_model smollm2-135m out/s4 9,3,1280 9,3,1280        # 4.4 % slower
    python -m studies.bench.slower_model smollm2-135m out/s6 9,3,1792 9,3,1792        # 6.2 %
    python -m studies.bench.slower_model smollm2-135m out/s10 --silent 9,3,1536 9,3,1536 9,3,1536 9,3,1536 9,3,1536 \
        0,0,576
    python -m studies.bench.slower_model smollm2-135m out/other --swap 28,1216
    saap export out/s4 -o out/slower-4.4 --parity none

Each argument after the folder is one layer more: query heads, KV heads, FFN width. Their weights are the last layer's,
cut or repeated; ``--silent`` puts zeros where they write, so that they take their time and the model says what it said.
How much slower a model is depends on the host's state, so the size is measured in the same trials. ``--swap A,B``
exchanges the embeddings of two token ids: what is said of other tokens stays as it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def main(model: str, out: str, extra: list[str], silent: bool = False, swap: str | None = None) -> None:
    import torch

    from saap.models.architectures import shape_of
    from saap.models.checkpoint import read_config, slim_config, write_slim
    from saap.models.resolve import resolve
    from saap.models.shape import LayerSizes
    from saap.models.weight_files import tensor_reader

    base = resolve(model)
    config = read_config(base)
    shape = shape_of(config)
    layers = [LayerSizes(*map(int, sizes.split(","))) for sizes in extra]
    names, read = tensor_reader(base)
    tensors = {name: read(name) for name in names if name != "lm_head.weight" or not config.get("tie_word_embeddings")}
    last = f"model.layers.{len(shape.layers) - 1}."
    for index, sizes in enumerate(layers, start=len(shape.layers)):
        for name in [name for name in names if name.startswith(last)]:
            kind, tensor = name.removeprefix(last), tensors[name]
            if not sizes.query_heads and kind.startswith(("self_attn", "input_layernorm")):
                continue
            if kind.startswith("mlp"):
                axis = 1 if "down" in kind else 0
                tensor = torch.cat([tensor, tensor], axis).narrow(axis, 0, sizes.ffn)
            writes = kind in ("self_attn.o_proj.weight", "mlp.down_proj.weight")
            tensors[f"model.layers.{index}.{kind}"] = torch.zeros_like(tensor) if silent and writes else tensor.clone()
    if swap:
        pair = [int(token) for token in swap.split(",")]
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            if name in tensors:
                tensors[name] = tensors[name].clone()
                tensors[name][pair] = tensors[name][pair[::-1]]
    slim = slim_config(config, shape.with_layers((*shape.layers, *layers)))
    write_slim(Path(out), base, slim, iter(tensors.items()), {})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("extra", nargs="*", metavar="HEADS,KV,FFN", help="one more layer")
    parser.add_argument("--silent", action="store_true", help="the new layers write zeros")
    parser.add_argument("--swap", metavar="A,B", help="token ids that change places")
    args = parser.parse_intermixed_args()
    main(args.model, args.out, args.extra, args.silent, args.swap)
