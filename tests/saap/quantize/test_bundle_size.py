from dataclasses import replace

import pytest
from support.family_cuts import compensated, dense_dir

from saap.base.errors import UserError
from saap.models.architectures import FAMILIES, shape_of
from saap.models.checkpoint import read_config
from saap.models.shape import ATTENTION, FFN, LayerSizes, ModelShape
from saap.quantize.bundle_size import bundle_size

__all__ = ["compensated", "dense_dir"]


def planned_and_real(model, bundle, bits, group_size=32):
    """Bytes by the formula, and of the file that export writes."""
    from support.exported import export_bundle

    config = read_config(model)
    export_bundle(model, bundle, bits=bits, group_size=None if bits == 32 else group_size)
    return bundle_size(config, bits, group_size).total(shape_of(config)), (bundle / "model.onnx.data").stat().st_size


WIDER = {"hidden_size": 128, "num_attention_heads": 8}
REAL = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 2, "num_attention_heads": 9,
        "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 4096, "max_position_embeddings": 8192}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "bits", "group_size"),
    [
        *(({}, bits, 32) for bits in (4, 8, 32)),
        ({"tie_word_embeddings": False}, 4, 32),
        ({"attention_bias": True, "mlp_bias": True}, 4, 32),
        (WIDER | {"num_key_value_heads": 2, "intermediate_size": 192}, 4, 32),
        (WIDER | {"num_key_value_heads": 4}, 4, 64),
        ({"max_position_embeddings": 1000}, 4, 32),
        (REAL, 4, 32),
    ],
)
def test_the_file_is_as_large_as_planned(tiny_model, tmp_path, changes, bits, group_size):
    planned, real = planned_and_real(tiny_model(**changes), tmp_path / "bundle", bits, group_size)
    assert planned == real


@pytest.mark.parametrize("family", FAMILIES)
def test_so_is_that_of_every_family(tiny_family, tmp_path, family):
    planned, real = planned_and_real(tiny_family(family), tmp_path / "bundle", 4)
    assert planned == real


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_so_is_that_of_a_slim_model_with_biases_of_its_own(compensated, tmp_path, family):
    slim, _ = compensated(family)
    assert shape_of(read_config(slim)).added_bias
    planned, real = planned_and_real(slim, tmp_path / "bundle", 4)
    assert planned == real


def test_a_matrix_takes_its_integers_and_its_scales():
    shape = ModelShape(hidden=4096, head_dim=64, vocab=1024, tied=True, layers=(LayerSizes(0, 0, 2048),))
    size = bundle_size(LLAMA, 4, 32)
    weights = 3 * 4096 * 2048
    assert size.block(FFN, shape, shape.layers[0]) == weights // 2 + weights // 32 * 4 + 4 * 4096
    assert size.block(ATTENTION, shape, shape.layers[0]) == 0


def test_every_array_begins_a_page():
    shape = ModelShape(hidden=96, head_dim=16, vocab=320, tied=True, layers=(LayerSizes(6, 3, 0),))
    assert bundle_size(LLAMA, 4, 32).block(ATTENTION, shape, shape.layers[0]) % 4096 == 0


def test_widths_that_groups_do_not_divide_are_refused():
    size = bundle_size(LLAMA, 4, 64)
    whole = ModelShape(128, 64, 320, True, (LayerSizes(2, 1, 128),))
    size.check(whole)
    with pytest.raises(UserError, match=r"size is 96 wide, which groups of 64 do not divide: give --group-size 32$"):
        size.check(replace(whole, hidden=96))
    with pytest.raises(UserError, match="the FFN of layer 0 is 96 wide"):
        size.check(whole.with_layers((LayerSizes(2, 1, 96),)))
    bundle_size(LLAMA, 32, 64).check(replace(whole, hidden=100))


LLAMA = {
    "model_type": "llama", "hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16,
    "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 320, "max_position_embeddings": 256,
}  # fmt: skip
