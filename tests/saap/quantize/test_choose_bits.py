import copy
import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from saap.models.architectures import shape_of
from saap.models.checkpoint import load_model
from saap.quantize.bundle_size import bundle_size
from saap.quantize.groups import quantize
from saap.quantize.mixed_bits import choose_bits, divergences, knapsack, rounded, units_of
from saap.system.errors import UserError

ROWS = torch.randint(320, (4, 24), generator=torch.Generator().manual_seed(0))


def model_of(tiny_model):
    return load_model(tiny_model())


def test_a_divergence_is_that_of_the_model_with_this_matrix_rounded(tiny_model):
    model = model_of(tiny_model)
    units = units_of(model)
    assert len(units) == 3 * 4 + 1
    found = divergences(model, units, ROWS, 32)
    with torch.inference_mode():
        reference = model(input_ids=ROWS).logits.log_softmax(-1)
        for unit in (units[0], units[6], units[11], units[-1]):
            other = copy.deepcopy(model)
            for name in set(unit.modules) - ({"lm_head"} if unit.layer is None else set()):
                weight = other.get_submodule(name).weight
                weight.data = quantize(weight, 4, 32).dequantize()
            own = other(input_ids=ROWS).logits.log_softmax(-1)
            expected = F.kl_div(own, reference, log_target=True, reduction="sum").item() / ROWS.numel()
            assert found[units.index(unit)] == pytest.approx(expected, rel=2e-2, abs=1e-8)
    assert min(found) > 0


def test_rounding_is_taken_back_also_after_an_error(tiny_model):
    model = model_of(tiny_model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for unit in units_of(model):
        with pytest.raises(RuntimeError, match="in the middle"), rounded(model, unit, 32):
            raise RuntimeError("in the middle")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_knapsack_is_the_best_of_all_sets():
    random = np.random.default_rng(3)
    losses, extra = random.random(9), random.integers(1, 20, 9).astype(float)
    chosen = knapsack(losses, extra, 40)
    assert extra[chosen].sum() <= 40
    sets = (np.array(bits, bool) for bits in itertools.product([0, 1], repeat=9))
    assert losses[chosen].sum() == pytest.approx(max(losses[s].sum() for s in sets if extra[s].sum() <= 40))


def test_what_is_chosen_fits_and_more_room_loses_less(tiny_model):
    model = model_of(tiny_model)
    shape, config = shape_of(model.config), model.config.to_dict()
    low, high = (bundle_size(config, bits, 32).total(shape) for bits in (4, 8))
    choices = [choose_bits(model, ROWS, 32, low + (high - low) * share // 100) for share in (0, 30, 70, 100)]
    for choice, share in zip(choices, (0, 30, 70, 100), strict=True):
        assert choice.bytes <= low + (high - low) * share // 100
        assert set(choice.bits_of) == {m for u in units_of(model)[:-1] for m in u.modules}
    assert set(choices[0].bits_of.values()) == {4} and choices[0].vocabulary == 4
    assert set(choices[3].bits_of.values()) == {8} and choices[3].vocabulary == 8
    assert choices[3].bytes == high and choices[0].bytes == low
    losses = [choice.divergence for choice in choices]
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[1] > losses[3] == 0
    for choice in choices:  # one matrix in the graph has one number of bits
        for unit in units_of(model)[:-1]:
            assert len({choice.bits_of[name] for name in unit.modules}) == 1


def test_a_budget_below_all_at_4_bit_is_refused_with_the_least(tiny_model):
    model = model_of(tiny_model)
    least = bundle_size(model.config.to_dict(), 4, 32).total(shape_of(model.config))
    with pytest.raises(UserError, match=f"all matrices at 4 bit the weights take {least:,}"):
        choose_bits(model, ROWS, 32, least - 1)
