"""Gemma 4, whose later layers read keys and values of earlier ones: FFNs are pruned, the rest stays whole."""

from dataclasses import replace

import pytest
import torch

from saap.models.architectures import shape_of
from saap.models.checkpoint import load_model, read_config
from saap.prune.options import PruneOptions
from saap.prune.plan import whole_layer
from saap.prune.pruning import prune
from saap.prune.search.masking import WorkingPoint, masked, mean_nll
from saap.system.errors import UserError

IDS = torch.randint(320, (12, 48), generator=torch.Generator().manual_seed(4))


@pytest.fixture
def dense(tiny_family):
    kinds = ["sliding_attention", "full_attention"] * 3
    return tiny_family("gemma4_text", num_hidden_layers=6, layer_types=kinds, num_kv_shared_layers=2)


def test_ffns_are_pruned_and_nothing_else(dense, tmp_path):
    options = PruneOptions(ratio=0.3, modules=True, group_size=32)
    result = prune(dense, options, output=tmp_path / "slim", calibration=IDS)
    before, after = shape_of(read_config(dense)), shape_of(read_config(tmp_path / "slim"))
    assert after.layer_weights <= 0.7 * before.layer_weights
    assert [replace(sizes, ffn=0) for sizes in after.layers] == [replace(sizes, ffn=0) for sizes in before.layers]
    assert [sizes.ffn for sizes in before.layers] == [128] * 4 + [256] * 2
    assert {b.kind for b in result.plan.reasons.blocks if b.saved} == {"ffn"}
    slim = load_model(tmp_path / "slim")
    assert slim(input_ids=IDS[:1]).logits.isfinite().all()
    assert after.parameters == sum(p.numel() for p in slim.parameters())


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"heads": True}, "--heads"),
        ({"drop_layers": 1}, "--drop-layers"),
        ({"method": "shortgpt"}, "--method shortgpt"),
    ],
)
def test_what_other_layers_read_stays(dense, tmp_path, asked, named):
    with pytest.raises(UserError, match=rf"attention and layers stay whole: leave {named} out"):
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
