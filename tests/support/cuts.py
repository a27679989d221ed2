"""Plans of every kind for the tiny model, and a model cut by one."""

import random
from pathlib import Path

from saap.models.architectures import architecture_of, shape_of
from saap.models.checkpoint import read_config, slim_config, write_slim
from saap.models.weight_files import tensor_reader
from saap.prune.cut.surgery import cut_tensors
from saap.prune.plan import LayerPlan, PrunePlan, whole_layer

EMPTY = LayerPlan((), (), ())
WHOLE = whole_layer(
    shape_of(
        {
            "model_type": "llama",
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "hidden_size": 96,
            "intermediate_size": 128,
            "num_hidden_layers": 1,
            "vocab_size": 320,
        }
    ).layers[0]
)


def random_layer(generator: random.Random) -> LayerPlan:
    """Any legal layer of the tiny model: 3 KV groups of 2 heads, 128 channels."""
    groups = sorted(generator.sample(range(3), generator.randint(0, 3)))
    each = generator.randint(1, 2)
    heads = sorted(h for g in groups for h in generator.sample([2 * g, 2 * g + 1], each))
    channels = sorted(generator.sample(range(128), generator.choice([0, 1, 37, 64, 128])))
    return LayerPlan(tuple(heads), tuple(groups), tuple(channels))


def cut(path: Path, out: Path, plan: PrunePlan) -> Path:
    config = read_config(path)
    shape = shape_of(config)
    names, read = tensor_reader(path)
    tensors = cut_tensors(names, read, plan, shape, architecture_of(config))
    return write_slim(out, path, slim_config(config, plan.kept_shape(shape)), tensors, {"plan": {}})


PLANS = {
    "no attention in layer 0": (LayerPlan((), (), tuple(range(0, 128, 2))), WHOLE, WHOLE),
    "no FFN in the last layer": (WHOLE, WHOLE, LayerPlan((0, 2), (0, 1), ())),
    "a layer dropped": (WHOLE, EMPTY, WHOLE),
    "first layer dropped, rest uneven": (EMPTY, LayerPlan((1, 4), (0, 2), (5,)), WHOLE),
    **{
        f"random {seed}": (*tuple(random_layer(random.Random(10 * seed + i)) for i in range(2)), WHOLE)
        for seed in range(8)
    },
}
