import pytest
import torch

from saap.prune.scores.fusion import fluctuation, stability_factor, stability_indicator

STEADY_AND_WILD = torch.tensor([[1.0, 0.0, 0.0], [1.0, 2.0, 0.0], [1.0, 4.0, 0.0]])


def test_fluctuation_is_the_coefficient_of_variation_over_sequences():
    # Means 1, 2, 0 and sample deviations 0, 2, 0.
    assert fluctuation(STEADY_AND_WILD).tolist() == [0.0, 1.0, 0.0]


def test_one_sequence_says_nothing_about_stability():
    assert fluctuation(torch.ones(1, 3)).tolist() == [0.0] * 3
    assert stability_factor([torch.ones(1, 3)], 1.0)[0].tolist() == [1.0] * 3


def test_the_indicator_is_standardised_over_its_type():
    importance = [torch.rand(6, 5, generator=torch.Generator().manual_seed(i)) + i for i in range(3)]
    over_type = torch.cat(stability_indicator(importance))
    assert over_type.mean().item() == pytest.approx(0, abs=1e-6)
    assert over_type.std().item() == pytest.approx(1, rel=1e-5)


def test_the_sign_is_the_direction():
    (kept,), (pruned,) = (stability_factor([STEADY_AND_WILD], s) for s in (0.5, -0.5))
    assert kept[1] > kept[0] and pruned[1] < pruned[0]
    assert torch.allclose(kept * pruned, torch.ones(3))
