"""Channels of short convolutions are scored, priced, cut and refitted as other structures are."""

from dataclasses import replace

import pytest
import torch

from saap.models.architectures import shape_of
from saap.models.checkpoint import load_model, read_config
from saap.prune.cut.refit import compensate, losses_compensated
from saap.prune.options import PruneOptions
from saap.prune.plan import PrunePlan, whole_layer
from saap.prune.pruning import prune

KINDS = ["conv", "full_attention", "conv", "full_attention"]


@pytest.fixture
def dense(tiny_family):
    return tiny_family("lfm2", num_hidden_layers=4, layer_types=KINDS, block_auto_adjust_ff_dim=False)


def test_all_of_it_is_pruned_and_explained(dense, tmp_path):
    """Scores, prices, search, refit and record know channels of convolutions; the budget is met."""
    ids = torch.randint(320, (12, 48), generator=torch.Generator().manual_seed(4))
    options = PruneOptions(ratio=0.3, heads=True, modules=True, group_size=32)
    result = prune(dense, options, output=tmp_path / "slim", calibration=ids)
    before, after = shape_of(read_config(dense)), shape_of(read_config(tmp_path / "slim"))
    assert after.layer_weights <= 0.7 * before.layer_weights
    blocks = result.plan.reasons.blocks
    assert {block.kind for block in blocks} == {"attention", "conv", "ffn"}
    assert any(block.kind == "conv" and block.keeps.conv < 96 for block in blocks)
    assert load_model(tmp_path / "slim")(input_ids=ids[:1]).logits.isfinite().all()


def test_a_refit_gives_back_what_other_channels_know(dense):
    """Channels that copy others are cut; without a refit the block loses them, with it the model is what it was."""
    model = load_model(dense)
    ids = torch.randint(320, (16, 48), generator=torch.Generator().manual_seed(4))
    conv = model.model.layers[0].conv
    with torch.no_grad():
        for part in range(3):
            conv.in_proj.weight[96 * part + 64 : 96 * part + 96] = conv.in_proj.weight[96 * part : 96 * part + 32]
        conv.conv.weight[64:] = conv.conv.weight[:32]
    whole = [whole_layer(sizes) for sizes in shape_of(model.config).layers]
    plan = PrunePlan((replace(whole[0], conv=tuple(range(64))), *whole[1:]))
    losses = {kind: losses_compensated(kind, model, plan, ids[:12], ids[12:]) for kind in ("none", "bias", "refit")}
    exact = losses_compensated("none", model, PrunePlan(tuple(whole)), ids[:12], ids[12:])
    apart = {kind: float((found - exact).abs().max()) for kind, found in losses.items()}
    assert apart["refit"] < 0.05 * apart["none"] and apart["bias"] > 0.1 * apart["none"] > 0
    (name, tensor), *_ = compensate("refit", model, plan, ids)
    assert name == "model.layers.0.conv.out_proj.weight" and tensor.shape == (96, 64)
