"""Where a layer's logical matrices are, packed or not, dense or slim."""

import pytest
import torch
from torch import nn

from saap.base.errors import UserError
from saap.models.architectures import FAMILIES, shape_of
from saap.models.checkpoint import load_model
from saap.models.matrices import ROLES, matrices_of
from saap.models.shape import CONV


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_has_the_roles_of_its_blocks(tiny_family, family):
    model = load_model(tiny_family(family))
    shape = shape_of(model.config)
    matrices = matrices_of(model, shape)
    architecture = FAMILIES[family]
    gated = ROLES if architecture.head_gate else [role for role in ROLES if role != "head_gate"]
    wanted = [
        [r for kind in sizes.blocks for r in kind.roles if r in gated and not (sizes.reads and r in ("key", "value"))]
        for sizes in shape.layers
    ]
    assert [(m.layer, m.role) for m in matrices] == [(i, role) for i, roles in enumerate(wanted) for role in roles]
    assert {role for roles in wanted for role in roles} >= {"query", "key", "value", "output", "gate", "up", "down"}
    sizes = {
        "query": (96, 96), "key": (32, 96), "value": (32, 96), "output": (96, 96), "gate": (128, 96), "up": (128, 96),
        "down": (96, 128), "head_gate": (3, 96), **dict.fromkeys(CONV.roles, (96, 96)),
        **dict.fromkeys(("delta_query", "delta_key"), (3 * 24, 96)), "delta_out": (96, 6 * 16),
        **dict.fromkeys(("delta_value", "delta_gate"), (6 * 16, 96)), "delta_beta": (6, 96), "delta_decay": (6, 96),
    }  # fmt: skip
    if architecture.gated_queries:
        sizes["query"] = (192, 96)
    if not architecture.per_layer:  # whose layers differ
        assert all(tuple(m.linear.weight[m.rows].shape) == sizes[m.role] for m in matrices)
    linears = {id(m.linear): m.linear for m in matrices}.values()
    assert {
        id(m) for name, m in model.model.layers.named_modules() if isinstance(m, nn.Linear) and "per_layer" not in name
    } == {id(m) for m in linears}
    covered = sum(m.linear.weight[m.rows].numel() for m in matrices)
    assert covered == sum(linear.weight.numel() for linear in linears)


def test_rows_of_a_packed_matrix_are_its_queries_keys_and_values(tiny_family):
    model = load_model(tiny_family("phi3"))
    roles = ("query", "key", "value", "output", "gate", "up", "down")
    first = {m.role: m for m in matrices_of(model, shape_of(model.config))[:7]}
    assert first["query"].linear is first["key"].linear is first["value"].linear
    assert [(first[role].rows.start, first[role].rows.stop) for role in roles] == [
        (0, 96), (96, 128), (128, 160), (0, 96), (0, 128), (128, 256), (0, 96)
    ]  # fmt: skip
    hidden = torch.randn(2, 96)
    layer = model.model.layers[0]
    gate, up = (nn.functional.linear(hidden, first[r].linear.weight[first[r].rows]) for r in ("gate", "up"))
    expected = nn.functional.linear(nn.functional.silu(gate) * up, layer.mlp.down_proj.weight)
    assert torch.allclose(layer.mlp(hidden), expected, atol=1e-6)


def test_a_shape_of_another_model(tiny_family):
    model = load_model(tiny_family("llama"))
    shape = shape_of(model.config)
    with pytest.raises(UserError, match="the shape has 2 layers, the model has 3"):
        matrices_of(model, shape.with_layers(shape.layers[:2]))
