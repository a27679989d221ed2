"""Gemma 4, whose later layers read keys and values of earlier ones."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from saap.models.architectures import shape_of
from saap.models.checkpoint import load_model, read_config
from saap.models.shape import KINDS
from saap.prune.cut.refit import losses_compensated
from saap.prune.options import PruneOptions
from saap.prune.plan import PrunePlan, check_plan, whole_layer
from saap.prune.pruning import prune
from saap.prune.scores.importance import TYPES
from saap.prune.search.budget import budget_for
from saap.prune.search.masking import WorkingPoint, masked, mean_nll
from saap.prune.search.milp import Prices, blocks_of
from saap.system.errors import UserError

IDS = torch.randint(320, (12, 48), generator=torch.Generator().manual_seed(4))


@pytest.fixture
def dense(tiny_family):
    kinds = ["sliding_attention", "full_attention"] * 3
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3}
    return tiny_family("gemma4_text", num_hidden_layers=6, layer_types=kinds, num_kv_shared_layers=2, **heads)


@pytest.mark.parametrize("ratio", [0.3, 0.6])
@pytest.mark.parametrize("modules", [False, True])
def test_what_layers_share_goes_from_all_of_them(dense, tmp_path, ratio, modules):
    options = PruneOptions(ratio=ratio, modules=modules, heads=True, group_size=32)
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
    layers = len(shape.layers)
    structures = {type_: [np.full(count, 1.0) for _ in shape.layers] for type_, count in (("head", 6), ("group", 3))}
    structures["ffn"] = [np.full(sizes.ffn, 1.0) for sizes in shape.layers]
    structures["group"][2], structures["group"][4] = np.array([0.1, 0.5, 0.6]), np.array([5.0, 0.2, 0.05])
    prices = Prices(structures, {name: [None] * layers for name in KINDS}, dict.fromkeys(TYPES, 0.0))
    options = PruneOptions(ratio=0.5, heads=True)
    blocks = blocks_of(shape, prices, budget_for(options, shape, config), options)
    kept = [
        {option.keep.kv_heads for option in block.options if len(option.keep.kv_heads) == groups}
        for block in blocks
        if block.layer in (2, 4) and block.kind == "attention"
    ]
    assert kept == [{(0,)} if groups == 1 else {(0, 1)}] * 2


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"drop_layers": 1}, "so no layer goes: leave --drop-layers out"),
        ({"method": "shortgpt"}, "so no layer goes: leave --method shortgpt out"),
        ({"method": "random", "heads": True}, "so only saap prunes their heads: leave --heads out"),
    ],
)
def test_what_cannot_go_is_refused(dense, tmp_path, asked, named):
    with pytest.raises(UserError, match=named):
        prune(dense, PruneOptions(ratio=0.2, **asked), output=tmp_path / "slim", calibration=IDS)


def test_a_layer_is_tried_on_the_keys_that_the_plan_leaves(dense):
    """What was tried before, in layers whose keys later ones read, does not last."""
    model = load_model(dense)
    shape = shape_of(model.config)
    half = {i: replace(whole_layer(s), ffn=tuple(range(0, s.ffn, 2))) for i, s in enumerate(shape.layers)}
    plans = {1: half[1], 5: half[5]}
    with WorkingPoint(model, shape, plans, IDS[:4]).entered() as here:
        found = {index: here.loss_with(index, half[index]) for index in (0, 2, 4)}
    for index, loss in found.items():
        with masked(model, {**plans, index: half[index]}):
            assert mean_nll(model, IDS[:4]) == pytest.approx(loss, abs=1e-5)


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
