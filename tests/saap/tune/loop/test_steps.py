import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from torch.nn import functional as F

from saap.base.errors import UserError
from saap.cli.console import Console
from saap.models.checkpoint import load_model
from saap.tune.loop.state import discard_states
from saap.tune.loop.steps import DivergedError, Run, cosine, train
from saap.tune.options import TrainOptions

GENERATOR = torch.Generator().manual_seed(0)
# Text with something to learn: every token is followed by the next one.
IDS = (torch.arange(24)[None] + torch.randint(300, (48, 1), generator=GENERATOR)) % 320
FP32 = TrainOptions(precision="fp32", rows_per_step=4)


def rows_of(ids, mask=None):
    return {"ids": ids, "labels": ids if mask is None else ids.masked_fill(mask, -100)}


ROWS, HELD_OUT = rows_of(IDS[:40]), rows_of(IDS[40:])


def loss_of(model, batch):
    logits = model(input_ids=batch["ids"], use_cache=False).logits[:, :-1].flatten(0, 1).float()
    labels = batch["labels"][:, 1:].flatten()
    return F.cross_entropy(logits, labels, reduction="sum"), (labels != -100).sum()


def groups_of(model, rate=1e-2):
    """Norms and one matrix, with rates of their own; the embedding is frozen."""
    model.requires_grad_(False)
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    matrices = [layer.mlp.down_proj.weight for layer in model.model.layers]
    for parameter in norms + matrices:
        parameter.requires_grad_(True)
    return [{"params": matrices, "lr": rate}, {"params": norms, "lr": rate / 10}]


@pytest.fixture
def run(tiny_model):
    """Train a fresh copy of the tiny model: (model, history)."""
    path = tiny_model()

    def start(options=FP32, rows=ROWS, rate=1e-2, loss=loss_of, progress=None, **more):
        model = load_model(path)
        return model, train(model, groups_of(model, rate), rows, loss, Run(options, **more), progress)

    start.path = path
    return start


def trained_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "norm" in name or "down_proj" in name}


def test_the_steps_are_those_of_adamw_on_the_mean_over_all_learnt_tokens(run):
    """Against a plain loop; rows teach different numbers of tokens and are taken in micro-batches of 3 and 1."""
    mask = torch.arange(24)[None] < torch.randint(20, (8, 1), generator=GENERATOR)
    rows = rows_of(IDS[:8], mask)
    model, history = run(TrainOptions(precision="fp32", micro_rows=3, clip=0.5), rows)

    plain = load_model(run.path)
    matrices, norms = groups_of(plain)
    optimizer = torch.optim.AdamW([matrices, norms], betas=(0.9, 0.95), weight_decay=0.0)
    losses = []
    for step in range(2):
        logits = plain(input_ids=IDS[4 * step : 4 * step + 4]).logits[:, :-1].flatten(0, 1)
        loss = F.cross_entropy(logits, rows["labels"][4 * step : 4 * step + 4, 1:].flatten())  # a mean
        loss.backward()
        norm = torch.cat([p.grad.flatten() for g in (matrices, norms) for p in g["params"]]).norm()
        assert norm > 0.5  # or clipping would not be seen
        for group, peak in zip(optimizer.param_groups, (1e-2, 1e-3), strict=True):
            group["lr"] = peak * cosine(2, 0.1)(step)
            for parameter in group["params"]:
                parameter.grad *= 0.5 / norm
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert history.losses == pytest.approx(losses, rel=1e-6)
    for name, value in trained_of(plain).items():
        # steps are 1e-2 and 1e-3; of a gradient that is nearly 0 Adam makes much of rounding
        assert torch.allclose(model.get_parameter(name), value, atol=5e-5), name
    assert history.tokens == 8 * 24


def test_only_the_groups_are_trained_and_the_model_comes_back_as_it_was(run):
    before = load_model(run.path)
    model = load_model(run.path)
    groups = groups_of(model)
    model.lm_head.weight.requires_grad_(True)  # in no group
    state = torch.get_rng_state()
    train(model, groups, ROWS, loss_of, Run(FP32))
    trained = trained_of(model)
    for name, parameter in before.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)) == (name not in trained), name
    assert not model.training and not model.is_gradient_checkpointing and model.lm_head.weight.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_checkpointing_computes_layers_twice_and_changes_no_gradient(tiny_model):
    results = {}
    for checkpointing in (False, True):
        model = load_model(tiny_model(f"checkpointing-{checkpointing}"))
        calls = []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        options = TrainOptions(precision="fp32", checkpointing=checkpointing, clip=None)
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)  # transformers renamed what switches it on
            history = train(model, groups_of(model), rows_of(IDS[:4]), loss_of, Run(options))
        results[checkpointing] = (history.losses, trained_of(model), len(calls))
    (losses, plain, once), (other_losses, recomputed, twice) = results[False], results[True]
    assert (once, twice) == (1, 2)
    assert losses == other_losses
    for name, value in plain.items():
        assert torch.equal(value, recomputed[name]), name
    first = load_model(tiny_model("untouched")).model.layers[0].mlp.down_proj.weight
    assert not torch.equal(recomputed["model.layers.0.mlp.down_proj.weight"], first)  # behind a frozen embedding


def test_twice_the_same_bits_with_dropout_too(run):
    def noisy(model, batch):
        total, count = loss_of(model, batch)
        return total * (0.5 + torch.rand(())), count

    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(runs))  # what was drawn before does not matter
        runs.append(run(TrainOptions(precision="fp32", seed=seed), loss=noisy))
    assert runs[0][1].losses == runs[1][1].losses != runs[2][1].losses
    one, two = trained_of(runs[0][0]), trained_of(runs[1][0])
    assert all(torch.equal(one[name], two[name]) for name in one)


class KilledError(Exception):
    pass


def killed_at(count, noise=True):
    """A loss function that is killed in training step ``count``; its noise draws from the step's seed."""
    taken = []

    def loss(model, batch):
        total, number = loss_of(model, batch)
        if not model.training:
            return total, number
        taken.append(1)
        if len(taken) == count:
            raise KilledError
        return total * (0.9 + 0.2 * torch.rand(())) if noise else total, number

    return loss


def test_a_killed_run_continues_on_the_same_curve_bit_for_bit(run, tmp_path):
    options = TrainOptions(precision="fp32", evaluations=5, save_seconds=0.0)
    straight, expected = run(options, loss=killed_at(None), held_out=HELD_OUT)
    assert len(expected.losses) == 10 and expected.resumed_at is None
    with pytest.raises(KilledError):
        run(options, loss=killed_at(5), held_out=HELD_OUT, state_dir=tmp_path / "state")
    said = []
    model, history = run(
        options, loss=killed_at(None), held_out=HELD_OUT, state_dir=tmp_path / "state",
        progress=lambda *report: said.append(report),
    )  # fmt: skip
    assert history.resumed_at == 4
    assert said[0] == ("tuning (steps), continued at step 4", 4, 10)
    assert len(said) == 1 + 6
    assert (history.losses, history.held_out) == (expected.losses, expected.held_out)
    assert (history.best_step, history.tokens) == (expected.best_step, expected.tokens)
    one, two = trained_of(straight), trained_of(model)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_finished_run_is_not_run_again_and_its_state_is_one_file(run, tmp_path):
    state = tmp_path / "state"
    model, first = run(state_dir=state)
    again, second = run(state_dir=state, loss=killed_at(1))
    assert second.losses == first.losses
    one, two = trained_of(model), trained_of(again)
    assert all(torch.equal(one[name], two[name]) for name in one)
    (path,) = state.iterdir()
    with safe_open(path, framework="pt") as handle:
        kinds = {name.split(".")[0] for name in handle.keys()}  # noqa: SIM118  safe_open is no mapping
    assert kinds == {"trained", "best", "optimizer"}
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UserError, match=r"is damaged .*delete it"):
        run(state_dir=state)
    (state / "other.txt").write_text("mine", encoding="utf-8")
    discard_states(state)
    assert [path.name for path in state.iterdir()] == ["other.txt"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rate": 2e-2}, "rates"),
        ({"options": TrainOptions(precision="fp32", clip=2.0)}, "options.clip"),
        ({"rows": rows_of(IDS[1:41])}, "rows"),
        ({"fingerprint": {"weights": "other"}}, "weights"),
    ],
)
def test_the_state_of_another_run_is_neither_continued_nor_lost(run, tmp_path, change, named):
    state = tmp_path / "state"
    base = {"state_dir": state, "fingerprint": {"weights": "one"}}
    run(**base)
    (kept,) = state.iterdir()
    content = kept.read_bytes()
    said = []
    _, history = run(**{**base, **change}, progress=lambda *report: said.append(report))
    assert history.resumed_at is None
    assert said[0] == (f"tuning (steps), from the start, the state in {state} is of another run ({named})", 0, 10)
    assert kept.read_bytes() == content and len(list(state.iterdir())) == 2


@pytest.mark.parametrize("patience", [4, None])
def test_the_best_held_out_state_is_what_remains(run, patience):
    options = TrainOptions(precision="fp32", evaluations=40, patience=patience, passes=4)
    backwards = rows_of(IDS[:40].flip(1))  # better at them is worse at the held-out rows
    model, history = run(options, rate=5e-2, rows=backwards, held_out=HELD_OUT)
    losses = dict(history.held_out)
    assert history.best_step == min(losses, key=losses.get) and len(losses) == len(history.losses) + 1
    if patience:
        assert history.stopped == f"no lower held-out loss in 4 evaluations since step {history.best_step}"
        assert len(history.losses) == history.best_step + 4 < history.steps == 40
    else:
        assert history.stopped is None and history.best_step < len(history.losses) == 40
    with torch.no_grad():
        total, count = loss_of(model, HELD_OUT)
    assert (total / count).item() == pytest.approx(losses[history.best_step], rel=1e-6)


def poisoned(at, forward):
    """``loss_of`` that is spoilt in training step ``at``: in the loss, or in the gradient only."""
    taken = []

    def loss(model, batch):
        total, count = loss_of(model, batch)
        if model.training:
            taken.append(1)
            if len(taken) == at:
                # sqrt has an infinite slope at 0: a finite loss with a gradient that is not
                return (total * math.nan if forward else total + (total - total.detach()).square().sqrt()), count
        return total, count

    return loss


@pytest.mark.parametrize(("forward", "what"), [(True, "the loss became nan"), (False, "the gradient became nan")])
@pytest.mark.parametrize("judged", [True, False])
def test_what_is_not_finite_ends_the_run_with_the_last_good_state(run, tmp_path, forward, what, judged):
    options = TrainOptions(precision="fp32", evaluations=5, save_seconds=1e9)
    model = load_model(run.path)
    with pytest.raises(DivergedError) as caught:
        train(
            model, groups_of(model), ROWS, poisoned(6, forward),
            Run(options, held_out=HELD_OUT if judged else None, state_dir=tmp_path / "state"),
        )  # fmt: skip
    known = f" (held-out loss {caught.value.history.held_out[-1][1]:.3f})" if judged else ""
    assert str(caught.value) == f"{what} at step 6 of 10; the state of step 4{known} is kept: lower the learning rate"
    assert (caught.value.step, caught.value.history.best_step, len(caught.value.history.losses)) == (6, 4, 5)
    # what is kept, in memory and on disk, is what four steps of the same run give
    good = load_model(run.path)
    with pytest.raises(KilledError):
        train(good, groups_of(good), ROWS, killed_at(5, noise=False), Run(options))
    for name, value in trained_of(good).items():
        assert torch.equal(model.get_parameter(name), value), name
    (path,) = (tmp_path / "state").iterdir()
    with safe_open(path, framework="pt") as handle:
        for name, value in trained_of(good).items():
            assert torch.equal(handle.get_tensor(f"best.{name}"), value), name


def test_a_model_that_is_broken_before_training_is_said_to_be(run):
    model = load_model(run.path)
    model.model.norm.weight.data.fill_(math.nan)
    with pytest.raises(
        DivergedError, match=r"the held-out loss became nan after step 0 .*unusable before any training"
    ):
        train(model, groups_of(model), ROWS, loss_of, Run(FP32, held_out=HELD_OUT))


def test_the_schedule_warms_up_and_ends_at_a_tenth():
    factor = cosine(100, 0.1)
    assert factor(0) == pytest.approx(0.1)
    assert factor(10) == pytest.approx(1.0)
    assert factor(100) == pytest.approx(0.1)
    assert all(factor(i) >= factor(i + 1) for i in range(10, 99))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": rows_of(IDS[:3])}, "3 sequences of training text are fewer than one step's 4"),
        ({"rows": rows_of(IDS[:8], torch.arange(8)[:, None] > 3)}, "rows 5 to 8 hold no token to learn"),
        ({"options": TrainOptions(rows_per_step=0)}, "--batch 0 is not allowed: give a whole number from 1"),
        ({"options": TrainOptions(precision="fp8")}, "--precision fp8 is not allowed: give auto, bf16 or fp32"),
    ],
)
def test_bad_input_is_refused(run, change, message):
    with pytest.raises(UserError, match=message):
        run(**change)


def test_bf16_autocast_learns_too_and_is_recorded(run):
    seen = []

    def looking(model, batch):
        seen.append(model(input_ids=batch["ids"][:1], use_cache=False).logits.dtype)
        return loss_of(model, batch)

    _, history = run(TrainOptions(precision="bf16"), loss=looking, rate=2e-2)
    assert set(seen) == {torch.bfloat16} and history.precision == "bf16"
    _, exact = run(rate=2e-2)
    assert exact.precision == "fp32"
    assert history.losses != exact.losses
    assert history.losses == pytest.approx(exact.losses, rel=0.02)
    assert history.losses[-1] < history.losses[0] - 0.1


def test_progress_says_losses_and_speed_and_the_console_the_time_left(run, monkeypatch, capsys):
    said = []
    _, history = run(held_out=HELD_OUT, progress=lambda *report: said.append(report))
    assert said[0] == ("tuning (steps), first evaluation", 0, 10)
    assert [(done, total) for _, done, total in said] == [(step, 10) for step in range(11)]
    mean = sum(history.losses[-8:]) / 8
    assert said[-1][0].startswith(f"tuning (steps), loss {mean:.3f}, held-out loss {history.held_out[-1][1]:.3f}, ")
    assert said[-1][0].endswith(" tokens/s")
    # what was done before a kill took none of this run's time
    now = [0.0]
    monkeypatch.setattr("saap.cli.console.time", SimpleNamespace(monotonic=lambda: now[0]))
    with Console() as console:
        console.report("tuning (steps), continued at step 60", 60, 100)
        now[0] = 20.0
        console.report("tuning (steps), loss 3", 70, 100)
    assert "70/100 steps, 20 s, 60 s left" in capsys.readouterr().err


def test_later_passes_take_the_same_steps_in_another_order(run):
    numbers = torch.arange(40)
    seen = []

    def noting(model, batch):
        seen.extend(batch["number"].tolist())
        return loss_of(model, batch)

    run(TrainOptions(precision="fp32", passes=3), {**ROWS, "number": numbers}, loss=noting)
    first, second, third = torch.tensor(seen).view(3, 10, 4).unbind()
    assert torch.equal(first, numbers.view(10, 4))
    for later in (second, third):
        assert not torch.equal(later, first) and torch.equal(later.sort(0).values, first)  # rows of a step together
    assert not torch.equal(second, third)
