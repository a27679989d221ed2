"""A model that is slower by some layers: what the bench's planted slow-downs are made of.

    python scripts/slower_model.py smollm2-135m out/s4 9,3,1280 9,3,1280        # 4.4 %
    python scripts/slower_model.py smollm2-135m out/s6 9,3,1792 9,3,1792        # 6.2 %
    python scripts/slower_model.py smollm2-135m out/s10 9,3,1536 9,3,1536 9,3,1536 9,3,1536 9,3,1536 0,0,576
    saap export out/s4 -o out/slower-4.4 --parity none

Each argument is one layer more: query heads, KV heads, FFN width. Their weights are the last layer's, cut or repeated.
How much slower a model is depends on the host's state, so the size is measured in the same trials.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def main(model: str, out: str, *extra: str) -> None:
    import torch

    from saap.architectures import shape_of
    from saap.checkpoint import read_config, slim_config, write_slim
    from saap.models import resolve
    from saap.structures import LayerSizes
    from saap.weight_files import tensor_reader

    base = resolve(model)
    config = read_config(base)
    shape = shape_of(config)
    layers = [LayerSizes(*map(int, sizes.split(","))) for sizes in extra]
    names, read = tensor_reader(base)
    tensors = {name: read(name) for name in names if name != "lm_head.weight"}
    last = f"model.layers.{len(shape.layers) - 1}."
    for index, sizes in enumerate(layers, start=len(shape.layers)):
        for name in [name for name in names if name.startswith(last)]:
            kind, tensor = name.removeprefix(last), tensors[name]
            if not sizes.query_heads and kind.startswith(("self_attn", "input_layernorm")):
                continue
            if kind.startswith("mlp"):
                axis = 1 if "down" in kind else 0
                tensor = torch.cat([tensor, tensor], axis).narrow(axis, 0, sizes.ffn)
            tensors[f"model.layers.{index}.{kind}"] = tensor.clone()
    slim = slim_config(config, shape.with_layers((*shape.layers, *layers)))
    write_slim(Path(out), base, slim, iter(tensors.items()), {})


if __name__ == "__main__":
    main(*sys.argv[1:])
