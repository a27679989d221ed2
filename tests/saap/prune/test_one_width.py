"""``--for llama.cpp``: one FFN width for all layers, where its architecture of a family has no other."""

import pytest
import torch
from support.command_line import refused

from saap.base.errors import UserError
from saap.models.architectures import shape_of
from saap.models.checkpoint import load_model, read_config
from saap.prune.options import PruneOptions
from saap.prune.pruning import prune

IDS = torch.randint(320, (12, 48), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("family", ["qwen3", "lfm2", "qwen3_5_text"])
@pytest.mark.parametrize("ratio", [0.15, 0.3])
def test_the_largest_width_that_fits_is_kept_in_every_layer(tiny_family, tmp_path, family, ratio):
    dense = tiny_family(family, num_hidden_layers=4)
    options = PruneOptions(ratio=ratio, engine="llama.cpp")
    result = prune(dense, options, output=tmp_path / "slim", calibration=IDS)
    before, after = shape_of(read_config(dense)), shape_of(read_config(tmp_path / "slim"))
    (width,) = {sizes.ffn for sizes in after.layers}
    assert width in (32, 64, 96) and after.layer_weights <= (1 - ratio) * before.layer_weights
    one_more = (width + 32 - before.layers[0].ffn) * 3 * before.hidden * len(before.layers)
    assert before.layer_weights + one_more > (1 - ratio) * before.layer_weights
    assert [s.blocks for s in after.layers] == [s.blocks for s in before.layers]
    kept = [layer.ffn for layer in result.plan.layers]
    assert len(set(kept)) > 1  # as many channels, but each layer its own
    assert load_model(tmp_path / "slim")(input_ids=IDS[:1]).logits.isfinite().all()


def test_where_widths_may_differ_they_do(tiny_model, tmp_path):
    options = PruneOptions(ratio=0.2, engine="llama.cpp", heads=False)
    with_engine = prune(tiny_model(), options, output=tmp_path / "one", calibration=IDS).plan
    without = prune(tiny_model(), PruneOptions(ratio=0.2, heads=False), output=tmp_path / "two", calibration=IDS).plan
    assert with_engine.layers == without.layers


@pytest.mark.parametrize(
    ("asked", "named"),
    [({"heads": True}, "--heads"), ({"keep_layers": frozenset({1})}, "--keep-layers"),
     ({"method": "flap"}, "--method")],
)  # fmt: skip
def test_what_one_width_leaves_no_room_for_is_refused(tiny_family, tmp_path, asked, named):
    options = PruneOptions(ratio=0.2, engine="llama.cpp", **asked)
    with pytest.raises(UserError, match=rf"one FFN width for all layers of qwen3 models: leave {named} or --for"):
        prune(tiny_family("qwen3"), options, output=tmp_path / "slim", calibration=IDS)


def test_families_without_a_file_for_it_and_too_much_are_one_line(tiny_family, tmp_path):
    told = refused("prune", tiny_family("phi3"), "-o", tmp_path / "slim", "--ratio", "0.2", "--for", "llama.cpp")
    assert "saap writes no GGUF files of phi3 models: leave --for llama.cpp out" in told
    told = refused("prune", tiny_family("qwen3"), "-o", tmp_path / "slim", "--ratio", "0.9", "--for", "llama.cpp")
    assert "the largest that these options allow is" in told
