"""Channels of short convolutions and heads of delta nets are scored, priced, cut and refitted as others are."""

from dataclasses import replace

import pytest
import torch
from support.compensated import losses_compensated

from saap.models.architectures import FAMILIES, LAYER_TYPES, shape_of
from saap.models.checkpoint import load_model, read_config
from saap.prune.cut.refit import compensate
from saap.prune.options import PruneOptions
from saap.prune.plan import PrunePlan, whole_layer
from saap.prune.pruning import prune


@pytest.fixture(params=["lfm2", "qwen3_5_text"])
def family(request):
    return request.param


@pytest.fixture
def dense(tiny_family, family):
    kinds = [LAYER_TYPES[FAMILIES[family].rare], "full_attention"] * 2
    return tiny_family(family, num_hidden_layers=4, layer_types=kinds)


def test_all_of_it_is_pruned_and_explained(dense, family, tmp_path):
    """Scores, prices, search, refit and record know what mixes tokens; the budget is met."""
    kind = FAMILIES[family].rare
    ids = torch.randint(320, (12, 48), generator=torch.Generator().manual_seed(4))
    options = PruneOptions(ratio=0.5, heads=True, keep=frozenset({"blocks"}), group_size=32)
    result = prune(dense, options, output=tmp_path / "slim", calibration=ids)
    before, after = shape_of(read_config(dense)), shape_of(read_config(tmp_path / "slim"))
    assert after.layer_weights <= 0.5 * before.layer_weights
    blocks = result.plan.reasons.blocks
    assert {block.kind for block in blocks} == {"attention", kind.name, "ffn"}
    (field,) = kind.sizes
    own = [block for block in blocks if block.kind == kind.name]
    assert any(getattr(block.keeps, field) < getattr(block.had, field) for block in own)
    assert load_model(tmp_path / "slim")(input_ids=ids[:1]).logits.isfinite().all()


def test_a_refit_gives_back_what_other_structures_know(dense, family):
    """Those that copy others are cut; without a refit the block loses them, with it the model is what it was."""
    model = load_model(dense)
    ids = torch.randint(320, (16, 48), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        left = copied_channels(model) if family == "lfm2" else copied_heads(model)
    architecture, kind = FAMILIES[family], FAMILIES[family].rare
    whole = [whole_layer(sizes) for sizes in shape_of(model.config).layers]
    plan = PrunePlan((replace(whole[0], **{kind.sizes[0]: left}), *whole[1:]))
    losses = {how: losses_compensated(how, model, plan, ids[:12], ids[12:]) for how in ("none", "bias", "refit")}
    exact = losses_compensated("none", model, PrunePlan(tuple(whole)), ids[:12], ids[12:])
    apart = {how: float((found - exact).abs().max()) for how, found in losses.items()}
    assert apart["refit"] < 0.05 * apart["none"] and apart["bias"] > 0.1 * apart["none"] > 0
    (name, tensor), *_ = compensate("refit", model, plan, ids)
    assert name == f"model.layers.0.{architecture.writing(kind)}.weight" and tensor.shape == (96, 64)


def copied_channels(model):
    """The last third of the channels of a convolution does what the first does; those that stay."""
    conv = model.model.layers[0].conv
    for part in range(3):
        conv.in_proj.weight[96 * part + 64 : 96 * part + 96] = conv.in_proj.weight[96 * part : 96 * part + 32]
    conv.conv.weight[64:] = conv.conv.weight[:32]
    return tuple(range(64))


def copied_heads(model):
    """The last key head of a delta net, with its value heads, does what the first does; those that stay."""
    net = model.model.layers[0].linear_attn
    starts = [(0, net.head_k_dim), (net.key_dim, net.head_k_dim), (2 * net.key_dim, 2 * net.head_v_dim)]
    for weight in (net.in_proj_qkv.weight, net.conv1d.weight):
        for start, rows in starts:
            weight[start + 2 * rows : start + 3 * rows] = weight[start : start + rows]
    net.in_proj_z.weight[2 * 32 :] = net.in_proj_z.weight[:32]
    for each in (net.in_proj_a.weight, net.in_proj_b.weight, net.A_log, net.dt_bias):
        each[4:] = each[:2]
    return (0, 1)
