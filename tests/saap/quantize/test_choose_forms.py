import copy

import pytest
import torch
from support.slim_integers import WIDE
from torch.nn import functional as F

from saap.base.errors import UserError
from saap.models.architectures import shape_of
from saap.models.checkpoint import load_model
from saap.models.slim_quant import MatrixForm
from saap.quantize.bundle_size import bundle_size
from saap.quantize.choose_forms import (
    MEASURED,
    choose_forms,
    divergences,
    errors_of,
    rounded,
    units_of,
    weights_of,
)
from saap.quantize.groups import quantize

ROWS = torch.randint(320, (4, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(tiny_model):
    return load_model(tiny_model(**WIDE))


def test_a_divergence_is_that_of_the_model_with_this_matrix_rounded(model):
    units = units_of(model)
    assert len(units) == 2 * 4 + 1
    found = divergences(model, units, ROWS)
    with torch.inference_mode():
        reference = model(input_ids=ROWS).logits.log_softmax(-1)
        for unit in (units[0], units[6], units[7], units[-1]):
            other = copy.deepcopy(model)
            for name in set(unit.modules) - ({"lm_head"} if unit.layer is None else set()):
                weight = other.get_submodule(name).weight
                weight.data = quantize(weight, 4, 32).dequantize()
            own = other(input_ids=ROWS).logits.log_softmax(-1)
            expected = F.kl_div(own, reference, log_target=True, reduction="sum").item() / ROWS.numel()
            assert found[units.index(unit)] == pytest.approx(expected, rel=2e-2, abs=1e-8)
    assert min(found) > 0


def test_other_forms_cost_as_their_errors_say(model):
    """What is taken from squared errors, against the divergence itself, which is quadratic only nearly."""
    for unit in (units_of(model)[3], units_of(model)[6]):
        shares = errors_of(weights_of(model, unit))
        assert shares[MatrixForm(4, 32)] == 1
        assert shares[MatrixForm(4, 128)] > shares[MatrixForm(4, 64)] > 1 > 0.02 > shares[MatrixForm(8, 128)]
        base = divergences(model, [unit], ROWS)[0]
        weights = {name: model.get_parameter(f"{name}.weight") for name in unit.modules}
        for form in (MatrixForm(4, 128), MatrixForm(8, 128)):
            other = copy.deepcopy(model)
            for name, weight in weights.items():
                other.get_submodule(name).weight.data = quantize(weight, *form).dequantize()
            with torch.inference_mode():
                own, reference = (m(input_ids=ROWS).logits.log_softmax(-1) for m in (other, model))
            measured = F.kl_div(own, reference, log_target=True, reduction="sum").item() / ROWS.numel()
            assert shares[form] * base == pytest.approx(measured, rel=0.35)


def test_rounding_is_taken_back_also_after_an_error(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for unit in units_of(model):
        with pytest.raises(RuntimeError, match="in the middle"), rounded(weights_of(model, unit), MEASURED):
            raise RuntimeError("in the middle")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_is_chosen_fits_and_more_room_loses_less(model):
    shape, config = shape_of(model.config), model.config.to_dict()
    low, high = (bundle_size(config, *form).total(shape) for form in ((4, 128), (8, 32)))
    room = [low + (high - low) * share // 100 for share in (0, 20, 60, 100)]
    choices = [choose_forms(model, ROWS, most) for most in room]
    for choice, most in zip(choices, room, strict=True):
        assert choice.bytes <= most
        assert set(choice.forms) == {m for u in units_of(model) for m in u.modules}
        for unit in units_of(model):  # one matrix in the graph has one form
            assert len({choice.forms[name] for name in unit.modules}) == 1
    for unit in units_of(model):  # whole pages of the file make some forms of small matrices alike in size
        assert unit.bytes(choices[0].forms[unit.modules[0]]) == unit.bytes(MatrixForm(4, 128))
    assert choices[0].bytes == low and len(set(choices[1].forms.values())) > 1
    assert {form.bits for form in choices[3].forms.values()} == {8}
    losses = [choice.divergence for choice in choices]
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[1] > losses[3]


def test_a_budget_below_the_smallest_forms_is_refused_with_the_least(model):
    least = bundle_size(model.config.to_dict(), 4, 128).total(shape_of(model.config))
    with pytest.raises(UserError, match=f"in groups as large as they allow, the weights take {least:,}"):
        choose_forms(model, ROWS, least - 1)
