import pytest
import torch

from saap.base.errors import UserError
from saap.models.checkpoint import load_model, materialise_linears
from saap.models.modeling_slim import GroupQuantTable, unpack_codes, unpack_zero_points
from saap.quantize.groups import pack_codes, pack_zero_points, quantize, quantize_model

GENERATOR = torch.Generator().manual_seed(0)
WEIGHT = torch.randn(10, 96, generator=GENERATOR)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 96])
def test_the_error_is_no_larger_than_that_of_the_whole_range(bits, group_size):
    matrix = quantize(WEIGHT, bits, group_size)
    groups = WEIGHT.view(len(WEIGHT), -1, group_size)
    step = groups.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    plain = torch.round(groups / step) * step
    error = (matrix.dequantize() - WEIGHT).view_as(groups).square().sum(-1)
    assert error.sum() <= (plain - groups).square().sum() * (0.95 if bits == 4 else 1.02)
    if bits == 4:  # a group may miss the plain range by the rounding of its scale, never by more
        assert (error <= (plain - groups).square().sum(-1) * 1.25).all()


def test_the_extra_code_is_on_the_side_of_the_largest_weight():
    weight = torch.arange(-8.0, 8).repeat(2).view(1, 32) / 8
    for sign in (1, -1):
        assert (quantize(sign * weight, 4, 32).dequantize() - sign * weight).abs().max() < 1e-3


@pytest.mark.parametrize("bits", [4, 8])
def test_packing_is_undone(bits):
    codes = torch.randint(2**bits, (5, 3, 32), generator=GENERATOR, dtype=torch.uint8)
    zero = torch.randint(2**bits, (5, 3), generator=GENERATOR, dtype=torch.uint8)
    assert torch.equal(unpack_codes(pack_codes(codes, bits), bits, 32), codes)
    packed = pack_zero_points(zero, bits)
    assert packed.shape == (5, 2 if bits == 4 else 3)
    assert torch.equal(unpack_zero_points(packed, bits, 3), zero)
    if bits == 4:  # the low nibble comes first
        assert pack_codes(torch.tensor([[[1, 2, 3, 4]]], dtype=torch.uint8), 4).tolist() == [[[0x21, 0x43]]]
        assert pack_zero_points(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 4).tolist() == [[0x21, 0x03]]


def test_scales_are_float16_numbers_zero_is_exact_and_so_is_a_group_of_zeros():
    scales = quantize(WEIGHT * 1e-3, 4, 32).scales
    assert torch.equal(scales, scales.half().float())
    weight = WEIGHT.clone()
    weight[:, :32] = 0
    weight[0, 40] = 0
    back = quantize(weight, 4, 32).dequantize()
    assert torch.isfinite(back).all() and (back[:, :32] == 0).all() and back[0, 40] == 0
    with pytest.raises(UserError, match="not a multiple of the group size 64"):
        quantize(WEIGHT, 4, 64)


@pytest.mark.parametrize("tied", [True, False])
def test_materialised_linears_hold_the_same_numbers(tiny_model, tied):
    path = tiny_model(tie_word_embeddings=tied, attention_bias=True)
    model = load_model(path)
    quant = quantize_model(model, 4, 32, 8)
    assert quant == {"bits": 4, "block": 32, "embedding_bits": 8, "tied": tied}
    ids = torch.randint(320, (2, 12), generator=GENERATOR)
    with torch.inference_mode():
        expected = model(input_ids=ids).logits
        materialise_linears(model)
        assert torch.allclose(model(input_ids=ids).logits, expected, atol=1e-5)
    assert not any(isinstance(m, GroupQuantTable) for m in model.modules())
    dense = load_model(path)
    with torch.inference_mode():
        assert not torch.allclose(dense(input_ids=ids).logits, expected, atol=1e-2), "nothing was quantised"
