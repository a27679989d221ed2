import copy
import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from support.command_line import here
from torch.nn import functional as F

from saap.base import needs as needs_module
from saap.base.errors import UserError
from saap.models.architectures import shape_of
from saap.models.checkpoint import load_model, read_config
from saap.models.modeling_slim import GroupQuantLinear, GroupQuantTable
from saap.models.record import read_record
from saap.prune.options import PruneOptions
from saap.prune.pruning import prune
from saap.quantize.gptq import compensated_matrices
from saap.quantize.groups import IntegerForm, quantize_model
from saap.text.rows import TuningRows
from saap.tune import tuning as tune_module
from saap.tune.adapters import layers_of
from saap.tune.loop.steps import DivergedError
from saap.tune.needs import tune_needs
from saap.tune.options import TrainOptions
from saap.tune.tuning import TuneOptions, loss_of, tune

GENERATOR = torch.Generator().manual_seed(0)
# Text with something to learn: every token is followed by the next one.
ROWS = (torch.arange(24)[None] + torch.randint(300, (32, 1), generator=GENERATOR)) % 320
TRAINING = TrainOptions(rows_per_step=4, checkpointing=False, precision="fp32")
FAST = TuneOptions(learning_rate=2e-2, norm_rate=1e-2, calibration_rows=8, held_out=0, training=TRAINING)


def nll_of(model, ids):
    with torch.inference_mode():
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        return F.cross_entropy(logits.float(), ids[:, 1:].flatten()).item()


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SAAP_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def slim(tmp_path_factory, llama):
    """A pruned model, beside the dense one."""
    home = tmp_path_factory.mktemp("slim")
    prune(llama(home / "tiny"), PruneOptions(ratio=0.3), output=home / "slim", calibration=ROWS[:8])
    return home / "slim"


@pytest.mark.parametrize("bits", [4, 8])
def test_tuning_lowers_the_loss_and_keeps_the_integers(slim, tmp_path, bits):
    before = load_model(slim)
    form = IntegerForm(bits, 32, bits)
    quantize_model(before, bits, 32, bits, compensated_matrices(copy.deepcopy(before), ROWS[:8], form))
    rows = TuningRows(ROWS[:28], ROWS[:28].clone(), "a text", "0" * 64, "text")
    history = tune(slim, replace(FAST, bits=bits), output=tmp_path / "tuned", data=rows).history
    assert len(history.losses) == 7
    after = load_model(tmp_path / "tuned")
    assert nll_of(after, ROWS[28:]) < nll_of(before, ROWS[28:]) - 0.05
    changed = trained = 0
    for (name, old), new in zip(before.named_modules(), after.modules(), strict=True):
        if isinstance(old, GroupQuantTable):
            assert torch.equal(old.qweight, new.qweight) and torch.equal(old.zero_points, new.zero_points), name
            assert torch.equal(new.scales, new.scales.half().float()), name
            changed += isinstance(old, GroupQuantLinear) and not torch.equal(old.scales, new.scales)
            trained += new.scales.numel() * isinstance(new, GroupQuantLinear)
    assert changed == sum(isinstance(m, GroupQuantLinear) for m in before.modules())
    # the record keeps the plan and adds the tuning
    record = read_record(tmp_path / "tuned")
    assert record["plan"] == read_record(slim)["plan"]
    tuning = record["tuning"]
    assert tuning["tokens"] == 28 * 24 and tuning["text"]["source"] == "a text"
    norms = sum(p.numel() for name, p in after.named_parameters() if "norm" in name)
    assert tuning["trained_parameters"] == trained + norms
    entry = {"bits": bits, "block": 32, "embedding_bits": bits, "tied": True}
    assert read_config(tmp_path / "tuned")["slim_quant"] == entry


def test_mixed_forms(slim, tmp_path):
    tune(slim, replace(FAST, max_bytes=260_000), output=tmp_path / "mixed", data=ROWS[:8])
    mixed = read_config(tmp_path / "mixed")["slim_quant"]
    kinds = set(mixed.get("matrices", {}).values()) | {mixed["bits"], mixed["embedding_bits"]}
    assert kinds == {4, 8}
    assert nll_of(load_model(tmp_path / "mixed"), ROWS[28:]) < 10


def test_the_same_rows_give_the_same_bytes_and_saving_again_too(tiny_model, tmp_path):
    path = tiny_model()
    for name in ("one", "two"):
        tune(path, FAST, output=tmp_path / name, data=ROWS[:8])
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]
    load_model(tmp_path / "one").save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == weights[0]


def test_a_killed_run_continues_to_the_same_bytes(tiny_model, tmp_path, monkeypatch):
    path = tiny_model()
    options = replace(FAST, held_out=0.3, training=replace(TRAINING, save_seconds=0.0))
    history = tune(path, options, output=tmp_path / "straight", data=ROWS).history
    calls = []

    def killed(label, done, total):
        calls.append(label)
        if label.startswith("tuning") and done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(path, options, output=tmp_path / "again", data=ROWS, progress=killed)
    assert not (tmp_path / "again").exists() and (tmp_path / ".again.tuning").is_dir()
    continued = tune(path, options, output=tmp_path / "again", data=ROWS).history
    assert continued.resumed_at == 4 and continued.losses == history.losses
    assert not (tmp_path / ".again.tuning").exists()
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("straight", "again")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(("rows", "judged"), [(15, False), (16, True)])
def test_a_few_rows_do_not_judge(tiny_model, tmp_path, rows, judged):
    """One row once kept a state that was 0.1 nats worse than the last."""
    history = tune(tiny_model(), replace(FAST, held_out=0.5), output=tmp_path / "out", data=ROWS[:rows]).history
    assert bool(history.held_out) == judged and len(history.losses) == history.steps
    assert judged or history.best_step == history.steps


def test_prompts_are_not_learnt(tiny_model):
    model = load_model(tiny_model())
    labels = ROWS[:2].clone()
    labels[:, :10] = -100
    with torch.inference_mode():
        total, count = loss_of(None, FAST)(model, {"ids": ROWS[:2], "labels": labels})
        logits = model(input_ids=ROWS[:2]).logits[:, 9:-1].flatten(0, 1)
        expected = F.cross_entropy(logits, ROWS[:2, 10:].flatten(), reduction="sum")
    assert int(count) == 2 * 14
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_teacher_adds_its_divergence(tiny_model):
    from saap.tune.teacher import Question, teacher_targets

    teacher_dir = tiny_model("teacher", seed=1)
    teacher, student = load_model(teacher_dir), load_model(tiny_model("student", seed=2))
    targets = teacher_targets(teacher_dir, ROWS[:4], Question(k=10**6))
    assert targets.k == 320
    batch = {"ids": ROWS[2:4], "labels": ROWS[2:4], "row": torch.tensor([2, 3])}
    with torch.inference_mode():
        nll, count = loss_of(None, FAST)(student, batch)
        both, _ = loss_of(targets, replace(FAST, teacher_weight=0.25))(student, batch)
        p = teacher(input_ids=ROWS[2:4]).logits[:, :-1].log_softmax(-1)
        q = student(input_ids=ROWS[2:4]).logits[:, :-1].log_softmax(-1)
        kl = (p.exp() * (p - q)).sum().item()
    assert both.item() == pytest.approx(0.75 * nll.item() + 0.25 * kl, rel=1e-3)
    assert int(count) == 2 * 23


def test_a_loss_that_is_not_finite_keeps_the_best_state_and_says_where(tiny_model, tmp_path, monkeypatch):
    path = tiny_model()
    real, seen = loss_of(None, FAST), []

    def broken(*_):
        def loss(model, batch):
            total, count = real(model, batch)
            seen.append(model.training)
            return (total * float("nan") if sum(seen) > 5 else total), count

        return loss

    monkeypatch.setattr(tune_module, "loss_of", broken)
    with pytest.raises(DivergedError, match=r"loss became nan at step 6 of 8.*is kept.*it was written to"):
        tune(path, replace(FAST, learning_rate=1e-3, norm_rate=1e-4), output=tmp_path / "out", data=ROWS)
    monkeypatch.undo()
    assert read_record(tmp_path / "out")["tuning"]["history"]["best_step"] == 4
    assert nll_of(load_model(tmp_path / "out"), ROWS) < 20


def test_bad_input_is_refused_and_nothing_is_left(tiny_model, tmp_path):
    path = tiny_model()
    tune(path, FAST, output=tmp_path / "tuned", data=ROWS[:4])
    with pytest.raises(UserError, match="tuned integers already"):
        tune(tmp_path / "tuned", FAST, output=tmp_path / "out", data=ROWS[:4])
    with pytest.raises(UserError, match="fewer than one step"):
        tune(path, FAST, output=tmp_path / "out", data=ROWS[:3])
    with pytest.raises(UserError, match="hidden size has 96 input columns, not a multiple of the group size 64"):
        tune(path, replace(FAST, group_size=64), output=tmp_path / "out", data=ROWS[:4])
    for wrong, message in (
        ({"bits": 3}, "--bits 3 is not allowed: give 4 or 8"),
        ({"teacher_weight": 2.0}, "--teacher-weight 2.0 is not allowed: give a number from 0 to 1"),
        ({"max_bytes": 1000}, "1,000 bytes cannot be met"),
    ):
        with pytest.raises(UserError, match=message):
            tune(path, replace(FAST, **wrong), output=tmp_path / "out", data=ROWS[:4])
    other = tiny_model("other", vocab_size=384)
    with pytest.raises(UserError, match=r"has 384 tokens and .* 320"):
        tune(path, FAST, output=tmp_path / "out", data=ROWS[:4], teacher=other)
    with pytest.raises(UserError, match=r"NaN or infinite numbers in model\.norm\.weight"):
        broken = load_model(path)
        broken.model.norm.weight.data.fill_(float("nan"))
        broken.save_pretrained(path)
        tune(path, FAST, output=tmp_path / "out", data=ROWS[:8])
    assert not (tmp_path / "out").exists()


def test_the_command_tunes_and_shows_it(slim, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"Line {n} of a text that is long enough to be learnt from, again." for n in range(400)))
    chats = tmp_path / "chats.jsonl"
    rows = [{"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"{n} it is"}]}
            for n in range(300)]  # fmt: skip
    chats.write_text("\n".join(map(json.dumps, rows)))
    common = ["--tokens", "1664", "--length", "64", "--batch", "4", "--set", "held_out=0.4"]
    done = here("tune", slim, "-o", tmp_path / "tuned", "--data", text, *common)
    assert re.search(r"trained +scales and norms, [\d,]+ parameters", done.stdout)
    # both losses are of a token, and named for what they are
    assert "tuning, NLL " in done.stderr and ", held-out NLL " in done.stderr and "0 KL" not in done.stdout
    assert re.search(r" loss +NLL *\n.*held-out NLL .* nats per token", done.stdout)
    done = here("tune", slim, "-o", tmp_path / "chat", "--data", chats, *common, "--patience", 0, "--teacher",
                slim.parent / "tiny")  # fmt: skip
    assert (
        "tuning, NLL+KL " in done.stderr
        and ", held-out KL " in done.stderr
        and "0.5 NLL + 0.5 KL to the teacher" in done.stdout
    )
    tuning = read_record(tmp_path / "chat")["tuning"]
    assert tuning["text"]["kind"] == "chat" and tuning["teacher"] == str(slim.parent / "tiny")
    assert f"{tuning['text']['learnt_tokens']} of 1664 tokens are answers" in done.stderr
    assert tuning["text"]["learnt_tokens"] < 832
    refused = here("tune", slim, "-o", tmp_path / "no", "--data", text, *common, "--kind", "chat", code=2)
    assert "holds no conversations" in refused.stderr


def test_what_memory_allows_is_kept_and_changes_no_loss(slim, tmp_path, monkeypatch):
    """Activations and matrices are made again only where memory is short."""
    options = replace(FAST, training=replace(TRAINING, checkpointing=None))
    kept = []
    monkeypatch.setattr(tune_module.adapters, "keep_matrices", lambda model: kept.append(len(layers_of(model))))
    losses = []
    for free in (64e9, None):
        if free is None:  # so much that it fits only when activations are made again
            shape = shape_of(read_config(slim))
            tokens = options.training.rows_per_step * ROWS.shape[1]
            both = (
                tune_needs(shape, options.bits, options.group, tokens, streamed=False, recomputed=each)
                for each in (True, False)
            )
            free = sum(needs.memory_bytes for needs in both) / 2 / needs_module.FREE_SHARE
        monkeypatch.setattr(needs_module, "available_memory", lambda free=free: free)
        losses.append(tune(slim, options, output=tmp_path / f"{free:.0f}", data=ROWS).history.losses)
    assert kept and len(kept) == 1
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("train", ["weights", "all"])
def test_weights_learn_as_floats_and_go_on_after_a_kill(train, tiny_model, tmp_path):
    model = tiny_model("model", tie_word_embeddings=train == "all")
    teacher, training = tiny_model("teacher", seed=1), replace(TRAINING, save_seconds=0.0)
    options = TuneOptions(train=train, learning_rate=3e-3, teacher_weight=1.0, held_out=0.25, training=training)
    whole = tune(model, options, output=tmp_path / "whole", data=ROWS, teacher=teacher)
    assert whole.history.losses[-1] < whole.history.losses[0] and whole.history.held_out_name == "held-out KL"
    record, config = read_record(whole.path), read_config(whole.path)
    assert "slim_quant" not in config and "tuning" not in record and record["weights"]["options"]["train"] == train
    before, after = load_file(model / "model.safetensors"), load_file(whole.path / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    tables = {"model.embed_tokens.weight", "lm_head.weight"} & before.keys()
    assert moved == (before.keys() if train == "all" else before.keys() - tables)

    def killed(label, done, total):
        if label.startswith("tuning") and done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(model, options, output=tmp_path / "again", data=ROWS, teacher=teacher, progress=killed)
    (state,) = (tmp_path / ".again.tuning").glob("training-*.safetensors")
    assert not any(name.startswith("best.") for name in load_file(state))
    again = tune(model, options, output=tmp_path / "again", data=ROWS, teacher=teacher)
    assert again.history.resumed_at == 4 and again.history.losses == whole.history.losses
    same = load_file(again.path / "model.safetensors")
    assert all(torch.equal(same[name], after[name]) for name in after)
    assert not (tmp_path / ".again.tuning").exists()

    tuned = tune(again.path, FAST, output=tmp_path / "tuned", data=ROWS)
    assert "tuning" in read_record(tuned.path) and "weights" in read_record(tuned.path)


def test_what_integers_are_for_is_refused_beside_floats(tiny_model, tmp_path):
    with pytest.raises(UserError, match=r"--bits is for --train scales, and weights learn as floats: leave it out"):
        tune(tiny_model(), TuneOptions(train="weights", bits=8), output=tmp_path / "out", data=ROWS)
    tuned = tune(tiny_model(), FAST, output=tmp_path / "tuned", data=ROWS).path
    with pytest.raises(UserError, match="holds tuned integers already"):
        tune(tuned, TuneOptions(train="weights"), output=tmp_path / "out", data=ROWS)
