"""Gemma 4, whose later layers read keys and values of earlier ones."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.compensated import losses_compensated

from saap.base.errors import UserError
from saap.models.architectures import shape_of
from saap.models.checkpoint import load_model, read_config
from saap.prune.options import PruneOptions
from saap.prune.plan import PrunePlan, check_plan, whole_layer
from saap.prune.pruning import prune
from saap.prune.search.choices import Allowed, choices

IDS = torch.randint(320, (12, 48), generator=torch.Generator().manual_seed(4))


@pytest.fixture
def dense(tiny_family):
    kinds = ["sliding_attention", "full_attention"] * 3
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3}
    return tiny_family("gemma4_text", num_hidden_layers=6, layer_types=kinds, num_kv_shared_layers=2, **heads)


@pytest.mark.parametrize("ratio", [0.3, 0.6])
@pytest.mark.parametrize("blocks", [False, True])
def test_what_layers_share_goes_from_all_of_them(dense, tmp_path, ratio, blocks):
    kept = frozenset() if blocks else frozenset({"blocks"})
    options = PruneOptions(ratio=ratio, keep=kept, heads=True, group_size=32)
    result = prune(dense, options, output=tmp_path / "slim", calibration=IDS)
    before, after = shape_of(read_config(dense)), shape_of(read_config(tmp_path / "slim"))
    assert before.sources == after.sources == (0, 1, 2, 3, 2, 3)
    assert after.layer_weights <= (1 - ratio) * before.layer_weights
    assert len(after.layers) == 6 and all(sizes.blocks for sizes in after.layers)
    for index, source in enumerate(after.sources):
        groups = result.plan.layers[source].kv_heads
        assert result.plan.layers[index].kv_heads in ((groups,) if index == source else (groups, ()))
        assert groups or source not in (2, 3), "others read them"
    assert {b.kind for b in result.plan.reasons.blocks if b.saved} >= {"ffn", "attention"}
    slim = load_model(tmp_path / "slim")
    assert slim(input_ids=IDS[:1]).logits.isfinite().all()
    assert after.parameters == sum(p.numel() for p in slim.parameters())


@pytest.mark.parametrize("groups", [1, 2])
def test_a_group_that_layers_share_is_one_choice(dense, groups):
    """However cheap a group is in one of them alone."""
    config = read_config(dense)
    shape = shape_of(config)
    scores = {type_: [np.full(count, 1.0) for _ in shape.layers] for type_, count in (("head", 6), ("group", 3))}
    scores["ffn"] = [np.full(sizes.ffn, 1.0) for sizes in shape.layers]
    scores["group"][2], scores["group"][4] = np.array([0.1, 0.5, 0.6]), np.array([5.0, 0.2, 0.05])
    offered = choices(shape, Allowed(), scores)
    kept = [{keep.kv_heads for keep in offered[index, "attention"] if len(keep.kv_heads) == groups} for index in (2, 4)]
    assert kept == [{(0,)} if groups == 1 else {(0, 1)}] * 2


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"method": "shortgpt"}, "so no layer can be removed: leave --method shortgpt out"),
        ({"method": "flap", "heads": True}, "so only saap prunes their heads: leave --heads out"),
    ],
)
def test_what_cannot_go_is_refused(dense, tmp_path, asked, named):
    with pytest.raises(UserError, match=named):
        prune(dense, PruneOptions(ratio=0.2, **asked), output=tmp_path / "slim", calibration=IDS)


def test_a_refit_gives_back_what_a_group_knows_that_another_has_too(dense):
    """In the layer that owns it and in the one that reads it."""
    model = load_model(dense)
    shape = shape_of(model.config)
    with torch.no_grad():
        for index, names in ((2, ("q_proj", "k_proj", "v_proj")), (4, ("q_proj",))):
            for name in names:
                rows = model.model.layers[index].self_attn.get_parameter(f"{name}.weight").unflatten(0, (3, -1))
                rows[1] = rows[0]
    layers = [whole_layer(sizes) for sizes in shape.layers]
    for index in (2, 4):
        layers[index] = replace(layers[index], query_heads=(0, 1, 4, 5), kv_heads=(0, 2))
    ids = torch.randint(320, (24, 48), generator=torch.Generator().manual_seed(4))
    plan, whole = PrunePlan(tuple(layers)), PrunePlan(tuple(map(whole_layer, shape.layers)))
    check_plan(plan, shape)
    exact = losses_compensated("none", model, whole, ids[:18], ids[18:])
    apart = {
        how: float((losses_compensated(how, model, plan, ids[:18], ids[18:]) - exact).abs().max())
        for how in ("none", "refit")
    }
    assert apart["refit"] < 0.1 * apart["none"]
