"""Plans that are tuned a little before one is chosen."""

from dataclasses import replace

import pytest
import torch

from saap.base.errors import UserError
from saap.models.record import read_record
from saap.prune import PruneOptions, prune
from saap.prune import trials as module
from saap.prune.trials import Halving, gone_of, trial_rows

SHORT = Halving((0.5, 0.0), (0.9,), (64, 128))
OPTIONS = PruneOptions(speedup=None, ratio=0.45, effort="normal", sequences=8, length=16, keep_layers=None)


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setitem(module.HALVINGS, "normal", SHORT)


def rows(options, seed=0):
    count = options.sequences + trial_rows(options)
    return torch.randint(320, (count, options.length), generator=torch.Generator().manual_seed(seed))


def test_the_plan_that_is_closest_after_tuning_is_kept(tiny_model, tmp_path, few):
    model = tiny_model(num_hidden_layers=4)
    result = prune(model, OPTIONS, output=tmp_path / "slim", calibration=rows(OPTIONS))
    plan = read_record(tmp_path / "slim")["plan"]
    tried = plan["trials"]
    assert len(tried) >= 3 and len({trial["gone"] for trial in tried}) >= 2
    assert [trial["plan"] for trial in tried] == sorted(trial["plan"] for trial in tried) and tried[0]["plan"] == 0
    assert all("64" in trial["kl"] for trial in tried)
    final = [trial for trial in tried if "128" in trial["kl"]]
    assert len(final) == 2
    assert max(t["kl"]["64"] for t in final) <= min(t["kl"]["64"] for t in tried if t not in final)
    best = min(final, key=lambda trial: trial["kl"]["128"])
    assert gone_of(result.plan) == best["gone"] and plan["price_nats"] == best["price_nats"]
    assert sorted(path.name for path in tmp_path.iterdir() if "slim" in path.name) == ["slim"]

    settings = best["settings"]
    alone = replace(OPTIONS, effort="quick", adaptive=replace(OPTIONS.adaptive, **settings))
    again = prune(model, alone, output=tmp_path / "alone", calibration=rows(OPTIONS)[:8])
    assert again.plan.layers == result.plan.layers


def test_a_round_learns_and_judges_on_rows_of_its_own(tiny_model, tmp_path, few, monkeypatch):
    from saap.evaluate.perplexity import score_models
    from saap.tune.tuning import tune

    learnt, judged = [], []

    def tuned(*args, data, **kwargs):
        learnt.append(data)
        return tune(*args, data=data, **kwargs)

    def scored(scorers, ids, **kwargs):
        judged.append(ids)
        return score_models(scorers, ids, **kwargs)

    monkeypatch.setattr("saap.tune.tuning.tune", tuned)
    monkeypatch.setattr("saap.evaluate.perplexity.score_models", scored)
    text = rows(OPTIONS)
    prune(tiny_model(num_hidden_layers=4), OPTIONS, output=tmp_path / "slim", calibration=text)
    assert {(len(ids), len(others)) for ids, others in zip(learnt, judged, strict=True)} == {(4, 2), (8, 4)}
    assert all(torch.equal(ids, text[8 : 8 + len(ids)]) for ids in learnt)  # the first eight score
    assert all(torch.equal(ids, text[16 : 16 + len(ids)]) for ids in judged)


def test_a_killed_trial_goes_on(tiny_model, tmp_path, few, monkeypatch):
    model = tiny_model(num_hidden_layers=4)
    whole = prune(model, OPTIONS, output=tmp_path / "whole", calibration=rows(OPTIONS))
    real, done = module._Trials._divergence, []

    def killed(self, number, tokens, progress):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(real(self, number, tokens, progress))
        return done[-1]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module._Trials, "_divergence", killed)
        prune(model, OPTIONS, output=tmp_path / "slim", calibration=rows(OPTIONS))
    tuned = []

    def counted(*args, **kwargs):
        tuned.append(args[0])
        return tune(*args, **kwargs)

    from saap.tune.tuning import tune

    monkeypatch.setattr("saap.tune.tuning.tune", counted)
    result = prune(model, OPTIONS, output=tmp_path / "slim", calibration=rows(OPTIONS))
    assert result.plan.layers == whole.plan.layers
    assert len(tuned) == len(read_record(tmp_path / "slim")["plan"]["trials"]) - 2 + 2  # those not known, then two


def test_where_one_plan_is_left_nothing_is_tuned(tiny_model, tmp_path, few, monkeypatch):
    monkeypatch.setattr("saap.tune.tuning.tune", None)
    options = replace(OPTIONS, keep=frozenset({"blocks"}))
    prune(tiny_model(), options, output=tmp_path / "slim", calibration=rows(options))
    (only,) = read_record(tmp_path / "slim")["plan"]["trials"]
    assert only["gone"] == 0 and not only["kl"]


def test_what_trials_need(tiny_model, tmp_path, few):
    model = tiny_model()
    with pytest.raises(UserError, match="--effort normal needs 20 calibration sequences, these are 8: give more text"):
        prune(model, OPTIONS, output=tmp_path / "slim", calibration=rows(OPTIONS)[:8])
    with pytest.raises(UserError, match="--effort is for the method saap"):
        prune(model, replace(OPTIONS, method="flap"), output=tmp_path / "slim")
    with pytest.raises(UserError, match="the model does not fit into memory as a whole: leave it out"):
        prune(model, replace(OPTIONS, stream=True), output=tmp_path / "slim", calibration=rows(OPTIONS))
