"""Every family that is pruned is tuned, and what was tuned is what runs."""

import numpy as np
import pytest
import torch
from support.exported import export_bundle
from support.references import round_model

from export.engine.scoring import BundleScorer
from saap.models.architectures import FAMILIES
from saap.models.checkpoint import load_model
from saap.tune import TuneOptions, tune
from saap.tune.options import TrainOptions

IDS = torch.randint(320, (4, 16), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_tuned_model_holds_the_numbers_that_rounding_gives(tiny_family, tmp_path, family):
    path = tiny_family(family)
    untrained = TuneOptions(integers="nearest", learning_rate=0.0, norm_rate=0.0)
    tune(path, untrained, output=tmp_path / "tuned", data=IDS)
    expected = load_model(path)
    round_model(expected, 4, 32, 4)
    for materialise in (False, True):
        tuned = load_model(tmp_path / "tuned", materialise=materialise)
        with torch.inference_mode():
            difference = expected(input_ids=IDS).logits - tuned(input_ids=IDS).logits
        assert difference.abs().max() < 1e-3


@pytest.mark.parametrize("family", list(FAMILIES))
def test_tuning_lowers_the_loss_and_the_bundle_runs_it(tiny_family, tmp_path, family):
    path, ids = tiny_family(family), (torch.arange(24)[None] + torch.arange(0, 256, 8)[:, None]) % 300
    training = TrainOptions(precision="fp32", passes=2)
    options = TuneOptions(learning_rate=2e-2, norm_rate=1e-2, held_out=0, training=training)
    history = tune(path, options, output=tmp_path / "tuned", data=ids).history
    assert history.losses[-1] < history.losses[0] - 0.1
    export_bundle(tmp_path / "tuned", tmp_path / "bundle", dotprod=False)  # 4 bit at level 0
    with torch.inference_mode():
        expected = load_model(tmp_path / "tuned")(input_ids=ids[:2]).logits.numpy()
    scored = BundleScorer(tmp_path / "bundle", 1).logits(ids[:2].numpy())
    assert np.abs(scored - expected[..., : scored.shape[-1]]).max() < 2e-3
