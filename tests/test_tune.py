from __future__ import annotations

import copy

import pytest
import torch

from saap.checkpoint import load_model, read_config, read_record
from saap.errors import SaapError
from saap.gptq import compensated_matrices
from saap.group_quant import quantize_model
from saap.modeling_slim import GroupQuantLinear, GroupQuantTable
from saap.prune import PruneOptions, Requirement, prune
from saap.tune import TuneOptions, _GroupMatMul, attach, cosine, detach, loss_of, norms, tune

GENERATOR = torch.Generator().manual_seed(0)
# Text with something to learn: every token is followed by the next one.
ROWS = (torch.arange(24)[None] + torch.randint(300, (32, 1), generator=GENERATOR)) % 320
FAST = TuneOptions(learning_rate=2e-2, norm_learning_rate=1e-2)


def test_gradients_are_those_of_the_dequantised_matrix():
    x = torch.randn(2, 5, 64, generator=GENERATOR, dtype=torch.float64, requires_grad=True)
    centred = torch.randint(-8, 8, (7, 2, 32), generator=GENERATOR).to(torch.int8)
    scale = torch.rand(7, 2, generator=GENERATOR, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, s: _GroupMatMul.apply(a, centred, s), (x, scale))
    dense = (centred.double() * scale.detach()[..., None]).flatten(1)
    assert torch.allclose(_GroupMatMul.apply(x, centred, scale), x @ dense.T)


def test_only_factors_and_norms_are_trained(tiny_model):
    model = load_model(tiny_model())
    quantize_model(model, 4, 32, 4)
    groups = attach(model)
    assert len(groups) == 3 * 7
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(g.delta) for g in groups} | {id(p) for p in norms(model)}
    loss_of(model, ROWS[:2], None, 0.0).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


def test_before_training_the_wrapped_model_is_the_quantised_one(tiny_model):
    model = load_model(tiny_model())
    quantize_model(model, 4, 32, 4)
    with torch.inference_mode():
        expected = model(input_ids=ROWS[:2]).logits
        attach(model)
        assert torch.allclose(model(input_ids=ROWS[:2]).logits, expected, atol=1e-5)
        detach(model)
        assert torch.equal(model(input_ids=ROWS[:2]).logits, expected)


def held_out(path):
    with torch.inference_mode():
        return loss_of(load_model(path), ROWS[28:], None, 0.0).item()


@pytest.mark.parametrize("bits", [4, 8])
def test_tuning_lowers_the_loss_and_keeps_the_integers(tiny_model, tmp_path, bits):
    path = tiny_model()
    prune(path, tmp_path / "slim", ROWS[:8], PruneOptions(Requirement(ratio=0.3)))
    before = load_model(tmp_path / "slim")
    options = TuneOptions(bits=bits, learning_rate=2e-2, norm_learning_rate=1e-2, calibration_rows=8)
    quantize_model(before, bits, 32, bits, compensated_matrices(copy.deepcopy(before), ROWS[:8], bits, 32, bits))
    losses = tune(tmp_path / "slim", tmp_path / "tuned", ROWS[:28], options)
    assert len(losses) == 7
    with torch.inference_mode():
        assert held_out(tmp_path / "tuned") < loss_of(before, ROWS[28:], None, 0.0).item() - 0.05
    after = load_model(tmp_path / "tuned")
    changed = 0
    for (name, old), new in zip(before.named_modules(), after.modules(), strict=True):
        if isinstance(old, GroupQuantTable):
            assert torch.equal(old.qweight, new.qweight) and torch.equal(old.zero_points, new.zero_points), name
            assert torch.equal(new.scales, new.scales.half().float()), name
            changed += isinstance(old, GroupQuantLinear) and not torch.equal(old.scales, new.scales)
    assert changed == sum(isinstance(m, GroupQuantLinear) for m in before.modules())


def test_the_record_keeps_the_plan_and_adds_the_tuning(tiny_model, tmp_path):
    path = tiny_model()
    prune(path, tmp_path / "slim", ROWS[:8], PruneOptions(Requirement(ratio=0.3)))
    tune(tmp_path / "slim", tmp_path / "tuned", ROWS[:8], FAST)
    slim, tuned = read_record(tmp_path / "slim"), read_record(tmp_path / "tuned")
    assert tuned["plan"] == slim["plan"]
    assert tuned["tuning"]["tokens"] == 8 * 24
    assert read_config(tmp_path / "tuned")["slim_quant"] == {"bits": 4, "block": 32, "embedding_bits": 4, "tied": True}


def test_the_same_rows_give_the_same_bytes_and_saving_again_too(tiny_model, tmp_path):
    path = tiny_model()
    for name in ("one", "two"):
        tune(path, tmp_path / name, ROWS[:8], FAST)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]
    load_model(tmp_path / "one").save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == weights[0]


def test_a_teacher_adds_its_divergence(tiny_model):
    teacher, student = load_model(tiny_model("teacher", seed=1)), load_model(tiny_model("student", seed=2))
    with torch.inference_mode():
        nll = loss_of(student, ROWS[:2], None, 0.5).item()
        both = loss_of(student, ROWS[:2], teacher, 0.5).item()
        p = teacher(input_ids=ROWS[:2]).logits[:, :-1].log_softmax(-1)
        q = student(input_ids=ROWS[:2]).logits[:, :-1].log_softmax(-1)
        kl = (p.exp() * (p - q)).sum(-1).mean().item()
        assert both == pytest.approx(0.5 * nll + 0.5 * kl, rel=1e-4)
        assert loss_of(teacher, ROWS[:2], teacher, 1.0).item() == pytest.approx(0.0, abs=1e-5)


def test_the_schedule_warms_up_and_ends_at_a_tenth():
    factor = cosine(100, 0.1)
    assert factor(0) == pytest.approx(0.1)
    assert factor(10) == pytest.approx(1.0)
    assert factor(100) == pytest.approx(0.1)
    assert all(factor(i) >= factor(i + 1) for i in range(10, 99))


def test_bad_input_is_refused_and_nothing_is_left(tiny_model, tmp_path):
    path = tiny_model()
    tune(path, tmp_path / "tuned", ROWS[:4], FAST)
    with pytest.raises(SaapError, match="tuned integers already"):
        tune(tmp_path / "tuned", tmp_path / "out", ROWS[:4], FAST)
    with pytest.raises(SaapError, match="fewer than one step"):
        tune(path, tmp_path / "out", ROWS[:3], FAST)
    with pytest.raises(SaapError, match="not a multiple of the group size 64"):
        tune(path, tmp_path / "out", ROWS[:4], TuneOptions(block=64))
    with pytest.raises(SaapError, match=r"(loss became (nan|inf) at step|inputs are not finite)"):
        broken = load_model(path)
        broken.model.norm.weight.data.fill_(float("nan"))
        broken.save_pretrained(path)
        tune(path, tmp_path / "out", ROWS[:8], FAST)
    assert not (tmp_path / "out").exists()
